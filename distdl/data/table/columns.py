"""How each type of Arrow column is gathered: a tree of readers, one for each level of nesting.

A reader notes a few numbers of every record batch (where its buffers begin) in a row of an int64 table. To
gather is then arithmetic on that table and a copy (`memory`), whatever files the rows lie in.
The layout of the buffers: https://arrow.apache.org/docs/format/Columnar.html
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distdl.data.table.memory import Int64, allocate_plain, take_rows, take_spans
from distdl.data.table.ragged import Allocate, Ragged, span_index

Values = npt.NDArray[Any] | Ragged


class Damaged(Exception):
    """Offsets in the file that point outside their values. Becomes a DataError that names the file."""


class Mapped(Protocol):
    """The mapped file that buffers must lie in (a `pyarrow.Buffer`)."""

    address: int
    size: int


class Reader(Protocol):
    """One level of a column. `table` is int64 [record batches, slots]."""

    @property
    def slots(self) -> int:
        """Numbers noted of each record batch, this level and those below."""
        ...

    def note(self, array: pa.Array, file: Mapped) -> list[int]:
        """The numbers of one record batch. ValueError where its buffers are not in the file as they are."""
        ...

    def take(self, table: Int64, batches: Int64, rows: Int64, allocate: Allocate | None) -> Values:
        """Row `rows[i]` of record batch `batches[i]`, for all i. Raises Damaged."""
        ...

    def spans(
        self, table: Int64, batches: Int64, starts: Int64, lengths: Int64, allocate: Allocate | None
    ) -> Values:
        """`lengths[i]` rows from `starts[i]` of record batch `batches[i]`, end to end. Raises Damaged."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Numbers, or fixed-size lists of them: a row is a run of bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    slot: int
    slots: int = 1

    @property
    def items(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape)

    def note(self, array: pa.Array, file: Mapped) -> list[int]:
        """See `Reader`."""
        leaf = _leaf(array)
        return [_address(leaf.buffers()[1], file, len(array) * self.items * self.dtype.itemsize)]

    def take(self, table: Int64, batches: Int64, rows: Int64, allocate: Allocate | None) -> Values:
        """See `Reader`: [n, *shape]."""
        row_bytes = self.items * self.dtype.itemsize
        return take_rows(table[batches, self.slot] + rows * row_bytes, self.dtype, self.shape, allocate)

    def spans(
        self, table: Int64, batches: Int64, starts: Int64, lengths: Int64, allocate: Allocate | None
    ) -> Values:
        """See `Reader`: [total, *shape]."""
        out = (allocate or allocate_plain)((int(lengths.sum()), *self.shape), self.dtype)
        addresses = table[batches, self.slot] + starts * (self.items * self.dtype.itemsize)
        take_spans(addresses, lengths, self.dtype, self.items, out)
        return out


@dataclass(frozen=True)
class Bits:
    """Booleans, eight in a byte, the lowest bit first; or fixed-size lists of them."""

    shape: tuple[int, ...]
    slot: int
    slots: int = 1

    def note(self, array: pa.Array, file: Mapped) -> list[int]:
        """See `Reader`."""
        leaf = _leaf(array)
        return [_address(leaf.buffers()[1], file, (len(leaf) + 7) // 8)]

    def take(self, table: Int64, batches: Int64, rows: Int64, allocate: Allocate | None) -> Values:
        """See `Reader`: bool [n, *shape]."""
        items = math.prod(self.shape)
        positions = (rows[:, None] * items + np.arange(items)).reshape(-1)
        addresses = np.repeat(table[batches, self.slot], items) + (positions >> 3)
        octets = take_rows(addresses, np.dtype(np.uint8), ())
        out = (allocate or allocate_plain)((len(rows), *self.shape), np.dtype(np.bool_))
        out.reshape(-1)[:] = (octets >> (positions & 7).astype(np.uint8)) & 1
        return out

    def spans(
        self, table: Int64, batches: Int64, starts: Int64, lengths: Int64, allocate: Allocate | None
    ) -> Values:
        """See `Reader`."""
        return self.take(table, np.repeat(batches, lengths), span_index(starts, lengths), allocate)


@dataclass(frozen=True)
class Varying:
    """Lists whose lengths differ, strings and bytes: offsets into the rows of `child`."""

    child: Reader
    text: bool | None
    offset: np.dtype[Any]
    slot: int

    @property
    def slots(self) -> int:
        """Two of its own: where the offsets begin, and how many rows the child has."""
        return 2 + self.child.slots

    def note(self, array: pa.Array, file: Mapped) -> list[int]:
        """See `Reader`."""
        offsets = _address(array.buffers()[1], file, (len(array) + 1) * self.offset.itemsize)
        if self.text is None:
            return [offsets, len(array.values), *self.child.note(array.values, file)]
        octets = array.buffers()[2]
        size = octets.size if octets is not None else 0
        return [offsets, size, _address(octets, file, 0)]

    def bounds(self, table: Int64, batches: Int64, rows: Int64) -> tuple[Int64, Int64]:
        """(start, length) of these rows among the child's. Raises Damaged."""
        width = self.offset.itemsize
        pairs = take_rows(table[batches, self.slot] + rows * width, self.offset, (2,))
        starts = pairs[:, 0].astype(np.int64)
        lengths = pairs[:, 1] - starts
        wrong = (starts < 0) | (lengths < 0) | (pairs[:, 1] > table[batches, self.slot + 1])
        if wrong.any():
            raise Damaged(int(np.flatnonzero(wrong)[0]))
        return starts, lengths

    def take(self, table: Int64, batches: Int64, rows: Int64, allocate: Allocate | None) -> Values:
        """See `Reader`: `Ragged`."""
        starts, lengths = self.bounds(table, batches, rows)
        return Ragged(self.child.spans(table, batches, starts, lengths, allocate), lengths, self.text)

    def spans(
        self, table: Int64, batches: Int64, starts: Int64, lengths: Int64, allocate: Allocate | None
    ) -> Values:
        """See `Reader`."""
        return self.take(table, np.repeat(batches, lengths), span_index(starts, lengths), allocate)


@dataclass(frozen=True)
class FixedOfVarying:
    """Fixed-size lists of lists or strings."""

    child: Reader
    size: int

    @property
    def slots(self) -> int:
        """None of its own."""
        return self.child.slots

    def note(self, array: pa.Array, file: Mapped) -> list[int]:
        """See `Reader`."""
        return self.child.note(array.values, file)

    def take(self, table: Int64, batches: Int64, rows: Int64, allocate: Allocate | None) -> Values:
        """See `Reader`: `Ragged` of `Ragged`, all outer lengths the same."""
        lengths = np.full(len(rows), self.size, np.int64)
        return Ragged(self.child.spans(table, batches, rows * self.size, lengths, allocate), lengths)

    def spans(
        self, table: Int64, batches: Int64, starts: Int64, lengths: Int64, allocate: Allocate | None
    ) -> Values:
        """See `Reader`."""
        return self.take(table, np.repeat(batches, lengths), span_index(starts, lengths), allocate)


def reader(kind: pa.DataType, slot: int) -> Reader:
    """How to read a column of this type; its numbers stand from `slot` on. ValueError for other types."""
    kind = storage(kind)
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return Varying(_octets(slot + 2), pa.types.is_string(kind), np.dtype(np.int32), slot)
    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return Varying(_octets(slot + 2), pa.types.is_large_string(kind), np.dtype(np.int64), slot)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        width = np.int32 if pa.types.is_list(kind) else np.int64
        return Varying(reader(kind.value_type, slot + 2), None, np.dtype(width), slot)
    shape: list[int] = []
    leaf = kind
    while pa.types.is_fixed_size_list(leaf):
        shape.append(leaf.list_size)
        leaf = storage(leaf.value_type)
    if pa.types.is_boolean(leaf):
        return Bits(tuple(shape), slot)
    if pa.types.is_integer(leaf) or pa.types.is_floating(leaf):
        return Fixed(np.dtype(leaf.to_pandas_dtype()), tuple(shape), slot)
    if shape:
        return FixedOfVarying(reader(kind.value_type, slot), shape[0])
    raise ValueError(f"type {kind}")


def storage(kind: pa.DataType) -> pa.DataType:
    """The type that an extension type is stored as; any other type itself."""
    while isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    return kind


def stored(array: pa.Array) -> pa.Array:
    """The array without extension types at its top."""
    while isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array


def first_null(array: pa.Array) -> int | None:
    """The first row of a record batch's column that is null or holds a null at any depth."""
    array = stored(array)
    if array.null_count:
        return int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
    kind = array.type
    if pa.types.is_fixed_size_list(kind):
        inner = first_null(array.values)
        return None if inner is None else inner // kind.list_size
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = first_null(array.values)
        # Values may lie before the first list and after the last: those belong to no row.
        row = None if inner is None else int(np.searchsorted(array.offsets.to_numpy(), inner, "right")) - 1
        return row if row is not None and 0 <= row < len(array) else None
    return None


def _octets(slot: int) -> Fixed:
    return Fixed(np.dtype(np.uint8), (), slot)


def _leaf(array: pa.Array) -> pa.Array:
    array = stored(array)
    while pa.types.is_fixed_size_list(array.type):
        array = stored(array.values)
    return array


def _address(buffer: pa.Buffer | None, file: Mapped, needed: int) -> int:
    if buffer is None or (buffer.size == 0 and needed == 0):
        if needed:
            raise ValueError("a buffer is missing")
        return file.address
    if not file.address <= buffer.address <= file.address + file.size - buffer.size:
        raise ValueError("it is compressed inside the Arrow file; write it uncompressed")
    if buffer.size < needed:
        raise ValueError(f"a buffer has {buffer.size} bytes where {needed} are needed")
    return int(buffer.address)
