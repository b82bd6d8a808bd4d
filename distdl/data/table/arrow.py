"""Gather rows from Arrow files by number, straight from their memory maps.

A file is opened when one of its rows is first asked for. What is kept of it is where its record batches lie:
no Python object for a row, and no copy but the one into the result. (`pyarrow.Table.take` is a hundred times
slower: it concatenates the column first.)
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distdl.data.table.columns import Damaged, Reader, Varying, first_null, reader, stored
from distdl.data.table.memory import Int64
from distdl.data.table.ragged import Allocate, Ragged
from distdl.data.table.rows import Batch, check_ids
from distdl.errors import DataError, nearest

_FILE_FORMAT = b"ARROW1"


class _File(NamedTuple):
    mapped: pa.Buffer
    schema: pa.Schema
    batches: list[pa.RecordBatch]


Hold = Callable[[int], AbstractContextManager[Path]]
"""File number -> where it lies on this machine, and stays inside the `with` block."""


class _Mapped(NamedTuple):
    """A file's memory map; `path` and `inode` tell whether the file is still there."""

    buffer: pa.Buffer
    path: str
    inode: int

    @property
    def gone(self) -> bool:
        """Whether the file was removed: its disk space is free once this map is."""
        try:
            return os.stat(self.path).st_ino != self.inode
        except OSError:
            return True


@dataclass(frozen=True)
class _Opened:
    """What is known of the files that are open. Replaced as a whole, so that readers need no lock.

    It has the maps that the numbers in `table` point into: whoever reads by them keeps it, and so the maps.
    """

    starts: Int64
    """The first row of each record batch, ascending."""
    table: Int64
    """[record batches, slots]: see `distdl.data.table.columns`."""
    done: npt.NDArray[np.bool_]
    """Which files are open."""
    maps: Mapping[int, _Mapped]

    def batches_of(self, ids: Int64) -> Int64:
        """The record batch of each row: int64 [n]."""
        if self._guess is None:
            return np.searchsorted(self.starts, ids, side="right") - 1
        shift, guess = self._guess
        found: Int64 = guess.take(ids >> shift, mode="clip")
        # A span of the table lies in one record batch or reaches into the next, never further.
        found += ids >= self._ends[found]
        return found

    @cached_property
    def _ends(self) -> Int64:
        return np.append(self.starts[1:], np.iinfo(np.int64).max)

    @cached_property
    def _guess(self) -> tuple[int, Int64] | None:
        """(shift, record batch at each multiple of 2**shift): three times as fast as a binary search, where
        the batches are of like size and so the table is small; None where they are not.
        """
        if len(self.starts) < 2:
            return None
        shift = int(np.diff(self.starts).min()).bit_length() - 1
        spans = (int(self.starts[-1]) >> shift) + 1
        if not self.done.all() or spans > 64 * len(self.starts):
            return None
        guess = np.searchsorted(self.starts, np.arange(spans) << shift, side="right") - 1
        return shift, guess


class ArrowTable:
    """Arrow files (stream or file format, uncompressed), read by row number. Implements `Rows`.

    Memory: 8 to 24 bytes per record batch and column of the files opened so far. Safe to use from several
    threads. Pickles as its file names, so that another process maps the same files again (but not with
    `hold`).
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        rows_per_file: Sequence[int] | None = None,
        columns: Sequence[str] | None = None,
        *,
        hold: Hold | None = None,
        keep: int = 1,
        head: int = 0,
    ) -> None:
        """`rows_per_file` is what the index says; None counts them, which opens every file at once.

        `columns`: names; `a.b` for a member of a struct, `a` for all of its members; None means all. Raises
        DataError for a column that does not exist or cannot be read, and a first file that is damaged.

        Files that come and go are opened through `hold` (`files` are then names for people). At most `keep`
        of them stay mapped, more only where one gather needs more; those used longest ago are let go first,
        and any that was removed from the disk. The columns are those of file `head`, opened now.
        """
        self._files = [os.fspath(file) for file in files]
        if not self._files:
            raise DataError("a dataset without a single Arrow file: prepare it again")
        if rows_per_file is None:
            rows_per_file = [sum(b.num_rows for b in _open(file).batches) for file in self._files]
        self._arguments = (self._files, list(rows_per_file), columns)
        self._hold, self._keep, self._head = hold, keep, self._files[head]
        self._file_starts = np.cumsum([0, *rows_per_file], dtype=np.int64)
        self.stored_schema: pa.Schema = self._map(head)[0].schema
        """Of the file the columns are taken from, as it stands there."""
        self._schema = _flat(self.stored_schema)
        self._readers: dict[str, Reader] = {}
        for name in choose(self._schema.names, columns, self._head):
            self._readers[name] = self._reader(name)
        slots = sum(r.slots for r in self._readers.values())
        self._lock = threading.Lock()
        self._uses = itertools.count()
        self._used: dict[int, int] = {}
        none = np.zeros(len(self._files), np.bool_)
        self._opened = _Opened(np.empty(0, np.int64), np.empty((0, slots), np.int64), none, {})

    def __len__(self) -> int:
        return int(self._file_starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        if self._hold is not None:
            raise TypeError("a table of files that come and go has no meaning in another process")
        return type(self), self._arguments

    @property
    def columns(self) -> list[str]:
        """Names of the columns that are gathered."""
        return list(self._readers)

    def gather(self, ids: Int64, allocate: Allocate | None = None) -> Batch:
        """Rows `ids` (int64 [n], any order, repeats allowed) in that order, dtypes as stored.

        Fixed-width columns are [n, *row shape], others `Ragged`; all are fresh, writable and C-contiguous.
        `allocate(shape, dtype)` makes their memory (None: numpy does). Raises DataError for an id outside
        0 .. len - 1, and for a file, opened now, that is damaged or not what the index says.
        """
        opened, batches, rows = self._locate(ids)
        found: Batch = {}
        name = ""
        try:
            for name, column in self._readers.items():
                found[name] = column.take(opened.table, batches, rows, allocate)
        except Damaged as error:
            raise self._damaged(name, ids) from error
        return found

    def slices(self, column: str, ids: Int64, begins: Int64, ends: Int64) -> Ragged:
        """Items begins[i] .. ends[i] - 1 of row ids[i] of a sequence column; nothing else is read.

        All arguments are int64 [n]. Raises DataError for a column without lengths or an end beyond its row.
        """
        found = self._readers[choose(self.columns, [column], self._head)[0]]
        if not isinstance(found, Varying):
            raise DataError(f"column {column!r} has rows of one size; expected a sequence column")
        opened, batches, rows = self._locate(ids)
        try:
            starts, lengths = found.bounds(opened.table, batches, rows)
            if ((begins < 0) | (begins > ends) | (ends > lengths)).any():
                raise DataError(f"column {column!r} was asked for items outside its rows")
            values = found.child.spans(opened.table, batches, starts + begins, ends - begins, None)
        except Damaged as error:
            raise self._damaged(column, ids) from error
        return Ragged(values, ends - begins, found.text)

    def _locate(self, ids: Int64) -> tuple[_Opened, Int64, Int64]:
        """(what is open, record batch of each id, row within it); opens the files that this needs."""
        ids = np.asarray(ids, dtype=np.int64)
        check_ids(ids, len(self))
        opened = self._opened
        if self._hold is not None or not opened.done.all():
            files = np.searchsorted(self._file_starts, ids, side="right") - 1
            if self._hold is not None:
                files = np.unique(files)
                self._used.update((file, next(self._uses)) for file in files.tolist())
            if not opened.done[files].all():
                opened = self._open(np.unique(files))
        batches = opened.batches_of(ids)
        return opened, batches, ids - opened.starts[batches]

    def _open(self, files: Int64) -> _Opened:
        with self._lock:
            opened = self._opened
            starts, rows, done, maps = [], [], opened.done.copy(), dict(opened.maps)
            for number in files[~done[files]].tolist():
                file, maps[number] = self._map(number)
                for start, noted in self._note(number, file):
                    starts.append(start)
                    rows.append(noted)
                done[number] = True
            if starts:
                where = np.searchsorted(opened.starts, starts)
                table = np.insert(
                    opened.table, where, np.array(rows, np.int64).reshape(len(rows), -1), axis=0
                )
                opened = _Opened(np.insert(opened.starts, where, starts), table, done, maps)
            if self._hold is not None:
                opened = self._without(opened, self._dispensable(opened, files))
            self._opened = opened
            return opened

    def _map(self, number: int) -> tuple[_File, _Mapped]:
        if self._hold is None:
            name = self._files[number]
            file = _open(name)
            return file, _Mapped(file.mapped, name, 0)
        with self._hold(number) as path:
            file = _open(str(path), self._files[number])
            return file, _Mapped(file.mapped, str(path), path.stat().st_ino)

    def _dispensable(self, opened: _Opened, needed: Int64) -> list[int]:
        """Files to let go of now that `needed` are open."""
        others = sorted(set(opened.maps) - set(needed.tolist()), key=lambda n: self._used.get(n, -1))
        surplus = max(0, len(opened.maps) - self._keep)
        return others[:surplus] + [n for n in others[surplus:] if opened.maps[n].gone]

    def _without(self, opened: _Opened, files: list[int]) -> _Opened:
        """What stays known. The maps end when the last gather that uses them does."""
        if not files:
            return opened
        kept, done = np.ones(len(opened.starts), np.bool_), opened.done.copy()
        done[files] = False
        for number in files:
            first, last = np.searchsorted(opened.starts, self._file_starts[number : number + 2])
            kept[first:last] = False
        maps = {number: mapped for number, mapped in opened.maps.items() if done[number]}
        return _Opened(opened.starts[kept], opened.table[kept], done, maps)

    def _note(self, number: int, file: _File) -> Iterable[tuple[int, list[int]]]:
        """(first row, numbers of all columns) of each record batch of a file."""
        start = int(self._file_starts[number])
        self._check(number, _flat(file.schema), sum(batch.num_rows for batch in file.batches))
        found = []
        for batch in file.batches:
            if batch.num_rows:
                columns = _flat_columns(batch)
                noted = [
                    n
                    for name in self._readers
                    for n in self._numbers(name, columns[name], file.mapped, number, start)
                ]
                found.append((start, noted))
                start += batch.num_rows
        return found

    def _numbers(self, name: str, array: pa.Array, mapped: pa.Buffer, number: int, start: int) -> list[int]:
        file = self._files[number]
        try:
            array.validate()
        except pa.ArrowException as error:
            raise _unreadable(file, error) from error
        null = first_null(array)
        if null is not None:
            raise DataError(
                f"column {name!r} has a null in row {start + null} ({file}, row "
                f"{start + null - int(self._file_starts[number])}); fill it or drop the row when you prepare "
                "the data, or leave the column out (columns=..., data.columns)"
            )
        try:
            return self._readers[name].note(array, mapped)
        except ValueError as error:
            raise DataError(f"column {name!r} of {file}: {error}") from error

    def _check(self, number: int, schema: pa.Schema, rows: int) -> None:
        file, expected = self._files[number], int(np.diff(self._file_starts)[number])
        if rows != expected:
            raise DataError(
                f"{file} has {rows} rows, and the index says {expected}: the index disagrees with "
                "its shards. Prepare the dataset again, or copy it whole."
            )
        for name in self._readers:
            found = schema.field(name).type if name in schema.names else "missing"
            if found != self._schema.field(name).type:
                raise DataError(
                    f"column {name!r} is {found} in {file} and {self._schema.field(name).type} in "
                    f"{self._head}; all files of a split need the same columns"
                )

    def _reader(self, name: str) -> Reader:
        kind = self._schema.field(name).type
        try:
            return reader(kind, sum(r.slots for r in self._readers.values()))
        except ValueError as error:
            raise DataError(
                f"column {name!r} has {error}, which cannot be gathered: numbers, booleans, strings, bytes, "
                f"and lists of them can. Leave it out (columns=...) or convert it ({self._head})."
            ) from error

    def _damaged(self, name: str, ids: Int64) -> DataError:
        touched = np.unique(np.searchsorted(self._file_starts, ids, side="right") - 1)
        files = ", ".join(self._files[n] for n in touched[:4].tolist())
        return DataError(
            f"column {name!r}: the lists' offsets point outside the values, so a file is damaged; one of "
            f"{files}. `distdl data verify` finds it; copy or prepare it again."
        )


def choose(names: Sequence[str], columns: Sequence[str] | None, where: str) -> list[str]:
    """The columns asked for, in that order. Raises DataError for one that does not exist, or no column."""
    if columns is None:
        return list(names)
    chosen: list[str] = []
    for column in columns:
        found = [n for n in names if n == column or n.startswith(f"{column}.")]
        if not found:
            raise DataError(
                f"the dataset has no column {column!r}{nearest(column, names) or '.'} "
                f"Its columns: {', '.join(names)} ({where})."
            )
        chosen += [n for n in found if n not in chosen]
    return chosen


def _open(file: str, title: str = "") -> _File:
    try:
        with pa.memory_map(file) as mapped:
            buffer = mapped.read_buffer()
        if bytes(buffer[: len(_FILE_FORMAT)]) == _FILE_FORMAT:
            with pa.ipc.open_file(buffer) as whole:
                batches = [whole.get_batch(n) for n in range(whole.num_record_batches)]
                return _File(buffer, whole.schema, batches)
        with pa.ipc.open_stream(buffer) as stream:
            return _File(buffer, stream.schema, list(stream))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(title or file, error) from error


def _unreadable(file: str, error: Exception) -> DataError:
    return DataError(
        f"cannot read {file} as Arrow: {error}. The file is missing, damaged or cut short; copy or prepare "
        "it again."
    )


def _flat(schema: pa.Schema) -> pa.Schema:
    """The schema with the members of structs, to any depth, as columns `a.b`."""
    fields = list(schema)
    while any(pa.types.is_struct(f.type) for f in fields):
        fields = [part for f in fields for part in (f.flatten() if pa.types.is_struct(f.type) else [f])]
    return pa.schema(fields)


def _flat_columns(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    while any(pa.types.is_struct(array.type) for array in columns.values()):
        flat = {}
        for name, array in columns.items():
            if pa.types.is_struct(array.type):
                # `flatten` carries the nulls of the struct over to its members.
                members = (array.type.field(i).name for i in range(array.type.num_fields))
                flat.update({f"{name}.{m}": a for m, a in zip(members, array.flatten(), strict=True)})
            else:
                flat[name] = array
        columns = flat
    return {name: stored(array) for name, array in columns.items()}
