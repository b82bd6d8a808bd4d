"""`centernet`: objects as points, detection without anchors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distdl.errors import RecipeError
from distdl.models.layers import norm_of
from distdl.models.resnet import Trunk

STRIDE = 4
"""Pixels, down and across, of one cell of the result."""

_PRIOR = 0.1
"""What a cell's score begins as, since nearly all are background (Lin et al., 2017, arXiv:1708.02002)."""


class CenterNet(nn.Module):
    """Images [N, C, H, W] (float) -> [N, num_object_classes + 4, H / 4, W / 4], rounded up.

    For each cell a logit for every class whose object may have its centre there, the centre's offset (x, y)
    from the cell's corner, and the object's width and height, all four in cells. Zhou et al. (2019),
    arXiv:1904.07850, with a residual network and transposed convolutions (their section 5.1, and Xiao et al.,
    2018, arXiv:1804.06208). Raises RecipeError for a residual network that ends above a stride of 4.
    """

    def __init__(
        self,
        in_channels: int,
        num_object_classes: int,
        depth: int = 18,
        stem: str = "imagenet",
        width: int = 64,
        norm: str = "batch",
        hidden: int = 64,
    ) -> None:
        super().__init__()
        self.trunk = Trunk(in_channels, depth, stem, width, norm)
        if self.trunk.stride < STRIDE:
            raise RecipeError(
                f"model.depth = {depth} with stem {stem!r} makes images smaller by {self.trunk.stride}, and "
                f"centernet needs {STRIDE} or more: take another depth, or stem: imagenet"
            )
        doublings = int(math.log2(self.trunk.stride // STRIDE))
        layers: list[nn.Module] = []
        channels = self.trunk.outputs
        for left in reversed(range(doublings)):
            layers += [
                nn.ConvTranspose2d(channels, width << left, 4, 2, 1, bias=False),
                norm_of(norm, width << left),
                nn.ReLU(),
            ]
            channels = width << left
        self.up = nn.Sequential(*layers)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, outputs, 1))
            for outputs in (num_object_classes, 2, 2)
        )
        nn.init.constant_(self.heads[0][-1].bias, math.log(_PRIOR / (1 - _PRIOR)))  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        height, width = (-(-n // STRIDE) for n in images.shape[2:])
        x = self.up(self.trunk(images))[:, :, :height, :width]
        return torch.cat([head(x) for head in self.heads], 1)
