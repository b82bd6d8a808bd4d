"""Orders that work a window at a time: `Block` for shards that are far away, `LengthBucketed` for sequences.

Both are pure functions of (seed, epoch, position), like every order. What they
keep is only the last windows, computed again wherever they are missing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from distdl.data.order.permutation import Ints, check_positions, check_rows, permute, round_keys
from distdl.errors import DataError
from distdl.keys import key

WINDOW = 10_000
"""Positions that `block` shuffles together where nothing else is said; in recipes, too."""

WINDOW_BATCHES = 200
"""Batches that `length_bucketed` sorts together where nothing else is said."""

T = TypeVar("T")


class Recent(Generic[T]):
    """What was computed last, by name; for several threads. Pickles empty."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        # Made without the lock: two threads may do the same work, and neither waits for another window.
        made = make()
        with self._lock:
            self._kept[name] = made
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        return made

    def __reduce__(self) -> tuple[type[Recent[T]], tuple[int]]:
        return Recent, (self._keep,)


@dataclass(frozen=True, eq=False)
class Block:
    """Shards one after another in another order each epoch, and windows of positions shuffled over them.

    A window of W positions touches the few shards that its W rows lie in, so these can be fetched before, and
    dropped after. `shard_rows` are the rows of each shard, in the order of the ids; empty ones are allowed.
    Memory: 16 bytes a shard, and as much for each of two epochs. Raises DataError for a negative shard or a
    window below 1.
    """

    seed: int
    shard_rows: Sequence[int] | Ints
    window: int = WINDOW
    rows: int = field(init=False)
    _sizes: Ints = field(init=False, repr=False)
    _firsts: Ints = field(init=False, repr=False)
    _epochs: Recent[tuple[Ints, Ints]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = np.array(self.shard_rows, dtype=np.int64)
        if sizes.ndim != 1 or (sizes < 0).any():
            raise DataError(f"shard_rows is {self.shard_rows}; expected a list of row counts, 0 or more each")
        if self.window < 1:
            raise DataError(f"the window of order block is {self.window}; expected 1 position or more")
        ends = np.cumsum(sizes)
        object.__setattr__(self, "rows", int(ends[-1]) if len(ends) else 0)
        object.__setattr__(self, "_sizes", sizes)
        object.__setattr__(self, "_firsts", ends - sizes)
        object.__setattr__(self, "_epochs", Recent(2))
        check_rows(self.rows)

    def at(self, epoch: int, positions: Ints) -> Ints:
        """See `distdl.data.order.kinds.Order.at`."""
        shards, within = self._places(epoch, positions)
        return self._firsts[shards] + within

    def ids(self, epoch: int, start: int, stop: int) -> Ints:
        """See `distdl.data.order.kinds.Order.ids`."""
        return self.at(epoch, np.arange(start, stop, dtype=np.int64))

    def shards(self, epoch: int, start: int, stop: int) -> list[int]:
        """The shards that positions `start` .. `stop` - 1 of `epoch` touch, in order of first use."""
        shards, _ = self._places(epoch, np.arange(start, stop, dtype=np.int64))
        touched, first_use = np.unique(shards, return_index=True)
        found: list[int] = touched[np.argsort(first_use)].tolist()
        return found

    def coming(self, epoch: int, start: int, stop: int, more: int) -> list[int]:
        """The shards of the windows of positions `start` .. `stop` - 1, and those to fetch meanwhile.

        These are the shards of the next window, `more` or more of them while the epoch has as many. In the
        order of the epoch; a few microseconds, whatever the window.
        """
        shards, starts = self._epochs.get(epoch, lambda: self._epoch(epoch))
        begin = start // self.window * self.window
        end = min((max(stop - 1, start) // self.window + 1) * self.window, self.rows)
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        now = int(np.searchsorted(starts, end, side="left"))
        after = int(np.searchsorted(starts, min(end + self.window, self.rows), side="left"))
        found: list[int] = shards[max(first, 0) : max(after, now + more)].tolist()
        return found

    def _places(self, epoch: int, positions: Ints) -> tuple[Ints, Ints]:
        """Shard, and row in it, of each position."""
        check_positions(positions, self.rows)
        windows = positions // self.window
        begins = windows * self.window
        keys = round_keys(self.seed, "order-window", epoch)
        sizes = np.minimum(self.window, self.rows - begins)
        places = begins + permute(positions - begins, sizes, keys, windows.astype(np.uint64))
        shards, starts = self._epochs.get(epoch, lambda: self._epoch(epoch))
        # The right-hand side steps over empty shards: they begin where the next one does.
        nth = np.searchsorted(starts, places, side="right") - 1
        return shards[nth], places - starts[nth]

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """The shards in the order of `epoch`, and the place in its stream where each begins."""
        count = len(self._sizes)
        keys = round_keys(self.seed, "order-shards", epoch)
        shards = permute(np.arange(count, dtype=np.int64), count, keys)
        sizes = self._sizes[shards]
        return shards, np.cumsum(sizes) - sizes


@dataclass(frozen=True, eq=False)
class LengthBucketed:
    """Batches of rows of like length: `Full`, sorted by length a window at a time, batches then shuffled.

    A window is `window_batches` batches of `batch` (the global batch). Within a batch the rows stay sorted,
    so its microbatches are tight too. The short batch of an epoch comes last, and is cut out of its window
    at a random length: at the long end, it would be the longest rows that `drop_last` never shows. Without
    `shuffle` the base order is sequential and each window runs from short to long.

    `offsets` (int64 [rows + 1], best a memory map) says where each row begins; only the entries of a window's
    rows are read. Memory: 8 bytes a position for each of two windows. Raises DataError.
    """

    seed: int
    offsets: Ints
    batch: int
    window_batches: int = WINDOW_BATCHES
    shuffle: bool = True
    rows: int = field(init=False)
    _windows: Recent[Ints] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # A plain view: indexing a memmap wraps each result in another memmap.
        offsets = np.asarray(self.offsets)
        if offsets.ndim != 1 or offsets.dtype != np.int64 or not len(offsets):
            raise DataError(
                f"offsets are {offsets.dtype} {list(offsets.shape)}; "
                "order length_bucketed needs int64 [rows + 1]"
            )
        for name in ("batch", "window_batches"):
            if getattr(self, name) < 1:
                raise DataError(
                    f"{name} of order length_bucketed is {getattr(self, name)}; expected 1 or more"
                )
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "rows", len(offsets) - 1)
        object.__setattr__(self, "_windows", Recent(2))
        check_rows(self.rows)

    def at(self, epoch: int, positions: Ints) -> Ints:
        """See `distdl.data.order.kinds.Order.at`."""
        check_positions(positions, self.rows)
        size = self.window_batches * self.batch
        windows = positions // size
        ids = np.empty_like(positions)
        for window in np.unique(windows).tolist():
            mine = windows == window
            ids[mine] = self._window(epoch, window)[positions[mine] - window * size]
        return ids

    def ids(self, epoch: int, start: int, stop: int) -> Ints:
        """See `distdl.data.order.kinds.Order.ids`."""
        return self.at(epoch, np.arange(start, stop, dtype=np.int64))

    def _window(self, epoch: int, window: int) -> Ints:
        return self._windows.get((epoch, window), lambda: self._sorted(epoch, window))

    def _sorted(self, epoch: int, window: int) -> Ints:
        """The ids of one window, in the order in which they are visited."""
        start = window * self.window_batches * self.batch
        stop = min(start + self.window_batches * self.batch, self.rows)
        ids = np.arange(start, stop, dtype=np.int64)
        if self.shuffle:
            ids = permute(ids, self.rows, round_keys(self.seed, "order", epoch))
        lengths = self.offsets[ids + 1] - self.offsets[ids]
        ids = ids[np.argsort(lengths, kind="stable")]
        return ids[self._batches(epoch, window, len(ids))] if self.shuffle else ids

    def _batches(self, epoch: int, window: int, rows: int) -> Ints:
        """Places in a sorted window of `rows`: its batches in a random order, the short one last."""
        whole, short = divmod(rows, self.batch)
        gap = key(self.seed, "order-short", epoch, window) % (whole + 1)
        keys = round_keys(self.seed, "order-batches", epoch)
        shuffled = permute(np.arange(whole, dtype=np.int64), whole, keys, window)
        begins = shuffled * self.batch + short * (shuffled >= gap)
        batches = begins[:, None] + np.arange(self.batch, dtype=np.int64)
        return np.concatenate([batches.ravel(), gap * self.batch + np.arange(short, dtype=np.int64)])
