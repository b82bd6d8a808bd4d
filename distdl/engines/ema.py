"""A moving average of the weights, in fp32: each update adds ``(1 - decay) * (weight - average)`` to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distdl.errors import Incompatible


class WeightAverage:
    """Averages the tensors that this rank holds: whole parameters, or its shards of them.

    Buffers are not averaged: running statistics are averages already. Tensors are by parameter name.
    """

    def __init__(self, decay: float | None, weights: Mapping[str, Tensor]) -> None:
        self._decay = decay
        self._weights = dict(weights) if decay is not None else {}
        self.averages = {name: w.detach().clone().float() for name, w in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After an update of the weights."""
        if self._decay is not None and self.averages:
            weights = [w.detach().float() for w in self._weights.values()]
            torch._foreach_lerp_(list(self.averages.values()), weights, 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The weights hold the averages while the block runs."""
        kept = {name: w.detach().clone() for name, w in self._weights.items()}
        try:
            self._put(self.averages)
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take ``ema/<name>`` of a checkpoint (whole tensors); without them, begin at the present weights.

        For averages of whole tensors; an engine that shards cuts its own. Raises Incompatible.
        """
        for name, average in self.averages.items():
            value = tensors.get(f"ema/{name}")
            value = self._weights[name].detach() if value is None else value
            if value.shape != average.shape:
                raise Incompatible(
                    f"ema/{name} is {tuple(value.shape)} in the checkpoint, "
                    f"{tuple(average.shape)} in the model"
                )
            average.copy_(value)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name; tied ones under each of their names, as a state dict has them."""
    return dict(model.named_parameters(remove_duplicate=False))


def averaged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with ``ema/<name>`` in the place of ``model/<name>``, where there is one."""
    return {
        name: tensors.get(f"ema/{name.removeprefix('model/')}", t) if name.startswith("model/") else t
        for name, t in tensors.items()
    }
