"""Read ranges of rows out of the files a dataset is made from: Arrow streams and Parquet.

Every other format becomes one of these two before its rows are converted (see sources.py), so that a worker
needs no more than file names and row numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distdl.data.huggingface import all_class_names, read_features
from distdl.errors import DataError

Ids = npt.NDArray[np.int64]

_PARQUET_ROWS = 1024
"""Rows decoded at a time: bounds memory where a row is an encoded image of a megabyte."""


@dataclass(frozen=True)
class Piece:
    """A file of `rows` rows."""

    path: str
    format: Literal["arrow", "parquet"]
    rows: int
    groups: tuple[int, ...] = ()
    """Rows of each row group of a Parquet file, the unit in which it is decoded."""


@dataclass(frozen=True)
class Source:
    """What is to be prepared: the files of each split, in the order of their rows, all of one schema."""

    splits: dict[str, tuple[Piece, ...]]
    schema: pa.Schema

    def rows(self, split: str) -> int:
        """Rows of `split`."""
        return sum(piece.rows for piece in self.splits[split])


def source_of(splits: dict[str, list[Path]], form: Literal["arrow", "parquet"]) -> Source:
    """The `Source` of files of one format. Raises DataError for damage, no rows, or columns that differ."""
    look = arrow_summary if form == "arrow" else parquet_summary
    pieces: dict[str, tuple[Piece, ...]] = {}
    schema: pa.Schema | None = None
    first: Path | None = None
    for split, files in splits.items():
        found = []
        for file in files:
            rows, its = look(file)
            if schema is None or first is None:
                schema, first = its, file
            check_same_columns(file, its, first, schema)
            found.append(Piece(str(file), form, rows, row_groups(file) if form == "parquet" else ()))
        pieces[split] = tuple(found)
        if not sum(piece.rows for piece in found):
            raise DataError(f"split {split!r} has no rows ({', '.join(map(str, files[:3]))}); leave it out")
    assert schema is not None
    return Source(pieces, schema)


def arrow_summary(file: Path) -> tuple[int, pa.Schema]:
    """(rows, schema) of an Arrow stream file, from the heads of its record batches. Raises DataError."""
    try:
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as reader:
            return sum(batch.num_rows for batch in reader), reader.schema
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {file} as an Arrow stream: {error}. It is damaged or cut short; make it again."
        ) from error


def parquet_summary(file: Path) -> tuple[int, pa.Schema]:
    """(rows, schema) of a Parquet file, from its footer. Raises DataError."""
    try:
        with pq.ParquetFile(file) as opened:
            return opened.metadata.num_rows, opened.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {file} as Parquet: {error}. The file is damaged, cut short or not Parquet; "
            "fetch or write it again."
        ) from error


def row_groups(file: Path) -> tuple[int, ...]:
    """Rows of each row group of a Parquet file that `parquet_summary` has read."""
    with pq.ParquetFile(file) as opened:
        return tuple(opened.metadata.row_group(n).num_rows for n in range(opened.num_row_groups))


def check_same_columns(file: Path, schema: pa.Schema, first: Path, expected: pa.Schema) -> None:
    """Raises DataError where two files of a dataset have different columns, or call classes differently."""
    if not schema.equals(expected):
        raise DataError(
            f"{file.name} has columns {_columns(schema)}, and {first.name} beside it has "
            f"{_columns(expected)}; all files of a dataset need the same"
        )
    if schema.metadata == expected.metadata:
        return
    theirs, ours = read_features(schema), read_features(expected)
    for column in theirs.keys() & ours.keys():
        a, b = all_class_names(theirs[column]), all_class_names(ours[column])
        if a and b and a != b:
            raise DataError(
                f"column {column!r} has classes {_names(a)} in {file.name} and {_names(b)} in {first.name} "
                "beside it, so that a number means two things; write all files with the same classes in one "
                "order (in `datasets`, cast_column to one ClassLabel)"
            )


def _names(classes: Sequence[Sequence[str]]) -> str:
    shown = [name for names in classes for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{column.name}: {column.type}" for column in schema)


def read_ids(
    pieces: Sequence[Piece], ids: Ids | range, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Rows `ids` (ascending), a bounded number at a time. Raises DataError for damaged files."""
    if not len(ids):
        return
    if isinstance(ids, range):
        yield from _read_range(pieces, ids.start, ids.stop, columns)
        return
    at = int(ids[0])
    for batch in _read_range(pieces, at, int(ids[-1]) + 1, columns):
        lo, hi = np.searchsorted(ids, [at, at + batch.num_rows])
        if hi > lo:
            yield _rows(batch, ids[lo:hi] - at)
        at += batch.num_rows


def _rows(batch: pa.RecordBatch, ids: Ids) -> pa.RecordBatch:
    """Rows `ids` (ascending) of a batch, a slice for each run of neighbours.

    Not `take` or `filter`: of fixed-size lists in fixed-size lists (images) that are a slice of others, both
    give other rows (pyarrow 26), and the images of a split would stand beside the labels of others.
    """
    begins = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
    runs = zip(ids[begins].tolist(), np.diff(begins, append=len(ids)).tolist(), strict=True)
    table = pa.Table.from_batches([batch.slice(start, length) for start, length in runs])
    return table.combine_chunks().to_batches()[0]


def _read_range(
    pieces: Sequence[Piece], start: int, stop: int, columns: Sequence[str] | None
) -> Iterator[pa.RecordBatch]:
    at = 0
    for piece in pieces:
        lo, hi = max(start - at, 0), min(stop - at, piece.rows)
        if lo < hi:
            read = _read_arrow if piece.format == "arrow" else _read_parquet
            try:
                yield from read(piece.path, lo, hi, columns)
            except (pa.ArrowException, OSError) as error:
                # Arrow reports corrupt data as an OSError without an errno; with one, it is the disk.
                raise DataError(
                    f"{piece.path} cannot be read through: {error}. It is damaged; fetch or write it again."
                ) from error
        at += piece.rows


def _read_arrow(path: str, lo: int, hi: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(path) as mapped, pa.ipc.open_stream(mapped) as reader:
        yield from _clip(reader, lo, hi, columns)


def _read_parquet(path: str, lo: int, hi: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as opened:
        groups, skipped, at = [], 0, 0
        for number in range(opened.num_row_groups):
            rows = opened.metadata.row_group(number).num_rows
            if at + rows <= lo:
                skipped += rows
            elif at < hi:
                groups.append(number)
            at += rows
        batches = opened.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=columns, use_threads=False)
        yield from _clip(batches, lo - skipped, hi - skipped, None)


def _clip(
    batches: Iterator[pa.RecordBatch], lo: int, hi: int, columns: Sequence[str] | None
) -> Iterator[pa.RecordBatch]:
    at = 0
    for batch in batches:
        first, last = max(lo - at, 0), min(hi - at, batch.num_rows)
        if first < last:
            part = batch if columns is None else batch.select(columns)
            yield part.slice(first, last - first)
        at += batch.num_rows
        if at >= hi:
            return


def in_tables(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `rows` rows (the last one shorter), each column one chunk."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        while count + batch.num_rows >= rows:
            head = rows - count
            waiting.append(batch.slice(0, head))
            yield _joined(waiting)
            batch, waiting, count = batch.slice(head), [], 0
        if batch.num_rows:
            waiting.append(batch)
            count += batch.num_rows
    if waiting:
        yield _joined(waiting)


def _joined(batches: list[pa.RecordBatch]) -> pa.Table:
    # Metadata may differ from file to file, and Arrow would refuse to join them.
    return pa.Table.from_batches([b.replace_schema_metadata(None) for b in batches]).combine_chunks()
