"""`fcn1d` and `conv1d_resnet`: convolutions over the steps of a series.

Wang, Yan and Oates, "Time series classification from scratch with deep neural networks", arXiv:1611.06455.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional

KERNELS = (8, 5, 3)
"""Steps that the three convolutions of a block see."""


class ConvBlock(nn.Module):
    """Convolution, as many steps out as in, and normalisation. [N, C, T] -> [N, channels, T].

    The convolution has no bias: BatchNorm would cancel it, and its gradient be noise.
    """

    def __init__(self, inputs: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(inputs, channels, kernel, bias=False)
        self.norm = nn.BatchNorm1d(channels)
        self._around = ((kernel - 1) // 2, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.convolution(functional.pad(x, self._around)))
        return y


class ResidualBlock(nn.Module):
    """Three convolutions and a way around them. [N, C, T] -> [N, channels, T]."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        sizes = itertools.pairwise([inputs, channels, channels, channels])
        self.blocks = nn.ModuleList(ConvBlock(a, b, k) for (a, b), k in zip(sizes, KERNELS, strict=True))
        around: list[nn.Module] = [] if inputs == channels else [nn.Conv1d(inputs, channels, 1, bias=False)]
        self.around = nn.Sequential(*around, nn.BatchNorm1d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, block in enumerate(self.blocks):
            y = block(functional.relu(y) if i else y)
        return functional.relu(y + self.around(x))


class Fcn1d(nn.Module):
    """Series [N, T, features] (float) -> outputs [N, num_outputs], for any T that all rows share.

    Three convolutions of width, 2 x width and width channels, each with BatchNorm and ReLU, and the mean over
    the steps.
    """

    def __init__(self, features: int, num_outputs: int, width: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        sizes = itertools.pairwise([features, width, 2 * width, width])
        self.blocks = nn.ModuleList(ConvBlock(a, b, k) for (a, b), k in zip(sizes, KERNELS, strict=True))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, series: Tensor) -> Tensor:
        x = series.transpose(1, 2)
        for block in self.blocks:
            x = functional.relu(block(x))
        outputs: Tensor = self.head(self.dropout(x.mean(2)))
        return outputs


class Conv1dResnet(nn.Module):
    """Series [N, T, features] (float) -> outputs [N, num_outputs], for any T that all rows share.

    Three residual blocks of width, 2 x width and 2 x width channels, and the mean over the steps.
    """

    def __init__(self, features: int, num_outputs: int, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        sizes = itertools.pairwise([features, width, 2 * width, 2 * width])
        self.blocks = nn.ModuleList(ResidualBlock(a, b) for a, b in sizes)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, num_outputs)

    def forward(self, series: Tensor) -> Tensor:
        x = series.transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        outputs: Tensor = self.head(self.dropout(x.mean(2)))
        return outputs
