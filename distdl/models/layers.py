"""What several image models are made of."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Norm = Literal["batch", "group", "none"]


def norm_of(kind: str, channels: int) -> nn.Module:
    """Normalisation of images [N, channels, H, W]; of groups, 8 where `channels` can be divided so."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)  # any width can be divided so
    return nn.Identity()


def average_pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., H, W] -> [..., *size]: `adaptive_avg_pool2d`, whose gradient on CUDA has other bits each time.

    Bin i of n spans from floor(i * H / n) to ceil((i + 1) * H / n), as there.
    """
    for axis, n in ((-2, size[0]), (-1, size[1])):
        length = x.shape[axis]
        if length != n:
            starts, ends = ([(i + k) * length for i in range(n)] for k in (0, 1))
            bins = [x.narrow(axis, a // n, -(-b // n) - a // n) for a, b in zip(starts, ends, strict=True)]
            x = torch.stack([one.mean(axis) for one in bins], axis)
    return x


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
