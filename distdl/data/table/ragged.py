"""`Ragged`: gathered rows of a column whose rows differ in length, without a Python object per row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], npt.NDArray[Any]]
"""(shape, dtype) -> a fresh, writable, C-contiguous array; pinned memory, say."""


_kept = np.arange(1 << 16)
_MOST_KEPT = 1 << 20


def span_index(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), starts[1], ...: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    index = np.repeat(starts - (ends - lengths), lengths)
    index += _counting(len(index))
    return index


def _counting(count: int) -> npt.NDArray[np.int64]:
    """0, 1, 2, ...: a view of one array that is kept, because to make it costs as much as to add it."""
    global _kept
    if count > _MOST_KEPT:
        return np.arange(count)
    if count > len(_kept):
        _kept = np.arange(1 << (count - 1).bit_length())  # another thread may do the same: no harm
    return _kept[:count]


@dataclass(frozen=True)
class Ragged:
    """Rows of varying length, end to end: row i is the next `lengths[i]` items of `values`.

    `values` is [total, *item shape], or another Ragged where lists hold lists; `lengths` is int64 [n].
    `text` marks bytes that are UTF-8 strings (True), raw bytes (False), or no bytes at all (None).
    """

    values: npt.NDArray[Any] | Ragged
    lengths: npt.NDArray[np.int64]
    text: bool | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each row begins, and the end of the last: int64 [n + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def take(self, ids: npt.NDArray[np.int64]) -> Ragged:
        """Rows `ids` (int64 [n], any order, repeats allowed), copied."""
        lengths = self.lengths[ids]
        index = span_index(self.offsets[ids], lengths)
        inner = self.values
        return Ragged(inner.take(index) if isinstance(inner, Ragged) else inner[index], lengths, self.text)

    def rows(self, start: int, stop: int) -> Ragged:
        """Rows start .. stop - 1, as views."""
        return self.parts([start, stop])[1]

    def padded(
        self, fill: Any = 0, length: int | None = None, allocate: Allocate | None = None
    ) -> npt.NDArray[Any]:
        """[n, longest, *item shape], short rows filled up with `fill`; `length` (>= longest) widens it.

        `allocate(shape, dtype)` makes its memory. Raises TypeError for lists of lists: pad `values` first.
        """
        if isinstance(self.values, Ragged):
            raise TypeError("rows are lists of lists: pad .values, then what it gives")
        item = self.values.shape[1:]
        longest = int(self.lengths.max(initial=0)) if length is None else length
        shape = (len(self), longest, *item)
        if allocate is None and not fill:
            out = np.zeros(shape, self.values.dtype)
        else:
            out = (allocate or np.empty)(shape, self.values.dtype)
            out.fill(fill)
        # Cheaper than a mask, which looks at the filling too.
        target = span_index(np.arange(len(self)) * longest, self.lengths)
        out.reshape(len(self) * longest, *item)[target] = self.values
        return out

    def parts(self, ends: Sequence[int]) -> list[Ragged]:
        """The parts that end at rows `ends`, as views; cheaper than `rows` for each."""
        at = self.offsets
        found = []
        for start, stop in zip([0, *ends[:-1]], ends, strict=True):
            lo, hi = int(at[start]), int(at[stop])
            inner = self.values
            values = inner.rows(lo, hi) if isinstance(inner, Ragged) else inner[lo:hi]
            found.append(Ragged(values, self.lengths[start:stop], self.text))
        return found

    def tolist(self) -> list[Any]:
        """A Python list per row: of numbers, of lists, or a `str` or `bytes`. For people, not for loops."""
        ends = self.offsets.tolist()
        pairs = list(itertools.pairwise(ends))
        if self.text is not None:
            raw = np.ascontiguousarray(self.values).tobytes()
            parts = [raw[a:b] for a, b in pairs]
            return [p.decode() for p in parts] if self.text else parts
        inner = self.values.tolist()
        return [inner[a:b] for a, b in pairs]
