"""`open_checkpoint`: the tensors of a checkpoint, in whatever pieces it was written, read when asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from distdl.checkpoint.dtypes import ITEMSIZE
from distdl.checkpoint.folders import Folder, Place, folder_at
from distdl.checkpoint.image import memory_of
from distdl.checkpoint.manifest import Manifest, TensorEntry
from distdl.checkpoint.read import naming, read_manifest
from distdl.checkpoint.tensorfile import TensorFile, read_header
from distdl.errors import Corrupt, Incomplete
from distdl.pieces import Meta


def open_checkpoint(place: Place) -> Checkpoint:
    """Open a checkpoint, which `verify` or `find_and_verify` found sound: hashes are not computed again.

    Reads the manifest alone. Local; needs no closing. Raises CheckpointError.
    """
    manifest = read_manifest(place)
    with naming(place):
        return Checkpoint(place, manifest, folder_at(place))


class _Part(NamedTuple):
    """Bytes of a file, from `offset` on, that are the bytes [begin, end) of what is asked for."""

    file: str
    offset: int
    begin: int
    end: int


class Checkpoint:
    """`Saved` from the files of a checkpoint. Any number of threads may read."""

    def __init__(self, path: Place, manifest: Manifest, folder: Folder) -> None:
        self.path = path
        self.manifest = manifest
        self.metas = {
            name: Meta(getattr(torch, entry.dtype), tuple(entry.shape))
            for name, entry in manifest.tensors.items()
        }
        self._folder = folder
        self._limits = self._header_limits()
        self._headers: dict[str, TensorFile] = {}
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()

    def whole(self, name: str) -> Tensor:
        """See `Saved`: on the CPU, in memory of its own. Raises KeyError, CheckpointError."""
        meta = self.metas[name]
        return self.run(name, 0, meta.numel).reshape(meta.shape)

    def run(self, name: str, begin: int, end: int) -> Tensor:
        """See `Saved`: on the CPU, in memory of its own. Raises KeyError, ValueError, CheckpointError."""
        # All offsets first: nothing is allocated for bytes that no file has.
        parts = self._parts(name, begin, end)
        target = torch.empty(end - begin, dtype=self.metas[name].dtype)
        self._read_parts(parts, memory_of(target))
        return target

    def read_into(self, name: str, begin: int, target: Tensor) -> None:
        """See `Saved`. Straight from the file where `target` is contiguous, on the CPU, of the saved dtype.

        Raises KeyError, ValueError, CheckpointError.
        """
        end, dtype = begin + target.numel(), self.metas[name].dtype
        if target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
            self._read_parts(self._parts(name, begin, end), memory_of(target))
        else:
            with self._one_at_a_time:  # however many threads read, they take the memory of one tensor
                target.copy_(self.run(name, begin, end).view(target.shape))

    def _parts(self, name: str, begin: int, end: int) -> list[_Part]:
        """Where the elements [begin, end) of a tensor are, checked against the headers of the files."""
        entry = self.manifest.tensors[name]
        if not 0 <= begin <= end <= entry.numel:
            raise ValueError(f"[{begin}, {end}) of {name}, which has {entry.numel} elements")
        with naming(self.path):
            return [
                _Part(
                    file,
                    self._offset(name, entry, file, first, last) + _bytes(entry, lo - first),
                    _bytes(entry, lo - begin),
                    _bytes(entry, hi - begin),
                )
                for file, first, last in entry.pieces
                if (lo := max(begin, first)) < (hi := min(end, last))
            ]

    def _read_parts(self, parts: list[_Part], memory: memoryview) -> None:
        with naming(self.path):
            for part in parts:
                self._read(part.file, memory[part.begin : part.end], part.offset)

    def _offset(self, name: str, entry: TensorEntry, file: str, begin: int, end: int) -> int:
        """The byte of `file` at which its piece [begin, end) of a tensor begins."""
        header = self._header(file)
        slot = header.slots.get(name)
        shape = tuple(entry.shape) if (begin, end) == (0, entry.numel) else (end - begin,)
        # A run of all elements may stand there under either shape.
        if slot is None or slot.dtype != entry.dtype or slot.shape not in (shape, (end - begin,)):
            found = "not in it" if slot is None else f"{slot.dtype} {list(slot.shape)}"
            raise Corrupt(f"{file}: {name} is {found}, manifest says {entry.dtype} {list(shape)}")
        return header.data_at + slot.begin

    def _header(self, file: str) -> TensorFile:
        with self._lock:
            if file not in self._headers:
                size = self.manifest.files[file].size
                with _reading(file):
                    self._headers[file] = read_header(self._folder, file, size, self._limits[file])
            return self._headers[file]

    def _header_limits(self) -> dict[str, int]:
        """By file, the bytes of header that its tensors can need: a padded one is refused unread."""
        limits = dict.fromkeys(self.manifest.files, 65536)
        for name, entry in self.manifest.tensors.items():
            for file, _, _ in entry.pieces:
                limits[file] += 12 * len(name) + 24 * len(entry.shape) + 256
        return limits

    def _read(self, file: str, memory: memoryview, offset: int) -> None:
        source = self._folder.open(file)
        try:
            if source.size != self.manifest.files[file].size:
                raise Corrupt(f"{file}: size {source.size}, manifest says {self.manifest.files[file].size}")
            with _reading(file):
                source.read_into(memory, offset)
        finally:
            source.close()


@contextmanager
def _reading(file: str) -> Iterator[None]:
    """Name the file that cannot be read."""
    try:
        yield
    except OSError as error:
        raise Incomplete(f"{file}: cannot be read ({error.strerror or error})") from error


def _bytes(entry: TensorEntry, elements: int) -> int:
    return elements * ITEMSIZE[entry.dtype]
