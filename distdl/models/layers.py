"""What several image models are made of."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

Norm = Literal["batch", "group", "none"]


def norm_of(kind: str, channels: int) -> nn.Module:
    """Normalisation of images [N, channels, H, W]; of groups, 8 where `channels` can be divided so."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)  # any width can be divided so
    return nn.Identity()


def convolution(
    inputs: int, outputs: int, norm: str, kernel: int = 3, stride: int = 1, padding: int | None = None
) -> nn.Sequential:
    """Convolution, normalisation, rectifier; as large as its input unless `stride` or `padding` says else.

    Before a normalisation there is no bias: that would be cancelled, and its gradient be noise.
    """
    padding = kernel // 2 if padding is None else padding
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=norm == "none"),
        norm_of(norm, outputs),
        nn.ReLU(),
    )
