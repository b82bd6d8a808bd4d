"""One checkpoint's files, for reading: in a directory, or below a URL. Imports no torch.

Names come from a manifest, which anybody may have made: `manifest.PlainName` keeps them to one component, and
a link is not followed, so that nothing outside the checkpoint is read.
"""

from __future__ import annotations

import errno
import os
import stat
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import xxhash

from distdl.checkpoint.manifest import MANIFEST, MANIFEST_LIMIT
from distdl.errors import CheckpointError, Corrupt, Incomplete
from distdl.stores import open_store, scrub

Place = str | Path
"""A directory, or the URL of a folder in an object store."""

CHUNK = 8 << 20
TRIES = 5
"""How often a store's library asks before it gives up (s3fs waits up to 15 s in between)."""


class Source(Protocol):
    """One open file."""

    size: int

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` on. Raises Corrupt where the file ends before, OSError."""

    def close(self) -> None:
        """Close it."""


class Folder(Protocol):
    """The files of one checkpoint."""

    place: Place
    name: str
    """The last component of `place`."""

    def open(self, file: str) -> Source:
        """Open one file. Raises Incomplete where it is missing, Corrupt where it is no ordinary file."""


def is_url(place: Place) -> bool:
    """Whether `place` is in an object store."""
    return isinstance(place, str) and "://" in place and not place.startswith("file://")


def local_path(place: Place) -> Path:
    """`place` as a path, which it is unless `is_url`."""
    return Path(place.removeprefix("file://")) if isinstance(place, str) else place


def child(place: Place, name: str) -> Place:
    """What is called `name` in `place`."""
    return f"{str(place).rstrip('/')}/{name}" if is_url(place) else local_path(place) / name


def name_of(place: Place) -> str:
    """The last component of `place`, for a person."""
    return shown(place).rstrip("/").rpartition("/")[2]


def shown(place: Place) -> str:
    """`place` for a person: without passwords."""
    return scrub(place) if isinstance(place, str) else str(place)


def folder_at(place: Place) -> Folder:
    """The checkpoint at `place`, sound or not. Raises Incomplete where there is no directory."""
    if is_url(place):
        return ObjectFolder(str(place).rstrip("/"))
    path = local_path(place)
    if not path.is_dir():
        raise Incomplete("not a directory" if os.path.lexists(path) else "there is no such directory")
    return LocalFolder(path)


class LocalFolder:
    """In a directory."""

    def __init__(self, path: Path) -> None:
        self.place: Place = path
        self.name = path.name
        self._path = path

    def open(self, file: str) -> Source:
        """See `Folder`."""
        try:
            # Without O_NONBLOCK, opening a pipe would wait for somebody to write.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self._path / file, flags)
        except FileNotFoundError:
            raise Incomplete(f"{file}: missing") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Corrupt(f"{file}: is a link, expected an ordinary file") from error
            raise Incomplete(f"{file}: cannot be read ({error.strerror})") from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise Corrupt(f"{file}: is not an ordinary file")
        return _LocalSource(file, descriptor, found.st_size)


class _LocalSource:
    def __init__(self, file: str, descriptor: int, size: int) -> None:
        self._file = file
        self._descriptor = descriptor
        self.size = size

    def read_into(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if not count:
                raise Corrupt(f"{self._file}: ends at byte {offset}")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        os.close(self._descriptor)


class ObjectFolder:
    """Below a URL. Files are read in ranges, of at most `CHUNK` bytes: no more is held in memory."""

    def __init__(self, url: str) -> None:
        self.place: Place = url
        self.name = url.rpartition("/")[2]

    def open(self, file: str) -> Source:
        """See `Folder`."""
        store, path = open_store(f"{self.place}/{file}", tries=TRIES, error=CheckpointError)
        try:
            return _ObjectSource(store, path, file, int(store.info(path)["size"]))
        except FileNotFoundError:
            raise Incomplete(f"{file}: missing") from None
        except Exception as error:
            raise Incomplete(f"{file}: cannot be read ({why(error)})") from error


class _ObjectSource:
    def __init__(self, store: object, path: str, file: str, size: int) -> None:
        self._store = store
        self._path = path
        self._file = file
        self.size = size

    def read_into(self, view: memoryview, offset: int) -> None:
        while view:
            end = offset + min(len(view), CHUNK)
            try:
                data = self._store.cat_file(self._path, start=offset, end=end)  # type: ignore[attr-defined]
            except Exception as error:
                raise OSError(errno.EIO, f"cannot be read: {why(error)}") from error
            if not data or len(data) > end - offset:
                raise Corrupt(f"{self._file}: ends at byte {offset}")
            view[: len(data)] = data
            view, offset = view[len(data) :], offset + len(data)

    def close(self) -> None:
        pass


def why(error: BaseException) -> str:
    """One line about an exception that a library raised."""
    text = " ".join(str(error).split()) or "no message"
    return scrub(f"{type(error).__name__}: {text}"[:400])


def read_manifest_bytes(folder: Folder) -> bytes:
    """The bytes of manifest.json. Raises Incomplete where there is none, Corrupt where it is too large."""
    try:
        source = folder.open(MANIFEST)
    except Incomplete as error:
        if str(error) != f"{MANIFEST}: missing":
            raise
        raise Incomplete(f"no {MANIFEST}: the save was not finished") from None
    try:
        if source.size > MANIFEST_LIMIT:
            raise Corrupt(f"{MANIFEST}: {source.size} bytes; the most that is read is {MANIFEST_LIMIT}")
        data = bytearray(source.size)
        source.read_into(memoryview(data), 0)
        return bytes(data)
    except OSError as error:
        raise Incomplete(f"{MANIFEST}: cannot be read ({error.strerror})") from error
    finally:
        source.close()


def hash_file(folder: Folder, file: str) -> str:
    """XXH3-128 of a file's bytes. Releases the interpreter lock, so threads do hash in parallel.

    Raises Incomplete, Corrupt, OSError.
    """
    digest = xxhash.xxh3_128()
    source = folder.open(file)
    try:
        # One buffer is read into while the other is hashed.
        buffers = [memoryview(bytearray(min(CHUNK, source.size))) for _ in range(2)]
        hashed: Future[None] | None = None
        with ThreadPoolExecutor(1, "distdl-hash") as hasher:
            for i, offset in enumerate(range(0, source.size, CHUNK)):
                part = buffers[i % 2][: source.size - offset]
                source.read_into(part, offset)
                if hashed is not None:
                    hashed.result()
                hashed = hasher.submit(digest.update, part)
    finally:
        source.close()
    return digest.hexdigest()
