"""What is in a checkpoint, and in what two differ. A chunk of one tensor at a time is in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from distdl.pieces import Meta, Saved

CHUNK = 1 << 22
"""Elements that are read at a time."""


@dataclass(frozen=True)
class Described:
    """One tensor. `norm` is its 2-norm, summed in fp64; None for what is neither integer nor float."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int
    norm: float | None


@dataclass(frozen=True)
class Changed:
    """A tensor of both checkpoints that is not the same: its largest absolute difference, NaN where only one
    of the two is NaN; or, where they cannot be subtracted, what they are.
    """

    name: str
    largest: float | None
    what: str = ""


@dataclass(frozen=True)
class Difference:
    """What changes from one checkpoint to another."""

    recipe: list[str]
    added: list[str]
    removed: list[str]
    changed: list[Changed]
    same: int
    """Tensors with equal bits, but for the sign of zero and the kind of NaN."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def describe(saved: Saved, *, norms: bool = True) -> Iterator[Described]:
    """Each tensor of a checkpoint, in its order. Raises CheckpointError where one cannot be read."""
    for name, meta in saved.metas.items():
        norm = _norm(saved, name, meta) if norms else None
        yield Described(name, dtype_name(meta), list(meta.shape), meta.nbytes, norm)


def dtype_name(meta: Meta) -> str:
    """ "float32"."""
    return str(meta.dtype).removeprefix("torch.")


def compare(a: Saved, b: Saved, recipe: list[str]) -> Difference:
    """From `a` to `b`. `recipe` is passed through: `distdl.recipe.differences`. Raises CheckpointError."""
    both = [name for name in a.metas if name in b.metas]
    changes = [found for name in both if (found := _change(a, b, name)) is not None]
    return Difference(
        recipe=recipe,
        added=[name for name in b.metas if name not in a.metas],
        removed=[name for name in a.metas if name not in b.metas],
        changed=changes,
        same=len(both) - len(changes),
    )


def _change(a: Saved, b: Saved, name: str) -> Changed | None:
    before, after = a.metas[name], b.metas[name]
    if before.shape != after.shape:
        return Changed(name, None, f"shape {list(before.shape)} -> {list(after.shape)}")
    largest, equal = 0.0, True
    for begin, end in _chunks(before.numel):
        left, right = a.run(name, begin, end), b.run(name, begin, end)
        if torch.equal(left, right):
            continue
        gap = (_wide(left) - _wide(right)).abs()
        gap[_wide(left) == _wide(right)] = 0.0  # infinities
        gap[left.isnan() & right.isnan()] = 0.0
        here = float(gap.max())
        equal = equal and here == 0.0
        largest = here if math.isnan(here) else max(largest, here)
        if math.isnan(largest):
            break
    kinds = f"{dtype_name(before)} -> {dtype_name(after)}" if before.dtype != after.dtype else ""
    return None if equal and not kinds else Changed(name, largest, kinds)


def _norm(saved: Saved, name: str, meta: Meta) -> float | None:
    if meta.dtype == torch.bool or meta.dtype.is_complex:
        return None
    runs = (saved.run(name, begin, end) for begin, end in _chunks(meta.numel))
    return math.sqrt(sum(float(_wide(run).square().sum()) for run in runs))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _chunks(numel: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, numel, CHUNK):
        yield begin, min(begin + CHUNK, numel)
