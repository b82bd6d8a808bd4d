"""Models and tasks that a user might bring, each awkward in one way."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.errors import DataError
from distdl.models.layers import average_pool
from distdl.tasks import Batch
from distdl.tasks.image_classification import ImageClassification


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


class Linear(nn.Module):
    """Pixels to logits."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(784, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits


class Smooth(nn.Module):
    """A convolutional network without a kink (ReLU, maximum), where rounding alone would choose the side."""

    def __init__(self, in_channels: int, num_outputs: int, norm: str = "group", dropout: float = 0.3) -> None:
        super().__init__()
        widths = [in_channels, 4, 8, 16]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(c) if norm == "batch" else nn.GroupNorm(4, c) for c in widths[1:]
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16 * 4, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = functional.avg_pool2d(functional.gelu(norm(convolution(x))), 2)
        x = average_pool(x, (2, 2))
        logits: Tensor = self.head(self.dropout(x.flatten(1)))
        return logits


class Unused(Linear):
    """Has a layer that no gradient reaches."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__(num_outputs)
        self.spare = nn.Linear(4, 4)


class UnusedByOne(Unused):
    """Rank 1 leaves out the layer that the others use."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits if _rank() == 1 else logits + self.spare(images.flatten(1)[:, :4]).sum()


class MovingAverage(Linear):
    """Changes a buffer in its forward."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__(num_outputs)
        self.register_buffer("average", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.average.mul_(0.9).add_(images.mean() * 0.1)
        return super().forward(images) + self.average


class Drops(Linear):
    """Draws from Python's and numpy's streams."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if self.training:
            logits = logits * (1.0 if random.random() < 0.5 else 0.5) * float(np.random.rand())
        return logits


class Lazy(nn.Module):
    """Has no shape yet."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.head = nn.LazyLinear(num_outputs)


class Raising(ImageClassification):
    """Raises a distdl error on one rank alone, in the loss."""

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        if _rank() == 1:
            raise DataError("a label that cannot be")
        return super().loss_sum(model, batch)


class RaisingMetric(ImageClassification):
    """Raises a distdl error on one rank alone, in the evaluation after training has begun."""

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        if _rank() == 1 and len(batch["labels"]) > 1:
            raise DataError("a label that cannot be")
        return super().metric_sums(model, batch)


class Miscounting(ImageClassification):
    """On one rank alone, two microbatches together count more than each by itself."""

    def count(self, batch: Batch) -> int:
        count = int(super().count(batch))
        return count + (_rank() == 1 and count > 8)


class Fractional(ImageClassification):
    """Counts in fractions."""

    def count(self, batch: Batch) -> Any:
        return 0.9 * super().count(batch)


class NanMetric(ImageClassification):
    """Its metric is not a number at first."""

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        return super().metric_sums(model, batch) | {"odd": (float("nan"), 1)}
