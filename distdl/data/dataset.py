"""`ShardedDataset`: one split of a dataset, opened by its path or name, for any code that wants its rows."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distdl.data.info import is_url
from distdl.data.opening import Ready, open_split, ready
from distdl.data.order.kinds import Order
from distdl.data.table.arrow import ArrowTable
from distdl.data.table.memory import Int64
from distdl.data.table.ragged import Allocate, Ragged
from distdl.data.table.rows import Batch
from distdl.errors import DataError, nearest
from distdl.samples import DataInfo


class ShardedDataset:
    """The rows of one split. Implements `Rows`; the same on every rank, which maps what it reads.

    `info` says what the dataset is (rows of every split, columns, fingerprint); `split` is its name here.
    Safe to use from several threads. Pickles as its file names.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        split: str = "train",
        columns: Sequence[str] | None = None,
        *,
        cache_bytes: int | None = None,
        retry_s: float | None = None,
    ) -> None:
        """Open a prepared dataset, a `save_to_disk` folder, a folder of Parquet files, a URL, or a name.

        A path that exists is a path; what does not exist and has no separator is a name of the catalogue.
        `columns` None means all; `a` of a struct column means all its members, `a.b` one of them. What is
        behind a URL is fetched while it is read, through a cache of at most `cache_bytes` on this machine
        (None: 64 GiB); a server that is away is waited for `retry_s` seconds (None: 300). Raises DataError.
        """
        opened = _open(source, cache_bytes, retry_s)
        found = opened.split(split)
        self.info: DataInfo = opened.info
        self.split = split
        self.shard_rows: list[int] = list(found.rows)
        """Rows of each shard, in the order of the row numbers: what order `block` needs."""
        self._remote = opened.remote
        self._offset_files: dict[str, Path | None] = {**found.offsets}
        if self._remote is not None and opened.index is not None:
            self._offset_files = dict.fromkeys(opened.index.splits[split].offsets)
        self._table = open_split(opened, split, columns)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def fingerprint(self) -> str:
        """A name for the rows of this split."""
        return f"{self.info.fingerprint}/{self.split}"

    @property
    def columns(self) -> list[str]:
        """Names of the columns that are gathered."""
        return self._table.columns

    @property
    def sequence_columns(self) -> list[str]:
        """Gathered columns whose row lengths are known without reading the rows."""
        return [name for name in self.columns if name in self._offset_files]

    def look_ahead(self, order: Order, epoch: int, start: int, stop: int, *, again: bool = True) -> None:
        """See `RemoteRows.look_ahead`. Data on this machine need none."""
        if isinstance(self._table, ArrowTable):
            return
        self._table.look_ahead(order, epoch, start, stop, again=again)

    def again(self) -> ShardedDataset:
        """The same rows for one more reader, who closes it without closing this one.

        Remote data share the cache, and each reader fetches for itself; others are this very object.
        """
        if isinstance(self._table, ArrowTable):
            return self
        twin = copy.copy(self)
        twin._table = copy.copy(self._table)
        return twin

    def close(self) -> None:
        """Give up what is being fetched. Data on this machine need no closing."""
        if not isinstance(self._table, ArrowTable):
            self._table.close()

    def gather(self, ids: Int64, allocate: Allocate | None = None) -> Batch:
        """See `Rows.gather` and `ArrowTable.gather`."""
        return self._table.gather(ids, allocate)

    def slices(self, column: str, ids: Int64, begins: Int64, ends: Int64) -> Ragged:
        """See `ArrowTable.slices`."""
        return self._table.slices(column, ids, begins, ends)

    def offsets(self, column: str) -> Int64:
        """Where each row of a sequence column begins: int64 [rows + 1], mapped, so that it costs no memory.

        Raises DataError for a column without them, and for a file that is damaged.
        """
        if column not in self._offset_files:
            has = ", ".join(self._offset_files) or "none"
            raise DataError(
                f"column {column!r} has no stored offsets{nearest(column, self._offset_files) or '.'} "
                f"Columns that do: {has}. `distdl data prepare` stores them for list columns."
            )
        file = self._offset_files[column]
        if file is None:
            assert self._remote is not None, "the offsets of a local dataset are files"
            file = self._offset_files[column] = self._remote.offsets(self.split)[column]
        try:
            found: Int64 = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {file}: {error}. Prepare the dataset again.") from error
        if found.shape != (len(self) + 1,) or found.dtype != np.int64:
            raise DataError(
                f"{file} holds {found.dtype} {list(found.shape)}; expected int64 [{len(self) + 1}], one more "
                "than the split has rows. Prepare the dataset again."
            )
        return found

    def lengths(self, ids: Int64, column: str) -> Int64:
        """Lengths (int64 [n]) of rows `ids` of a sequence column, from its offsets. Raises DataError."""
        offsets = self.offsets(column)
        return np.asarray(offsets[ids + 1] - offsets[ids], dtype=np.int64)

    def __getitem__(self, which: int | slice | Sequence[int] | Int64) -> dict[str, Any] | Batch:
        """For a person: one row as {column: value}, or several, by slice or numbers, as `gather` has them.

        Negative numbers count from the end. Raises IndexError for a single row that does not exist.
        """
        if isinstance(which, slice):
            return self.gather(np.arange(*which.indices(len(self)), dtype=np.int64))
        if isinstance(which, int | np.integer):
            if not -len(self) <= which < len(self):
                raise IndexError(f"row {which} of {len(self)}")
            batch = self.gather(np.array([which % len(self)], dtype=np.int64))
            return {name: _single(column) for name, column in batch.items()}
        ids = np.asarray(which, dtype=np.int64)
        return self.gather(np.where(ids < 0, ids + len(self), ids))

    def __repr__(self) -> str:
        return (
            f"ShardedDataset({self.info.name!r}, split={self.split!r}, rows={len(self)}, "
            f"shards={len(self.shard_rows)}, columns={self.columns})"
        )


def _open(source: str | os.PathLike[str], cache_bytes: int | None, retry_s: float | None) -> Ready:
    if isinstance(source, str) and is_url(source):
        from distdl.data.stream.remote_rows import CACHE_BYTES, Access
        from distdl.data.stream.retry import RETRY_S, Patience

        patience = Patience(RETRY_S if retry_s is None else retry_s)
        return ready(None, source, Access(CACHE_BYTES if cache_bytes is None else cache_bytes, patience))
    path = Path(source).expanduser()
    is_path = path.exists() or len(path.parts) != 1 or not isinstance(source, str)
    return ready(None, path) if is_path else ready(str(source), None)


def _single(column: Any) -> Any:
    if not isinstance(column, Ragged):
        return column[0]
    if column.text is not None or isinstance(column.values, Ragged):
        return column.tolist()[0]
    return column.values
