"""`Rows`: what the loader needs of a split, whatever it is stored in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from distdl.data.table.ragged import Allocate, Ragged
from distdl.errors import DataError

Batch = dict[str, npt.NDArray[Any] | Ragged]
"""Columns of gathered rows: name -> array whose first axis is the row, or `Ragged` where lengths vary."""


class Rows(Protocol):
    """The rows of one split, read by number."""

    def __len__(self) -> int: ...

    def gather(self, ids: npt.NDArray[np.int64], allocate: Allocate | None = None) -> Batch:
        """Rows `ids` (any order, repeats allowed), in that order; fresh, writable, C-contiguous arrays.

        `allocate(shape, dtype)` makes their memory (None: numpy does). Safe to call from several threads.
        Raises DataError for an id outside 0 .. len - 1.
        """
        ...


class ArrayRows:
    """Rows held in memory: the shipped stand-in for a prepared dataset, for tests and benchmarks."""

    def __init__(self, columns: Mapping[str, npt.NDArray[Any] | Ragged]) -> None:
        lengths = {name: len(array) for name, array in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns need one common length; they have {lengths}")
        self._columns = dict(columns)
        self._rows = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._rows

    @property
    def fingerprint(self) -> str:
        """A name for rows so many with such columns; what they hold does not enter."""
        return digest(self._rows, *(f"{name!r}: {kind(column)}" for name, column in self._columns.items()))

    def gather(self, ids: npt.NDArray[np.int64], allocate: Allocate | None = None) -> Batch:
        """See `Rows.gather`."""
        check_ids(ids, self._rows)
        found: Batch = {}
        for name, column in self._columns.items():
            if isinstance(column, Ragged):
                found[name] = column.take(ids)
            elif allocate is None:
                found[name] = column[ids]
            else:
                out = allocate((len(ids), *column.shape[1:]), column.dtype)
                found[name] = np.take(column, ids, axis=0, out=out, mode="clip")
        return found


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Rows start .. stop - 1 of gathered columns, as views."""
    return {
        name: column.rows(start, stop) if isinstance(column, Ragged) else column[start:stop]
        for name, column in batch.items()
    }


def row_count(batch: Batch) -> int:
    """Rows of gathered columns. Raises DataError where the columns differ, naming them."""
    counts = {name: len(column) for name, column in batch.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"the columns of a batch have different numbers of rows: {counts}")
    return next(iter(counts.values()), 0)


def close(rows: Rows) -> None:
    """End what `rows` do in the background; those that are fetched while they are read do."""
    end: Callable[[], None] | None = getattr(rows, "close", None)
    if end is not None:
        end()


def again(rows: Rows) -> Rows:
    """`rows` for one more reader, who closes what this returns; `rows` themselves stay open by that.

    Rows that have no `again` of their own are returned as they are.
    """
    make: Callable[[], Rows] | None = getattr(rows, "again", None)
    return rows if make is None else make()


def fingerprint(rows: Rows) -> str:
    """A name for what `rows` hold, as far as they know it: at least for how many they are."""
    found: str | None = getattr(rows, "fingerprint", None)
    return f"{len(rows)} rows" if found is None else found


def digest(*parts: object) -> str:
    """32 hex digits that follow from `parts`, in words."""
    return xxhash.xxh3_128_hexdigest("\n".join(map(str, parts)).encode())


def kind(column: npt.NDArray[Any] | Ragged) -> str:
    """What the rows of a column are, in words."""
    if not isinstance(column, Ragged):
        return f"{column.dtype} {list(column.shape[1:])}" if column.ndim > 1 else str(column.dtype)
    if column.text is not None:
        return "text" if column.text else "bytes"
    return f"list of {kind(column.values)}"


def check_ids(ids: npt.NDArray[np.int64], rows: int) -> None:
    """Refuse ids that are not row numbers: numpy would read a negative one from the end."""
    if ids.size and not (ids.min() >= 0 and ids.max() < rows):
        raise DataError(
            f"row ids {ids.min()} to {ids.max()} asked for; the split has {rows} rows, 0 to {rows - 1}. "
            "Was the dataset changed after the plan was made?"
        )
