"""A moving average of the weights, in fp32: each update adds ``(1 - decay) * (weight - average)`` to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distdl.engines.shards import fill, local, pieces_of, shard_of
from distdl.errors import Incompatible
from distdl.pieces import Meta, Piece, Renamed, Saved


class WeightAverage:
    """Averages the tensors that this rank holds: whole parameters, or its shards of them (`DTensor` too).

    Buffers are not averaged: running statistics are averages already. Tensors are by parameter name.
    """

    def __init__(
        self,
        decay: float | None,
        weights: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        pieces: Callable[[Mapping[str, Tensor]], dict[str, Piece]] = pieces_of,
    ) -> None:
        """Where `weights` are shards and no `DTensor`s: the `shapes` of the wholes, and which `pieces` of
        them tensors like `weights` are.
        """
        self._decay = decay
        self._given = dict(weights) if decay is not None else {}
        self._weights = {name: local(w) for name, w in self._given.items()}
        self._shapes = shapes or {name: tuple(w.shape) for name, w in weights.items()}
        self._pieces = pieces
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

    def held(self) -> dict[str, Piece]:
        """``ema/<name>``: what this rank holds of the averages."""
        shards = {name: shard_of(average, self._given[name]) for name, average in self.averages.items()}
        return {f"ema/{name}": piece for name, piece in self._pieces(shards).items()}

    def check(self, metas: Mapping[str, Meta]) -> None:
        """Raise Incompatible, touching nothing, unless `load` can take a state that has these."""
        for name in self.averages:
            meta = metas.get(f"ema/{name}")
            if meta is not None and meta.shape != self._shapes[name]:
                raise Incompatible(
                    f"ema/{name} is {meta.shape} in the checkpoint, {self._shapes[name]} in the model"
                )

    @torch.no_grad()
    def load(self, saved: Saved) -> None:
        """Take the averages of a state that has been checked; those that it lacks begin at the present
        weights. Local.
        """
        for name, average in self.averages.items():
            if f"ema/{name}" not in saved.metas:
                average.copy_(self._weights[name].detach())
        fill({name: piece for name, piece in self.held().items() if name in saved.metas}, saved)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name; tied ones under each of their names, as a state dict has them."""
    return dict(model.named_parameters(remove_duplicate=False))


def averaged(saved: Saved) -> Saved:
    """The model of a state, with ``ema/<name>`` in the place of ``model/<name>`` where there is one."""
    ema = {name: f"ema/{name.removeprefix('model/')}" for name in saved.metas if name.startswith("model/")}
    return Renamed(saved, {name: of if of in saved.metas else name for name, of in ema.items()})
