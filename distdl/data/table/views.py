"""Rows made of other rows: several datasets end to end, and documents packed into rows of one length."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from distdl.data.table.memory import allocate_plain
from distdl.data.table.ragged import Allocate, Ragged, span_index
from distdl.data.table.rows import Batch, Rows, again, check_ids, close, digest, fingerprint, kind
from distdl.errors import DataError, nearest

Ints = npt.NDArray[np.int64]


@runtime_checkable
class Sliceable(Protocol):
    """Rows that can hand out a part of a long row without reading the rest, as `ArrowTable` does."""

    def slices(self, column: str, ids: Ints, begins: Ints, ends: Ints) -> Ragged:
        """Items begins[i] .. ends[i] - 1 of row ids[i] (all int64 [n]) of a sequence column."""
        ...


class Concatenated:
    """Several datasets as one: the rows of the first, then those of the second, ... Implements `Rows`."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        """Raises DataError where the parts differ in the names, dtypes or row shapes of their columns."""
        if not parts:
            raise DataError("a dataset of no parts; give one or more")
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        expected = _columns(parts[0])
        for number, part in enumerate(self._parts):
            _check_same(expected, _columns(part), number)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def part_rows(self) -> list[int]:
        """Rows of each part, as order `weighted` needs them."""
        return [len(part) for part in self._parts]

    @property
    def fingerprint(self) -> str:
        """A name for the rows, from those of the parts, in their order."""
        return digest("concatenated", *map(fingerprint, self._parts), *self.part_rows)

    def again(self) -> Concatenated:
        """See `distdl.data.table.rows.again`."""
        twin = copy.copy(self)
        twin._parts = [again(part) for part in self._parts]
        return twin

    def close(self) -> None:
        """Close the parts that need it (`distdl.data.table.rows.close`)."""
        for part in self._parts:
            close(part)

    def gather(self, ids: Ints, allocate: Allocate | None = None) -> Batch:
        """See `Rows.gather`. One gather in each part that `ids` touch."""
        check_ids(ids, len(self))
        owners = np.searchsorted(self._ends, ids, side="right")
        touched = np.unique(owners).tolist() or [0]
        places, found = [], []
        for part in touched:
            mine = np.flatnonzero(owners == part)
            start = self._ends[part] - len(self._parts[part])
            places.append(mine)
            found.append(
                _gather(self._parts[part], ids[mine] - start, allocate if len(touched) == 1 else None)
            )
        if len(touched) == 1:
            return found[0]
        place = np.concatenate(places)
        return {name: _merge([batch[name] for batch in found], place, allocate) for name in found[0]}


class Packed:
    """Documents laid end to end in stored order, cut into rows of one length. Implements `Rows`.

    Row r holds tokens r * length .. r * length + length: `length` inputs, and the target of each, one token
    further on. Neighbours share a token, so every token but the very first is a target exactly once. Columns:

    - `column`: [n, length + 1], dtype as stored;
    - `column_count`: int64 [n], the targets in the row: `length`, or fewer in the last, which zeros fill up;
    - `column_segments`: int32 [n, length + 1], which document of the row a token is of, from 1; 0 where
      filled. Attention and state can stop where it changes, and a loss leave out what begins a document.

    Memory: none that grows with the rows. Reads the tokens asked for and no others where `rows` can
    (`Sliceable`), and otherwise the documents that they lie in.
    """

    def __init__(self, rows: Rows, column: str, offsets: Ints, length: int) -> None:
        """`offsets` (int64 [documents + 1], best a memory map) says where each document begins. DataError."""
        if length < 1:
            raise DataError(f"the length of packed rows is {length}; expected 1 token or more")
        # A plain view: indexing a memmap wraps each result in another memmap.
        self._offsets = np.asarray(offsets)
        if self._offsets.dtype != np.int64 or self._offsets.shape != (len(rows) + 1,):
            raise DataError(
                f"offsets are {self._offsets.dtype} {list(self._offsets.shape)}; {len(rows)} documents need "
                f"int64 [{len(rows) + 1}]: the index disagrees with its shards, prepare the dataset again"
            )
        found = _columns(rows)
        if column not in found:
            raise DataError(
                f"the dataset has no column {column!r}{nearest(column, found) or '.'} "
                f"Its columns: {', '.join(found)}."
            )
        if not found[column].startswith("list of ") or "list" in found[column][len("list of ") :]:
            raise DataError(
                f"column {column!r} is {found[column]}; packing needs one list of tokens a row. "
                "Prepare the dataset with `--tokenize`."
            )
        self._rows, self._column, self._length = rows, column, length
        self._total = int(self._offsets[-1])

    def __len__(self) -> int:
        return max(0, -(-(self._total - 1) // self._length))

    def gather(self, ids: Ints, allocate: Allocate | None = None) -> Batch:
        """See `Rows.gather`; the columns are those of the class."""
        check_ids(ids, len(self))
        starts = ids * self._length
        tokens = np.minimum(self._length + 1, self._total - starts)
        spans = self._spans(starts, starts + tokens)
        values = self._tokens(spans)
        shape = (len(ids), self._length + 1)
        filled = np.arange(self._length + 1) < tokens[:, None]
        out = (allocate or allocate_plain)(shape, values.dtype)
        segments = (allocate or allocate_plain)(shape, np.dtype(np.int32))
        out[~filled] = 0
        segments[~filled] = 0
        out[filled] = values
        segments[filled] = np.repeat(spans.segments, spans.ends - spans.begins)
        return {
            self._column: out,
            f"{self._column}_count": tokens - 1,
            f"{self._column}_segments": segments,
        }

    @property
    def shard_rows(self) -> list[int] | None:
        """Packed rows that begin in each shard, which is what order `block` needs; None where the rows that
        hold the documents do not know their shards (as `ShardedDataset.shard_rows` does).
        """
        documents: Sequence[int] | None = getattr(self._rows, "shard_rows", None)
        if documents is None:
            return None
        ends = np.cumsum([0, *documents], dtype=np.int64)
        begun = np.minimum(-(-self._offsets[ends] // self._length), len(self))
        rows: list[int] = np.diff(begun).tolist()
        return rows

    @property
    def fingerprint(self) -> str:
        """A name for the rows, from that of the documents and how they are packed."""
        return digest("packed", fingerprint(self._rows), self._column, self._length, self._total)

    def again(self) -> Packed:
        """See `distdl.data.table.rows.again`."""
        twin = copy.copy(self)
        twin._rows = again(self._rows)
        return twin

    def close(self) -> None:
        """Close the documents' rows, if they need it (`distdl.data.table.rows.close`)."""
        close(self._rows)

    def _spans(self, starts: Ints, stops: Ints) -> _Spans:
        """The parts of documents that make up tokens starts[i] .. stops[i] - 1, row after row."""
        first = np.searchsorted(self._offsets, starts, side="right") - 1
        last = np.searchsorted(self._offsets, stops - 1, side="right") - 1
        counts = last - first + 1
        rows = np.repeat(np.arange(len(starts)), counts)
        documents = span_index(first, counts)
        document_starts = self._offsets[documents]
        begins = np.maximum(document_starts, starts[rows])
        ends = np.minimum(self._offsets[documents + 1], stops[rows])
        whole = begins < ends  # empty documents have no tokens, and no number either
        per_row = np.bincount(rows[whole], minlength=len(starts))
        begins, ends = (begins - document_starts)[whole], (ends - document_starts)[whole]
        return _Spans(
            documents[whole], begins, ends, span_index(np.ones_like(per_row), per_row).astype(np.int32)
        )

    def _tokens(self, spans: _Spans) -> npt.NDArray[Any]:
        """The tokens of the spans, end to end."""
        if isinstance(self._rows, Sliceable):
            found = self._rows.slices(self._column, spans.documents, spans.begins, spans.ends)
            return _plain(found)
        documents, place = np.unique(spans.documents, return_inverse=True)
        column = self._rows.gather(documents)[self._column]
        assert isinstance(column, Ragged), "checked when the view was made"
        lengths = spans.ends - spans.begins
        if (column.lengths != self._offsets[documents + 1] - self._offsets[documents]).any():
            raise DataError(
                f"the documents in column {self._column!r} have other lengths than the offsets say: the "
                "index disagrees with its shards, prepare the dataset again"
            )
        values: npt.NDArray[Any] = _plain(column)[span_index(column.offsets[place] + spans.begins, lengths)]
        return values


class _Spans(NamedTuple):
    """Parts of documents: int64 arrays [spans], and the number of each within its row from 1 (int32)."""

    documents: Ints
    begins: Ints
    ends: Ints
    segments: npt.NDArray[np.int32]


def _plain(column: Ragged) -> npt.NDArray[Any]:
    assert not isinstance(column.values, Ragged), "checked when the view was made"
    return column.values


def _gather(rows: Rows, ids: Ints, allocate: Allocate | None) -> Batch:
    gather: Callable[..., Batch] = rows.gather
    return gather(ids) if allocate is None else gather(ids, allocate)


def _columns(rows: Rows) -> dict[str, str]:
    """Each column in words, told from a gather of no rows."""
    return {name: kind(column) for name, column in rows.gather(np.empty(0, dtype=np.int64)).items()}


def _check_same(expected: dict[str, str], found: dict[str, str], number: int) -> None:
    for name in [*expected, *(name for name in found if name not in expected)]:
        first, other = expected.get(name, "missing"), found.get(name, "missing")
        if first != other:
            raise DataError(
                f"datasets 0 and {number} cannot be joined: column {name!r} is {first} in dataset 0 and "
                f"{other} in dataset {number}. Choose common columns, or prepare both alike."
            )


def _merge(
    found: Sequence[npt.NDArray[Any] | Ragged], place: npt.NDArray[np.intp], allocate: Allocate | None
) -> npt.NDArray[Any] | Ragged:
    """The rows of `found`, end to end, each put where `place` says."""
    if not isinstance(found[0], Ragged):
        out = (allocate or allocate_plain)((len(place), *found[0].shape[1:]), found[0].dtype)
        begin = 0
        for rows in found:
            out[place[begin : begin + len(rows)]] = rows
            begin += len(rows)
        return out
    back = np.empty(len(place), dtype=np.int64)
    back[place] = np.arange(len(place))
    return _joined([rows for rows in found if isinstance(rows, Ragged)]).take(back)


def _joined(found: Sequence[Ragged]) -> Ragged:
    lengths = np.concatenate([rows.lengths for rows in found])
    inner = [rows.values for rows in found if isinstance(rows.values, Ragged)]
    plain = [rows.values for rows in found if not isinstance(rows.values, Ragged)]
    return Ragged(_joined(inner) if inner else np.concatenate(plain), lengths, found[0].text)
