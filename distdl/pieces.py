"""What a rank holds of a run's tensors, and how a saved state is read: between engines and checkpoints.

A tensor's elements are numbered in row-major order of its whole, whatever the memory layout. A rank holds the
whole of it, or one run of them, `[begin, begin + n)`: what FSDP's cut along dimension 0 and ZeRO's flat
buffers both are. So a checkpoint knows neither engines nor world sizes, only names, shapes and runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Meta:
    """A whole tensor's dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements the whole has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """What this rank holds of one tensor, on any device, detached: a view of what trains, copy before a step.

    `begin` None: every rank holds the whole, with equal values, and `data` has its shape (any strides).
    Otherwise `data` is [n], contiguous, and are the elements from `begin` on; the ranks' runs make up the
    whole, none twice. A rank that holds nothing of a tensor lists no piece of it.
    """

    data: Tensor
    shape: tuple[int, ...]
    begin: int | None = None

    @property
    def meta(self) -> Meta:
        """The whole's."""
        return Meta(self.data.dtype, self.shape)


class Saved(Protocol):
    """A state's tensors by name, read when they are asked for. Local: no rank waits for another."""

    @property
    def metas(self) -> Mapping[str, Meta]:
        """Every tensor's dtype and shape; nothing is read."""

    def whole(self, name: str) -> Tensor:
        """One tensor, on the CPU, contiguous; the caller's, or to be copied before it is changed.

        Raises CheckpointError where it cannot be read.
        """

    def run(self, name: str, begin: int, end: int) -> Tensor:
        """The elements `[begin, end)` of one tensor: [end - begin], on the CPU. As `whole`."""

    def read_into(self, name: str, begin: int, target: Tensor) -> None:
        """Overwrite `target`, of any shape, dtype, strides and device, with the elements from `begin` on.

        Raises as `whole`; `target` may then hold anything.
        """


class InMemory:
    """`Saved` from tensors that are there, on any device."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.metas = {name: Meta(t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def whole(self, name: str) -> Tensor:
        """See `Saved`."""
        return self._tensors[name].detach().cpu().contiguous()

    def run(self, name: str, begin: int, end: int) -> Tensor:
        """See `Saved`."""
        return self.whole(name).reshape(-1)[begin:end]

    def read_into(self, name: str, begin: int, target: Tensor) -> None:
        """See `Saved`."""
        target.copy_(self.run(name, begin, begin + target.numel()).view(target.shape))


class Renamed:
    """`Saved` under other names: `names` maps those of this one to those of `source`, others are left out."""

    def __init__(self, source: Saved, names: Mapping[str, str]) -> None:
        self._source = source
        self._names = names
        self.metas = {name: source.metas[of] for name, of in names.items()}

    def whole(self, name: str) -> Tensor:
        """See `Saved`."""
        return self._source.whole(self._names[name])

    def run(self, name: str, begin: int, end: int) -> Tensor:
        """See `Saved`."""
        return self._source.run(self._names[name], begin, end)

    def read_into(self, name: str, begin: int, target: Tensor) -> None:
        """See `Saved`."""
        self._source.read_into(self._names[name], begin, target)
