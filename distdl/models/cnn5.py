"""`cnn5`: five convolutions and a fully connected head, for images of any size and number of channels."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.models.layers import average_pool, norm_of


class Cnn5(nn.Module):
    """Images [N, C, H, W] (float) -> logits [N, num_outputs].

    Widths w, w, 2w, 2w, 4w; halved in size after the second and fourth, averaged to 2x2 at the end. A
    convolution before a normalisation has no bias: that would be cancelled, and its gradient be noise.
    """

    def __init__(
        self,
        in_channels: int,
        num_outputs: int,
        width: int = 32,
        norm: str = "batch",
        dropout: float = 0.0,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        widths = [in_channels, width, width, 2 * width, 2 * width, 4 * width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=norm == "none") for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(norm_of(norm, c) for c in widths[1:])
        self.hidden = nn.Linear(4 * width * 4, hidden)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = functional.relu(norm(convolution(x)))
            if i in (1, 3):
                x = functional.max_pool2d(x, 2, ceil_mode=True)
        x = torch.flatten(average_pool(x, (2, 2)), 1)
        x = self.dropout(functional.relu(self.hidden(x)))
        logits: Tensor = self.head(x)
        return logits
