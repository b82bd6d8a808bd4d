"""`autoencoder` and `conv_autoencoder`: an image through a few numbers and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distdl.models.layers import convolution


class Autoencoder(nn.Module):
    """Images [N, C, H, W] (0 to 1) -> the same shape, 0 to 1, through `code` numbers; fully connected.

    Hinton and Salakhutdinov (2006), doi:10.1126/science.1127647: `hidden` layers down to the code, which is
    linear, the same in reverse order back, and a logistic output. Rectifiers, and with `norm` "batch"
    normalisation before them, stand in the place of the paper's pretraining.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        hidden: Sequence[int] = (1000, 500, 250),
        code: int = 30,
        norm: str = "none",
    ) -> None:
        super().__init__()
        sizes = [math.prod(input_shape), *hidden, code]
        self.encoder = _dense(sizes, norm)
        self.decoder = _dense(sizes[::-1], norm)

    def forward(self, images: Tensor) -> Tensor:
        pixels = torch.sigmoid(self.decoder(self.encoder(torch.flatten(images, 1))))
        return pixels.reshape(images.shape)


def _dense(sizes: Sequence[int], norm: str) -> nn.Sequential:
    """Linear layers with normalisation and rectifiers between them."""
    layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
    for a, b in itertools.pairwise(sizes[1:]):
        between = [nn.BatchNorm1d(a), nn.ReLU()] if norm == "batch" else [nn.ReLU()]
        layers += [*between, nn.Linear(a, b)]
    return nn.Sequential(*layers)


class ConvAutoencoder(nn.Module):
    """Images [N, C, H, W] (0 to 1) -> the same shape, 0 to 1, through `code` numbers.

    Two convolutions of stride 2, `width` and twice that, a linear layer to the code, and the same in reverse
    order back with transposed convolutions (Zeiler et al., 2010, doi:10.1109/CVPR.2010.5539957).
    """

    def __init__(
        self, input_shape: tuple[int, ...], width: int = 32, code: int = 30, norm: str = "batch"
    ) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        self._small = (2 * width, -(-height // 4), -(-breadth // 4))
        size = math.prod(self._small)
        self.down = nn.Sequential(
            convolution(channels, width, norm, stride=2), convolution(width, 2 * width, norm, stride=2)
        )
        self.encode = nn.Linear(size, code)
        self.decode = nn.Linear(code, size)
        self.up = nn.Sequential(
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, 2, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        code = self.encode(torch.flatten(self.down(images), 1))
        x = self.up(self.decode(code).unflatten(1, self._small))
        return torch.sigmoid(x[:, :, : images.shape[2], : images.shape[3]])
