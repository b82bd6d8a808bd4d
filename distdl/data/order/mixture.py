"""`Weighted`: one stream out of several datasets, in stated proportions.

The stream never ends: an epoch is the next `rows` positions of it. How many of its first n samples come from
which part is a function of n alone, found by halving: of the n samples that fall to a group of parts,
round(n * w) fall to its first half, where w is that half's share of the group's weight. Such a count grows by
0 or 1 with n, so each position belongs to one part and is the j-th of it; no table is needed, and the counts
are within log2(parts) of n times the weight. (Rounding each part's n * weight, or differences of cumulative
weights, would at times give a part -1 samples.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from distdl.data.order.permutation import (
    MAX_ROWS,
    Ints,
    Words,
    check_positions,
    check_rows,
    mix,
    permute,
    round_keys,
)
from distdl.errors import DataError
from distdl.samples import check_weights

BLOCK = 1024
"""Positions shuffled together. Every prefix of the stream is within one block of the proportions."""

_BITS = 32
_UNITS = 1 << _BITS


@dataclass(frozen=True, eq=False)
class Weighted:
    """A mixture of datasets laid end to end: `parts_rows` rows each, visited with probability `weights`.

    An epoch has `epoch_rows` positions (None: as many as all parts together), and the proportions hold in
    every prefix of it to within `block`. Each part is read in passes of its own: every row of it once in a
    random order, then every row again in another, whatever the epoch. Constant memory.

    Weights are kept to 2**-32, so a stream of n positions is n * 2**-32 samples off at most; those in
    proportion to the rows make each epoch one pass over everything while n is below 2**32.

    Raises DataError for weights that are not a distribution, and for a part without rows.
    """

    seed: int
    parts_rows: Sequence[int]
    weights: Sequence[float]
    epoch_rows: int | None = None
    block: int = BLOCK
    rows: int = field(init=False)
    _sizes: Ints = field(init=False, repr=False)
    _firsts: Ints = field(init=False, repr=False)
    _names: Words = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_weights(self.weights, len(self.parts_rows))
        for part, rows in enumerate(self.parts_rows):
            if rows < 1:
                raise DataError(f"dataset {part} of the mixture has {rows} rows; leave it out")
        if self.block < 1:
            raise DataError(f"the block of order weighted is {self.block}; expected 1 position or more")
        sizes = np.array(self.parts_rows, dtype=np.int64)
        rows = int(sizes.sum()) if self.epoch_rows is None else self.epoch_rows
        check_rows(rows)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "_sizes", sizes)
        object.__setattr__(self, "_firsts", np.cumsum(sizes) - sizes)
        object.__setattr__(self, "_names", mix(np.arange(1, len(sizes) + 1, dtype=np.uint64)))

    def at(self, epoch: int, positions: Ints) -> Ints:
        """See `distdl.data.order.kinds.Order.at`."""
        check_positions(positions, self.rows)
        parts, turns = self._shares(epoch * self.rows + self._slots(epoch, positions))
        sizes = self._sizes[parts]
        passes = turns // sizes
        # Part and pass choose the permutation together: parts of equal size are not visited in step.
        tweaks = mix(self._names[parts] + passes.astype(np.uint64))
        within = permute(turns - passes * sizes, sizes, round_keys(self.seed, "order-part"), tweaks)
        return self._firsts[parts] + within

    def ids(self, epoch: int, start: int, stop: int) -> Ints:
        """See `distdl.data.order.kinds.Order.ids`."""
        return self.at(epoch, np.arange(start, stop, dtype=np.int64))

    def _slots(self, epoch: int, positions: Ints) -> Ints:
        """Positions of an epoch shuffled within their blocks: without it, the parts would alternate strictly.

        The last block of an epoch is short, so that an epoch is a whole part of the stream.
        """
        if (epoch + 1) * self.rows > MAX_ROWS:
            raise ValueError(
                f"epoch {epoch} of {self.rows} rows lies beyond position {MAX_ROWS} of the mixture"
            )
        blocks = positions // self.block
        begins = blocks * self.block
        sizes = np.minimum(self.block, self.rows - begins)
        keys = round_keys(self.seed, "order-slots", epoch)
        return begins + permute(positions - begins, sizes, keys, blocks.astype(np.uint64))

    def _shares(self, places: Ints) -> tuple[Ints, Ints]:
        """The part that each place of the stream belongs to, and how many of that part come before it."""
        parts, turns = np.zeros_like(places), places.copy()
        groups = [(0, len(self.weights), np.arange(len(places)))]
        while groups:
            first, stop, mine = groups.pop()
            if stop - first == 1:
                parts[mine] = first
                continue
            middle = (first + stop) // 2
            share = _fraction(math.fsum(self.weights[first:middle]), math.fsum(self.weights[first:stop]))
            before = _times(turns[mine], share)
            in_first = _times(turns[mine] + 1, share) > before
            turns[mine] = np.where(in_first, before, turns[mine] - before)
            groups += [(first, middle, mine[in_first]), (middle, stop, mine[~in_first])]
        return parts, turns


def _fraction(part: float, whole: float) -> int:
    """part / whole in units of 2**-32, at least one unit to either side: no part is ever left out."""
    return min(max(round(part / whole * _UNITS), 1), _UNITS - 1)


def _times(numbers: Ints, share: int) -> Ints:
    """round(numbers * share / 2**32), exact up to 2**62: in floats, two neighbours could both gain 2."""
    high, low = numbers >> _BITS, (numbers & (_UNITS - 1)).astype(np.uint64)
    rounded = (low * np.uint64(share) + np.uint64(_UNITS // 2)) >> np.uint64(_BITS)
    total: Ints = high * share + rounded.astype(np.int64)
    return total
