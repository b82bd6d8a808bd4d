"""`Order`: (seed, epoch, position) -> sample id, with random access.

Each kind is a pure function: no state that a result depends on, the same on every rank, thread, machine and
version of numpy. So the place in the data is one integer, whatever the number of processes, and any process
can ask for any position. Which kind suits which data is in docs/order.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from distdl.data.order.mixture import Weighted
from distdl.data.order.permutation import MAX_ROWS, Ints, check_positions, check_rows, permute, round_keys
from distdl.data.order.windows import WINDOW, WINDOW_BATCHES, Block, LengthBucketed
from distdl.errors import DataError, nearest

__all__ = [
    "KINDS",
    "MAX_ROWS",
    "Block",
    "Full",
    "Lanes",
    "LengthBucketed",
    "Order",
    "Sequential",
    "Weighted",
    "make_order",
]


class Order(Protocol):
    """The order in which the samples of a dataset are visited. Safe to call from several threads."""

    @property
    def rows(self) -> int:
        """Positions in an epoch."""
        ...

    def at(self, epoch: int, positions: Ints) -> Ints:
        """Sample ids (int64 [n]) at any positions (int64 [n]) of `epoch`.

        Raises ValueError for a position outside 0 .. rows - 1.
        """
        ...

    def ids(self, epoch: int, start: int, stop: int) -> Ints:
        """Sample ids (int64 [stop - start]) at positions `start` .. `stop` - 1 of `epoch`."""
        ...


@dataclass(frozen=True)
class Sequential:
    """Every epoch is 0, 1, 2, ..."""

    rows: int

    def __post_init__(self) -> None:
        check_rows(self.rows)

    def at(self, epoch: int, positions: Ints) -> Ints:
        """See `Order.at`."""
        check_positions(positions, self.rows)
        return positions.copy()

    def ids(self, epoch: int, start: int, stop: int) -> Ints:
        """See `Order.ids`."""
        return self.at(epoch, np.arange(start, stop, dtype=np.int64))


@dataclass(frozen=True)
class Full:
    """Any sample at any position: a permutation of all rows for each epoch, in constant memory."""

    seed: int
    rows: int

    def __post_init__(self) -> None:
        check_rows(self.rows)

    def at(self, epoch: int, positions: Ints) -> Ints:
        """See `Order.at`."""
        check_positions(positions, self.rows)
        return permute(positions, self.rows, round_keys(self.seed, "order", epoch))

    def ids(self, epoch: int, start: int, stop: int) -> Ints:
        """See `Order.ids`."""
        return self.at(epoch, np.arange(start, stop, dtype=np.int64))


@dataclass(frozen=True)
class Lanes:
    """`lanes` readers side by side, each of which reads a part of the rows of its own from first to last.

    Position s * lanes + b is row b * steps + s, with steps = all_rows // lanes: sample b of a batch goes on
    where sample b of the batch before stopped. The last all_rows % lanes rows are left out. Every epoch is
    the same.
    """

    all_rows: int
    lanes: int

    def __post_init__(self) -> None:
        check_rows(self.all_rows)
        if self.lanes < 1:
            raise DataError(f"order lanes with {self.lanes} lanes; expected 1 or more")

    @property
    def rows(self) -> int:
        """See `Order.rows`."""
        return self.all_rows // self.lanes * self.lanes

    def at(self, epoch: int, positions: Ints) -> Ints:
        """See `Order.at`."""
        check_positions(positions, self.rows)
        steps, lanes = np.divmod(positions, self.lanes)
        found: Ints = lanes * (self.all_rows // self.lanes) + steps
        return found

    def ids(self, epoch: int, start: int, stop: int) -> Ints:
        """See `Order.ids`."""
        return self.at(epoch, np.arange(start, stop, dtype=np.int64))


KINDS = ("full", "block", "sequential", "length_bucketed", "weighted", "lanes")


def make_order(
    kind: str,
    *,
    seed: int,
    rows: int,
    batch: int | None = None,
    shard_rows: Sequence[int] | Ints | None = None,
    offsets: Ints | None = None,
    window: int | None = None,
    window_batches: int = WINDOW_BATCHES,
    shuffle: bool = True,
    parts: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    epoch_rows: int | None = None,
) -> Order:
    """The order called `kind` over `rows` samples; what a kind does not use is ignored.

    `block` needs `shard_rows`; `length_bucketed` `offsets` and `batch`; `lanes` `batch`, which is how many;
    `weighted` `parts` (rows of each dataset) and `weights`. Without `shuffle`, `full` and `block` are
    `sequential`. Raises DataError for an unknown kind, for what a kind lacks, and for rows that do not add
    up.
    """
    if kind not in KINDS:
        raise DataError(_unknown(kind))
    if kind == "weighted":
        return _weighted(seed, rows, shuffle, parts, weights, epoch_rows)
    if kind == "length_bucketed":
        return _length_bucketed(seed, rows, batch, offsets, window_batches, shuffle)
    if kind == "lanes":
        return Lanes(rows, _given(batch, kind))
    if kind == "sequential" or not shuffle:
        return Sequential(rows)
    if kind == "full":
        return Full(seed, rows)
    if shard_rows is None:
        raise DataError("order block needs the rows of each shard; these data have none. Use order full.")
    block = Block(seed, shard_rows, WINDOW if window is None else window)
    _check_sum("the shards", block.rows, rows)
    return block


def _unknown(kind: str) -> str:
    if kind == "packed":
        return (
            "packed is not an order but a view of the rows: wrap them in distdl.data.Packed, and give what "
            "comes out order full or block"
        )
    return f"there is no order {kind!r}{nearest(kind, KINDS) or '.'} Orders: {', '.join(KINDS)}."


def _length_bucketed(
    seed: int, rows: int, batch: int | None, offsets: Ints | None, window_batches: int, shuffle: bool
) -> Order:
    if offsets is None:
        raise DataError(
            "order length_bucketed needs a sequence column, whose lengths it sorts by; these data have none, "
            "or were not prepared. Use order full, or prepare them with `distdl data prepare`."
        )
    order = LengthBucketed(seed, offsets, _given(batch, "length_bucketed"), window_batches, shuffle)
    _check_sum("the offsets of the sequence column", order.rows, rows)
    return order


def _given(batch: int | None, kind: str) -> int:
    if batch is None:
        raise DataError(f"order {kind} needs the size of a batch; none was given")
    return batch


def _weighted(
    seed: int,
    rows: int,
    shuffle: bool,
    parts: Sequence[int] | None,
    weights: Sequence[float] | None,
    epoch_rows: int | None,
) -> Order:
    if parts is None or weights is None:
        raise DataError(
            "order weighted needs several datasets and a weight for each; use order full for one dataset"
        )
    if not shuffle:
        raise DataError("order weighted always shuffles; use order sequential, or leave out `shuffle: false`")
    _check_sum("the datasets of the mixture", sum(parts), rows)
    return Weighted(seed, parts, weights, epoch_rows)


def _check_sum(what: str, found: int, rows: int) -> None:
    if found != rows:
        raise DataError(f"{what} have {found} rows, and the data {rows}: prepare the data again")
