"""`unet`: a class for every pixel of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.models.layers import convolution


class UNet(nn.Module):
    """Images [N, C, H, W] (float) of any size -> logits [N, num_pixel_classes, H, W].

    Ronneberger et al. (2015), arXiv:1505.04597: `levels` halvings, each with twice the width, and as many
    doublings, which also see what stood before the halving; with normalisation, and with padding, so that
    the result is as large as the image.
    """

    def __init__(
        self, in_channels: int, num_pixel_classes: int, width: int = 64, levels: int = 4, norm: str = "batch"
    ) -> None:
        super().__init__()
        widths = [width << level for level in range(levels + 1)]
        inputs = [in_channels, *widths]
        self.down = nn.ModuleList(_twice(a, b, norm) for a, b in zip(inputs, widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths[:-1]))
        self.join = nn.ModuleList(_twice(2 * w, w, norm) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, num_pixel_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        passed = []
        for level, block in enumerate(self.down):
            # Rounded up, so that a last odd row or column is not lost.
            x = block(functional.max_pool2d(x, 2, ceil_mode=True) if level else x)
            passed.append(x)
        passed.pop()
        for up, join in zip(self.up, self.join, strict=True):
            beside = passed.pop()
            x = up(x)[:, :, : beside.shape[2], : beside.shape[3]]
            x = join(torch.cat([beside, x], 1))
        logits: Tensor = self.head(x)
        return logits


def _twice(inputs: int, outputs: int, norm: str) -> nn.Sequential:
    return nn.Sequential(convolution(inputs, outputs, norm), convolution(outputs, outputs, norm))
