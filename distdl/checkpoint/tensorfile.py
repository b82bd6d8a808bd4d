"""safetensors files: written as a stream that is hashed on its way, read with every number checked.

The format (https://huggingface.co/docs/safetensors): 8 bytes, little endian, the length n of the header; n
bytes of JSON, name -> dtype, shape, data_offsets [begin, end) in the rest; the rest. Imports no torch: what
is written are memoryviews, what is read goes into one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import xxhash

from distdl.checkpoint.dtypes import CODES, ITEMSIZE, NAMES
from distdl.checkpoint.folders import CHUNK, Folder, Source
from distdl.errors import Corrupt

HEADER_LIMIT = 100 << 20
"""What safetensors itself reads at most."""
_ALIGNED = 8


@dataclass(frozen=True)
class Slot:
    """One tensor of a file: `begin` and `end` are bytes in its data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def lay_out(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> list[Slot]:
    """Places for (name, dtype, shape), without gaps: wide elements first, so that each is aligned."""
    slots, at = [], 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (-ITEMSIZE[t[1]], t[0])):
        end = at + math.prod(shape) * ITEMSIZE[dtype]
        slots.append(Slot(name, dtype, shape, at, end))
        at = end
    return slots


def header_of(slots: Iterable[Slot]) -> bytes:
    """The head of a file with these tensors: the length and the JSON, padded so that the data are aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for slot in slots:
        entries[slot.name] = {
            "dtype": CODES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [slot.begin, slot.end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


class Sink(Protocol):
    """A file that is being written."""

    def write(self, data: memoryview) -> None:
        """Append all of `data`."""


class HashingWriter:
    """Writes to a sink and hashes in a second thread: both take a chunk at the same time."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._digest = xxhash.xxh3_128()
        self._hasher = ThreadPoolExecutor(1, "distdl-hash")
        self.size = 0

    def __enter__(self) -> HashingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. When it returns, their memory may be used for something else."""
        whole = memoryview(data)
        for at in range(0, len(whole), CHUNK):
            part = whole[at : at + CHUNK]
            hashed = self._hasher.submit(self._digest.update, part)
            try:
                self._sink.write(part)
            finally:
                hashed.result()
        self.size += len(whole)

    def hexdigest(self) -> str:
        """XXH3-128 of all that was written."""
        return self._digest.hexdigest()


@dataclass(frozen=True)
class TensorFile:
    """The header of a file, read and checked: `slots` by name, `data_at` the offset of the data."""

    slots: Mapping[str, Slot]
    data_at: int


def read_header(folder: Folder, file: str, size: int, limit: int = HEADER_LIMIT) -> TensorFile:
    """Read the header of one file, which is to have `size` bytes, and at most `limit` of header.

    Raises Incomplete where the file is missing, Corrupt where anything in the header does not fit the rest or
    the file, OSError. Allocates no more than the file has bytes.
    """
    source = folder.open(file)
    try:
        if source.size != size:
            raise Corrupt(f"{file}: size {source.size}, manifest says {size}")
        text = _header_bytes(source, file, min(limit, HEADER_LIMIT))
        data_at = 8 + len(text)
        return TensorFile(_slots(text, source.size - data_at, file), data_at)
    finally:
        source.close()


def _header_bytes(source: Source, file: str, limit: int) -> bytes:
    if source.size < 8:
        raise Corrupt(f"{file}: {source.size} bytes, too few for a safetensors file")
    head = bytearray(8)
    source.read_into(memoryview(head), 0)
    length = int.from_bytes(head, "little")
    if length > min(limit, source.size - 8):
        raise Corrupt(
            f"{file}: its header is said to have {length} bytes; the file has {source.size}, and {limit} are "
            "the most that its tensors need"
        )
    text = bytearray(length)
    source.read_into(memoryview(text), 8)
    return bytes(text)


def _slots(text: bytes, nbytes: int, file: str) -> dict[str, Slot]:
    try:
        raw = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{file}: its header is not JSON ({str(error)[:200]})") from error
    if not isinstance(raw, dict):
        raise Corrupt(f"{file}: its header is a {type(raw).__name__}, expected an object")
    raw.pop("__metadata__", None)
    slots = {name: _slot(name, entry, file) for name, entry in raw.items()}
    at = 0
    for slot in sorted(slots.values(), key=lambda s: (s.begin, s.end)):
        if slot.begin != at:
            raise Corrupt(f"{file}: {slot.name[:200]!r} begins at byte {slot.begin} of the data, not at {at}")
        at = slot.end
    if at != nbytes:
        raise Corrupt(f"{file}: its tensors have {at} bytes, the file has room for {nbytes}")
    return slots


def _slot(name: str, entry: Any, file: str) -> Slot:
    try:
        dtype, shape, (begin, end) = NAMES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        sound = all(type(n) is int and 0 <= n < 2**63 for n in numbers) and len(shape) <= 64
        if sound and math.prod(shape) * ITEMSIZE[dtype] == end - begin:
            return Slot(name, dtype, tuple(shape), begin, end)
    except (KeyError, TypeError, ValueError):
        pass
    said = json.dumps(entry)[:200]
    raise Corrupt(f"{file}: dtype, shape and offsets of {name[:200]!r} make no sense: {said}")
