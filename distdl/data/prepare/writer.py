"""Write Arrow stream files whose record batches begin at multiples of 64 bytes, hashing as they go.

An Arrow stream is a sequence of messages: 0xFFFFFFFF, the length of the metadata (int32), the metadata, the
body ("Encapsulated message format", Arrow columnar specification). pyarrow pads metadata to 8 bytes; here the
padding is chosen so that the body begins at a multiple of 64 in the file, which the specification allows and
which keeps rows of a power-of-two size inside as few cache lines as possible.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

_ALIGN = 64
_END = b"\xff\xff\xff\xff\0\0\0\0"

BATCH_ROWS = 4096
BATCH_BYTES = 16 * 2**20
"""Bounds of a record batch: it is converted, and written, as one piece of memory."""


@dataclass(frozen=True)
class Written:
    """What one file turned out to be."""

    rows: int
    bytes: int
    hash: str
    lengths: dict[str, npt.NDArray[np.int64]]
    """Row lengths of the sequence columns (top-level variable lists), int64 [rows]."""


def write_stream(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> Written:
    """Write `tables` (all of `schema`) to `path`, uncompressed, and make it durable. Raises OSError."""
    digest = xxhash.xxh3_128()
    lengths: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in sequence_columns(schema)}
    rows = size = 0
    with path.open("wb") as file:

        def put(data: bytes | pa.Buffer) -> None:
            nonlocal size
            file.write(data)
            digest.update(data)
            size += len(data)

        put(schema.serialize())
        for batch in _batches(tables):
            message = batch.serialize()
            head, body = _aligned_head(message, size)
            put(head)
            put(body)
            rows += batch.num_rows
            for name, found in lengths.items():
                found.append(_lengths(batch.column(name)))
        put(_END)
        file.flush()
        os.fsync(file.fileno())
    whole = {n: np.concatenate([np.zeros(0, np.int64), *found]) for n, found in lengths.items()}
    return Written(rows, size, digest.hexdigest(), whole)


def sequence_columns(schema: pa.Schema) -> list[str]:
    """The columns whose rows differ in length: top-level variable lists."""
    return [f.name for f in schema if pa.types.is_list(f.type) or pa.types.is_large_list(f.type)]


def fsync_path(path: Path) -> None:
    """Make a file or folder durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durable(path: Path, text: str) -> None:
    """Write a new file, whole or not at all, and make it durable. Raises OSError."""
    partial = path.with_name(f"{path.name}.part")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync_path(path.parent)


def _aligned_head(message: pa.Buffer, position: int) -> tuple[bytes, pa.Buffer]:
    """(everything before the body, body) of a serialised record batch that will stand at `position`."""
    marker, length = struct.unpack("<Ii", message[:8].to_pybytes())
    assert marker == 0xFFFFFFFF, "pyarrow writes the format of Arrow 0.15 and later"
    padding = -(position + 8 + length) % _ALIGN
    head = (
        struct.pack("<Ii", marker, length + padding) + message[8 : 8 + length].to_pybytes() + bytes(padding)
    )
    return head, message[8 + length :]


def _batches(tables: Iterable[pa.Table]) -> Iterator[pa.RecordBatch]:
    for table in tables:
        for batch in table.combine_chunks().to_batches():
            yield from _bounded(batch)


def _bounded(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    if batch.num_rows <= 1 or (batch.num_rows <= BATCH_ROWS and batch.nbytes <= BATCH_BYTES):
        if batch.num_rows:
            yield batch
        return
    half = batch.num_rows // 2
    yield from _bounded(batch.slice(0, half))
    yield from _bounded(batch.slice(half))


def _lengths(column: pa.Array) -> npt.NDArray[np.int64]:
    offsets: npt.NDArray[np.int64] = column.offsets.to_numpy().astype(np.int64)
    return np.diff(offsets)
