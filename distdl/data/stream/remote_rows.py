"""`RemoteRows`: the rows of a split whose shards are fetched while it is read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distdl.data.order.kinds import Block, Order, Sequential
from distdl.data.stream.fetcher import Fetcher
from distdl.data.stream.remote_dataset import RemoteDataset
from distdl.data.stream.retry import Patience, scrub
from distdl.data.stream.shard_cache import ShardCache
from distdl.data.table.arrow import ArrowTable, choose
from distdl.data.table.memory import Int64
from distdl.data.table.ragged import Allocate, Ragged
from distdl.data.table.rows import Batch, check_ids

CACHE_BYTES = 64 * 2**30
_AHEAD = 2
"""Shards beyond those of the rows that are read now, or of the next window."""
_QUEUED = 4
"""Shards that wait to be fetched between two calls of `look_ahead`; two are fetched at a time."""
_MOST_MAPS = 1024
"""The kernel allows a process about 65,000 maps."""


@dataclass(frozen=True)
class Access:
    """How remote data are read: the bound of the cache on this machine, and how long a server may be gone."""

    cache_bytes: int = CACHE_BYTES
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Remote:
    """A remote dataset, and how it is read."""

    dataset: RemoteDataset
    access: Access

    @classmethod
    def open(cls, url: str, access: Access | None = None) -> Remote:
        """Read its index, or its footers. Raises as `RemoteDataset.open`."""
        access = access or Access()
        return cls(RemoteDataset.open(url, patience=access.patience), access)

    @property
    def cache(self) -> ShardCache:
        """The dataset's cache on this machine; not made yet."""
        return self.dataset.cache(self.access.cache_bytes, patience=self.access.patience)

    def rows(self, split: str, columns: Sequence[str] | None = None) -> RemoteRows:
        """The rows of a split; fetches nothing yet. Raises DataError for a split or column not there."""
        return RemoteRows(self.dataset, split, self.cache, columns)

    def offsets(self, split: str) -> dict[str, Path]:
        """See `RemoteDataset.offsets`."""
        return self.dataset.offsets(split, self.cache)


class RemoteRows:
    """Rows read through a cache of shards. Implements `Rows`; safe to use from several threads.

    `gather` blocks while a shard that it needs is on its way, and raises as `ShardCache.fetch`. What comes
    after is fetched meanwhile: rows gathered in stored order are followed, and for any other order somebody
    calls `look_ahead`. Pickles as its arguments; `close` it when done.
    """

    def __init__(
        self,
        dataset: RemoteDataset,
        split: str,
        cache: ShardCache,
        columns: Sequence[str] | None = None,
    ) -> None:
        """Raises DataError for a split or column that does not exist. Fetches nothing yet."""
        self._arguments = (dataset, split, cache, columns)
        self._shards = dataset.shards(split)
        self._cache, self._chosen = cache, columns
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)], dtype=np.int64)
        self._columns = choose(list(dataset.info.fields), columns, scrub(dataset.url))
        self._fetcher = Fetcher(cache, self._shards, _QUEUED)
        self._lock = threading.Lock()
        self._table: ArrowTable | None = None
        self._led = False

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    @property
    def columns(self) -> list[str]:
        """Names of the columns that are gathered."""
        return self._columns if self._table is None else self._table.columns

    def gather(self, ids: Int64, allocate: Allocate | None = None) -> Batch:
        """See `Rows.gather`."""
        return self._touch(ids).gather(ids, allocate)

    def slices(self, column: str, ids: Int64, begins: Int64, ends: Int64) -> Ragged:
        """See `ArrowTable.slices`."""
        return self._touch(ids).slices(column, ids, begins, ends)

    def look_ahead(self, order: Order, epoch: int, start: int, stop: int, *, again: bool = True) -> None:
        """Begin to fetch what positions `start` .. `stop` - 1 of `epoch` need, and then what comes after.

        Call it before those are gathered; returns at once. `again`: another epoch follows. Does nothing for
        an order that visits rows everywhere.
        """
        led, self._led = self._led, True
        if isinstance(order, Sequential):
            self._follow(start, stop, again)
        if not isinstance(order, Block):
            return
        if not led:
            self._check_room(order)
        coming = order.coming(epoch, start, stop, _AHEAD)
        if again and stop + order.window >= order.rows:
            coming += order.coming(epoch + 1, 0, 1, 0)
        self._fetcher.want(coming)

    def close(self) -> None:
        """Give up what is being fetched. What waits for it ends with Stopped."""
        self._fetcher.close()

    def _touch(self, ids: Int64) -> ArrowTable:
        check_ids(ids, len(self))
        if not self._led and len(ids) > 1 and ids[-1] - ids[0] + 1 == len(ids):
            self._follow(int(ids[0]), int(ids[-1]) + 1)
        return self._table or self._make_table(int(ids[0]) if len(ids) else 0)

    def _make_table(self, row: int) -> ArrowTable:
        """The table's columns are those of the first shard that is needed: no other is fetched for them."""
        with self._lock:
            if self._table is None:
                largest = max(shard.local_bytes for shard in self._shards)
                self._table = ArrowTable(
                    [scrub(shard.url) for shard in self._shards],
                    [shard.rows for shard in self._shards],
                    self._chosen,
                    hold=self._fetcher.hold,
                    keep=min(max(self._cache.max_bytes // max(largest, 1), 1), _MOST_MAPS),
                    head=int(np.searchsorted(self._starts, row, side="right")) - 1,
                )
            return self._table

    def _follow(self, start: int, stop: int, again: bool = False) -> None:
        first, last = np.searchsorted(self._starts, [start, max(stop - 1, start)], side="right") - 1
        coming = list(range(int(first), min(int(last) + 1 + _AHEAD, len(self._shards))))
        if again and coming and coming[-1] == len(self._shards) - 1:
            coming.append(0)
        self._fetcher.want(coming)

    def _check_room(self, order: Block) -> None:
        """Say so where a window does not fit the cache: it would work, and fetch everything many times."""
        total = sum(shard.needs for shard in self._shards)
        touched = min(order.window / (len(self) / len(self._shards)) + 1, len(self._shards))
        needed = int(touched * total / len(self._shards))
        if needed > self._cache.max_bytes:
            self._cache.patience.notice(
                f"a window of {order.window} rows (data.block_window) lies in about {touched:.0f} shards of "
                f"{needed} bytes together, and the cache holds {self._cache.max_bytes} "
                "(hardware.cache_bytes): shards will be fetched again and again. Raise the one, or lower the "
                "other."
            )
