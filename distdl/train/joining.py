"""Neighbouring microbatches as one batch. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distdl.plan import share
from distdl.tasks import Batch


def rows_of(batch: Batch) -> int:
    """Dimension 0 of its tensors; 0 where none has one."""
    return next((t.shape[0] for t in batch.values() if t.ndim), 0)


def joinable(batches: Sequence[Batch], padding: Mapping[str, float]) -> bool:
    """Whether `join` can make one batch of them.

    The same fields, dtypes and layouts; in every field a row for each sample; further dimensions alike,
    but for dimension 1 of the fields in `padding`, on which those must agree with one another.
    """
    first = batches[0]
    for batch in batches:
        rows = rows_of(batch)
        if batch.keys() != first.keys() or not rows:
            return False
        for name, t in batch.items():
            model = first[name]
            if t.layout != torch.strided or t.dtype != model.dtype or t.shape[:1] != (rows,):
                return False
            if t.ndim != model.ndim or _fixed(name, t, padding) != _fixed(name, model, padding):
                return False
    return _extents(batches, padding) is not None


def join(batches: Sequence[Batch], padding: Mapping[str, float]) -> tuple[Batch, list[int | None]]:
    """One batch of all their rows, in order, on the device where they are; `joinable` must hold.

    Sequences are padded to the longest with the field's value in `padding`. Also says how long dimension 1
    of each was, where they differ; None for each where they do not.
    """
    if len(batches) == 1:
        return batches[0], [None]
    extents = _extents(batches, padding) or []
    longest = max(extents, default=0)
    alike = all(n == longest for n in extents)
    joined = {}
    for name in batches[0]:
        parts = [batch[name] for batch in batches]
        padded = not alike and name in padding and parts[0].ndim > 1
        joined[name] = torch.cat([pad(t, longest, padding[name]) for t in parts] if padded else parts)
    return joined, [None] * len(batches) if alike else list(extents)


def pad(t: Tensor, length: int, value: float) -> Tensor:
    """[N, T, ...] -> [N, length, ...]; `t` itself where it is so long already."""
    if t.shape[1] == length:
        return t
    longer = t.new_full((t.shape[0], length, *t.shape[2:]), value)
    longer[:, : t.shape[1]] = t
    return longer


def runs(items: int, most: int) -> list[tuple[int, int]]:
    """[0, items) in as few runs of at most `most` as will do, their sizes within one of each other."""
    passes = -(-items // most)
    return [share(items, i, passes) for i in range(passes)]


def _fixed(name: str, t: Tensor, padding: Mapping[str, float]) -> tuple[int, ...]:
    return tuple(t.shape[2:] if name in padding else t.shape[1:])


def _extents(batches: Sequence[Batch], padding: Mapping[str, float]) -> list[int] | None:
    """Dimension 1 of each one's padded fields; [] without such, None where fields of one batch differ."""
    names = [name for name, t in batches[0].items() if name in padding and t.ndim > 1]
    found = [{batch[name].shape[1] for name in names} for batch in batches]
    if any(len(sizes) > 1 for sizes in found):
        return None
    return [sizes.pop() for sizes in found] if names else []
