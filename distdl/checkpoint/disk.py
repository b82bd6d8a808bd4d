"""The few things a checkpoint asks of a file system: durable writes, hashes, room, removal."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path

import xxhash

from distdl.errors import CheckpointError
from distdl.stores import scrub

CHUNK = 8 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)


def write_durably(path: Path, data: bytes) -> str:
    """Write a new file and fsync it. Returns its XXH3-128 as hexadecimal digits.

    Raises FileExistsError where `path` exists: nothing that stands is ever written into.
    """
    digest = xxhash.xxh3_128()
    view = memoryview(data)
    with open(path, "xb", buffering=0) as file:
        while view:
            written = file.write(view[:CHUNK])  # may be short, on a disk that is nearly full
            digest.update(view[:written])
            view = view[written:]
        os.fsync(file.fileno())
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, where the file system knows how to."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse to fsync a directory, and need not: their renames are synchronous.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def require_room(directory: Path, needed: int) -> None:
    """Raise CheckpointError if `directory`'s file system has fewer than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(f"no space left: needs {needed:,} bytes, has {free:,}, in {directory}")


def explain(error: Exception, directory: Path | str) -> str:
    """What an exception met while saving means to the person who reads it."""
    if isinstance(error, OSError) and error.errno in FULL:
        quota = " (the quota is used up)" if error.errno == errno.EDQUOT else ""
        return f"no space left while writing in {directory}{quota}: free some, or lower checkpoint.keep"
    if isinstance(error, CheckpointError):
        return str(error)
    return scrub(f"{type(error).__name__}: {error}")


def aside(path: Path, kind: str) -> Path:
    """A fresh name beside `path` that does not count as a checkpoint: `path`.`kind`-<random>."""
    return path.with_name(f"{path.name}.{kind}-{secrets.token_hex(4)}")


def remove(path: Path) -> None:
    """Remove a directory, a file or a link (not what the link leads to)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
