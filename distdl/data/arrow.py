"""Gather rows from a prepared dataset by views on the memory map of its Arrow files.

A row of a fixed-width column is a run of bytes in the file. So the file is seen as one array of overlapping
items, one beginning at every byte, and a batch is a single indexing operation whatever record batches it
touches. `pyarrow.Table.take` is a hundred times slower: it concatenates the column first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distdl.data.info import unnest
from distdl.data.prepare import STATE_FILE, Prepared
from distdl.data.rows import Batch, check_ids
from distdl.errors import DataError, nearest

_Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Column:
    """One column over all files: what a row is, and where the rows of each record batch begin."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    row_bytes: int
    batch_offsets: _Int64
    items: tuple[npt.NDArray[np.void], ...]

    def take(self, files: _Int64, batches: _Int64, within: _Int64) -> npt.NDArray[Any]:
        """Rows `within` their record `batches` of `files` (all int64 [n]) -> [n, *shape]."""
        offsets = self.batch_offsets[batches] + within * self.row_bytes
        touched = np.unique(files)
        if len(touched) == 1:
            rows = self.items[touched[0]][offsets]
        else:
            rows = np.empty(len(offsets), dtype=f"V{self.row_bytes}")
            for file in touched:
                mine = files == file
                rows[mine] = self.items[file][offsets[mine]]
        values: npt.NDArray[Any] = rows.view(self.dtype)
        return values.reshape(len(offsets), *self.shape)


class ArrowTable:
    """Arrow stream files, memory mapped, read by row number. Implements `Rows`.

    Memory: 8 bytes per record batch and column. Safe to use from several threads.
    """

    def __init__(self, files: Sequence[Path], columns: Sequence[str] | None = None) -> None:
        """Map `files` in order; `columns` None means all. Raises DataError (see `open_split`)."""
        opened = [_open(file) for file in files]
        schema = opened[0][1]
        batches = [(n, batch) for n, (_, _, found) in enumerate(opened) for batch in found if batch.num_rows]
        self._file_of_batch = np.array([n for n, _ in batches], dtype=np.int64)
        self._starts = np.cumsum([0] + [batch.num_rows for _, batch in batches], dtype=np.int64)
        maps = [mapped for mapped, _, _ in opened]
        names = _choose(schema, columns, files[0])
        self._columns = {name: _column(schema.field(name), maps, batches, files[0]) for name in names}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def gather(self, ids: _Int64) -> Batch:
        """Rows `ids` (int64 [n], any order, repeats allowed) -> {column: [n, *row shape]}, dtypes as stored.

        The arrays are fresh, writable and C-contiguous. Raises DataError for an id outside 0 .. len - 1.
        """
        check_ids(ids, len(self))
        batches = np.searchsorted(self._starts, ids, side="right") - 1
        within, files = ids - self._starts[batches], self._file_of_batch[batches]
        return {name: column.take(files, batches, within) for name, column in self._columns.items()}


def open_split(prepared: Prepared, split: str, columns: Sequence[str] | None = None) -> ArrowTable:
    """Map one split of a prepared dataset, and only the `columns` named (None: all).

    Raises DataError for a split or column that does not exist, a column with nulls or of a type without a
    fixed width (strings, variable lists), and for files that are damaged.
    """
    folder = prepared.split_folder(split)
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        files = [folder / entry["filename"] for entry in state["_data_files"]]
        table = ArrowTable(files, columns)
    except (OSError, ValueError, TypeError, LookupError, pa.ArrowException) as error:
        raise DataError(
            f"the prepared dataset {folder} is damaged: {error}. Delete {prepared.folder}, "
            "and it is prepared again."
        ) from error
    if len(table) != prepared.info.rows[split]:
        raise DataError(
            f"the prepared dataset {folder} has {len(table)} rows, and its source "
            f"{prepared.info.rows[split]}. Delete {prepared.folder}, and it is prepared again."
        )
    return table


def _open(file: Path) -> tuple[pa.Buffer, pa.Schema, list[pa.RecordBatch]]:
    with pa.memory_map(str(file)) as mapped:
        buffer = mapped.read_buffer()
    with pa.ipc.open_stream(buffer) as reader:
        return buffer, reader.schema, list(reader)


def _choose(schema: pa.Schema, columns: Sequence[str] | None, file: Path) -> list[str]:
    for name in columns or ():
        if name not in schema.names:
            raise DataError(
                f"the dataset has no column {name!r}{nearest(name, schema.names) or '.'} "
                f"Its columns: {', '.join(schema.names)} ({file.parent})."
            )
    return list(schema.names if columns is None else columns)


def _column(
    field: pa.Field, maps: list[pa.Buffer], batches: list[tuple[int, pa.RecordBatch]], file: Path
) -> _Column:
    shape, leaf = unnest(field.type)
    if not (pa.types.is_integer(leaf) or pa.types.is_floating(leaf)) or 0 in shape:
        raise DataError(
            f"column {field.name!r} has type {field.type}; a row must be a fixed count of numbers: an "
            f"integer or a float, or fixed-size lists of them. Leave the column out, or convert it "
            f"({file.parent})."
        )
    dtype = np.dtype(leaf.to_pandas_dtype())
    row_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    offsets = [_offset(batch.column(field.name), field.name, maps[n]) for n, batch in batches]
    items = tuple(_items(mapped, row_bytes) for mapped in maps)
    return _Column(dtype, shape, row_bytes, np.array(offsets, dtype=np.int64), items)


def _offset(array: pa.Array, name: str, mapped: pa.Buffer) -> int:
    """Where in the file the values of one record batch begin, in bytes."""
    while True:
        assert array.offset == 0, "arrays read from an Arrow stream are never slices"
        if array.null_count:
            raise DataError(f"column {name!r} has {array.null_count} or more nulls; fill or drop them first")
        if not pa.types.is_fixed_size_list(array.type):
            break
        array = array.values
    values = array.buffers()[1]
    if not mapped.address <= values.address < mapped.address + mapped.size:
        raise DataError(f"column {name!r} is compressed inside the Arrow file; write it uncompressed")
    start: int = values.address - mapped.address
    return start


def _items(mapped: pa.Buffer, row_bytes: int) -> npt.NDArray[np.void]:
    """The file as overlapping items of `row_bytes`, one from every byte: no copy, no memory."""
    count = max(0, mapped.size - row_bytes + 1)
    return np.ndarray((count,), dtype=f"V{row_bytes}", buffer=mapped, strides=(1,))
