"""The folder of a run in a node's memory. Imports no torch.

    /dev/shm/distdl-1000/                       of this user, mode 0700; DISTDL_MEMORY_DIR names another
    /dev/shm/distdl-1000/node-id                random: processes that see the same one share a node
    /dev/shm/distdl-1000/<run>/run.json         which run directory this belongs to
    /dev/shm/distdl-1000/<run>/.lock            held by its processes
    /dev/shm/distdl-1000/<run>/step-00000300-1f2e3d4c/   some of a checkpoint's files, and its manifest

A random number in the run directory is part of <run>: what was kept of a run directory that has been removed
is never taken for that of a new one at the same path.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import xxhash

from distdl.checkpoint.folders import LocalFolder, read_manifest_bytes
from distdl.checkpoint.manifest import Manifest, parse
from distdl.errors import CheckpointError

VARIABLE = "DISTDL_MEMORY_DIR"
NODE, RUN, LOCK = "node-id", "run.json", ".lock"
MARK = ".memory-id"
"""The file in the run directory with the random number."""


@dataclass(frozen=True)
class Copy:
    """What this node's memory has of one checkpoint: `files` are those of the right size in `manifest`, of
    which `raw` are the bytes.
    """

    name: str
    raw: bytes
    manifest: Manifest
    files: tuple[str, ...]


class Home:
    """One run's folder on this node. `node` is what names the node."""

    def __init__(self, run: str, mark: str) -> None:
        """Open it, or make it. Raises CheckpointError where the place cannot be trusted, OSError."""
        root = _root()
        self.node = _node_id(root)
        self.path = root / xxhash.xxh3_64_hexdigest(f"{run}\n{mark}".encode())
        self.path.mkdir(mode=0o700, exist_ok=True)
        put(self.path / RUN, json.dumps({"run": run, "mark": mark}).encode())
        self._lock = _hold(self.path, fcntl.LOCK_SH)

    def copies(self) -> list[Copy]:
        """What is there with a sound manifest, in no order. No file's content is looked at."""
        return [copy for path in self._steps() if (copy := _copy_at(path)) is not None]

    def clear(self, *kept: str) -> None:
        """Remove all but what has one of these names. One process of the node calls it. Raises OSError."""
        for path in self._steps():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove all of it, when nobody is to come back to it. One process calls it. Raises OSError."""
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Let go of it: from here on a sweep may take it, if its run is gone."""
        self._lock.close()

    def _steps(self) -> list[Path]:
        return [path for path in self.path.iterdir() if path.is_dir() and not path.is_symlink()]


def mark_of(run: Path) -> str:
    """The random number of a run directory, made where there is none. Rank 0 calls it. Raises OSError."""
    path = run / MARK
    if not path.exists() or not path.stat().st_size:  # empty after a power failure
        put(path, secrets.token_hex(16).encode())
    return path.read_text()


def put(path: Path, data: bytes) -> None:
    """Write a file so that others see all of it or nothing. Raises OSError."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    temporary.write_bytes(data)
    temporary.replace(path)


def sweep(root: Path) -> list[str]:
    """Remove what runs left whose run directory is gone, unless a process holds it; returns those paths."""
    left = []
    for path in root.iterdir():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads((path / RUN).read_text())
            if _is_gone(Path(told["run"]), told["mark"]):
                with _hold(path, fcntl.LOCK_EX):
                    shutil.rmtree(path, ignore_errors=True)
                left.append(str(told["run"]))
    return left


def _is_gone(run: Path, mark: str) -> bool:
    try:
        return (run / MARK).read_text() != mark
    except (FileNotFoundError, NotADirectoryError):
        return True


def _root() -> Path:
    """The user's folder, made if need be."""
    given = os.environ.get(VARIABLE)
    path = Path(given) if given else Path(f"/dev/shm/distdl-{os.geteuid()}")
    if given:
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise CheckpointError(
            f"{path} is to hold what others may not read or change, and is not a directory of this user with "
            f"mode 0700: remove it, chmod 0700 it, or name another folder in memory in {VARIABLE}"
        )
    return path


def _node_id(root: Path) -> str:
    """All processes of a node come to the same one, whoever is first."""
    path = root / NODE
    if not path.exists():
        mine = root / f".{NODE}-{secrets.token_hex(4)}"
        mine.write_text(secrets.token_hex(16))
        with contextlib.suppress(FileExistsError):
            os.link(mine, path)
        mine.unlink()
    return path.read_text()


def _hold(folder: Path, how: int) -> IO[str]:
    """Raises BlockingIOError where another process holds it."""
    file = open(folder / LOCK, "a")  # noqa: SIM115 - held open on purpose
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file


def _copy_at(path: Path) -> Copy | None:
    try:
        folder = LocalFolder(path)
        raw = read_manifest_bytes(folder)
        manifest = parse(raw)
        sizes = dict(_sizes(folder, manifest))
    except (CheckpointError, OSError):
        return None
    return Copy(
        path.name, raw, manifest, tuple(n for n, e in manifest.files.items() if sizes.get(n) == e.size)
    )


def _sizes(folder: LocalFolder, manifest: Manifest) -> Iterator[tuple[str, int]]:
    for name in manifest.files:
        with contextlib.suppress(CheckpointError):
            source = folder.open(name)
            source.close()
            yield name, source.size
