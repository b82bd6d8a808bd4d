"""A model of your own: a function or class that returns a torch.nn.Module.

It is called with the keys of the recipe's `model` section, and with those of `in_channels`, `num_outputs` and
`input_shape` that it has parameters for.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn


class Mlp(nn.Module):
    """Images [N, *input_shape] (float) -> logits [N, num_outputs], through `layers` hidden layers."""

    def __init__(
        self, input_shape: tuple[int, ...], num_outputs: int, hidden: int = 64, layers: int = 1
    ) -> None:
        super().__init__()
        widths = [math.prod(input_shape)] + [hidden] * layers
        parts: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            parts += [nn.Linear(before, after), nn.ReLU()]
        self.net = nn.Sequential(*parts, nn.Linear(widths[-1], num_outputs))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits
