"""The run directory: what a checkpoint will do there, done once with a small file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from distdl.checkpoint.disk import sync_directory, write_durably
from distdl.checkpoint.store import store_at
from distdl.doctor.collect.machine import cannot_write, nearest_folder
from distdl.doctor.collect.recipe import Asked
from distdl.doctor.facts import Storage
from distdl.errors import DistdlError
from distdl.stores import scrub

PROBE = ".distdl-doctor-"


def storage_here(asked: Asked | None) -> Storage:
    """The recipe's run directory, or the current folder where no recipe was given. Leaves nothing behind:
    in a run directory that does not exist, the nearest folder above it is tried.
    """
    wanted = asked.directory.path if asked else Path.cwd()
    folder = nearest_folder(wanted.absolute())
    scratch = folder / f"{PROBE}{secrets.token_hex(6)}"
    told: dict[str, str | None] = {"error": trying(scratch.mkdir)}
    skew = _probe(scratch, told) if told["error"] is None else 0.0
    store = asked.recipe.checkpoint.dir if asked else None
    saves = nearest_folder(Path(store).absolute()) if store and "://" not in store else folder
    there = os.statvfs(saves)
    return Storage(
        run=str(wanted),
        in_use=asked.directory.in_use_by() if asked else None,
        free=there.f_bavail * there.f_frsize,
        # Some file systems make room for files as they need it, and say 0 of 0.
        free_files=there.f_favail if there.f_files else None,
        filesystem=_kind(folder),
        clock_skew=skew,
        store=scrub(store) if store else None,
        store_error=_store_error(store, saves) if store else None,
        **told,
    )


def _store_error(store: str, folder: Path) -> str | None:
    if "://" in store:
        return trying(lambda: store_at(store).steps())
    return cannot_write(folder)


def _probe(scratch: Path, told: dict[str, str | None]) -> float:
    """Try what a checkpoint does; returns the file server's clock less this one's, in seconds."""
    skew = 0.0
    try:
        before = time.time()
        told["fsync_error"] = trying(lambda: _write(scratch))
        if told["fsync_error"] is None:
            skew = _beyond((scratch / "a").stat().st_mtime, before, time.time())
        told["rename_error"] = trying(lambda: _rename(scratch))
        told["lock_error"] = trying(lambda: _lock(scratch / "lock"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return skew


def _write(scratch: Path) -> None:
    write_durably(scratch / "a", b"doctor")
    sync_directory(scratch)


def _rename(scratch: Path) -> None:
    (scratch / "new").mkdir()
    (scratch / "new").rename(scratch / "old")


def _lock(path: Path) -> None:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _beyond(moment: float, low: float, high: float) -> float:
    """How far a moment lies outside [low, high], but for the ticks in which files are dated."""
    far = moment - high if moment > high else min(0.0, moment - low)
    return far if abs(far) > 0.1 else 0.0


def trying(action: Callable[[], object]) -> str | None:
    """What an action says when it fails; None where it does not."""
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    except DistdlError as error:
        return str(error)
    except Exception as error:  # a store's library raises what it likes
        return scrub(f"{type(error).__name__}: {error}")
    return None


def _kind(folder: Path) -> str:
    """The kind of file system, from Linux's table of mounts."""
    best, kind = -1, "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, point, name, *_ = line.split()
            inside = folder.resolve().is_relative_to(point.replace("\\040", " "))
            if inside and len(point) >= best:
                best, kind = len(point), name
    return kind


def leave_note(folder: Path, text: str) -> None:
    """For those that cannot find rank 0: where it listens."""
    with contextlib.suppress(OSError):
        (nearest_folder(folder.absolute()) / f"{PROBE}rank-0").write_text(text)


def note(folder: Path) -> str | None:
    """What rank 0 has left, if it has, while it is there."""
    with contextlib.suppress(OSError):
        return (nearest_folder(folder.absolute()) / f"{PROBE}rank-0").read_text()
    return None


def take_note_away(folder: Path) -> None:
    """Remove it again."""
    with contextlib.suppress(OSError):
        (nearest_folder(folder.absolute()) / f"{PROBE}rank-0").unlink(missing_ok=True)


def leave_mark(folder: Path, token: str, rank: int) -> None:
    """A file that says that `rank` can write here. Raises OSError."""
    write_durably(nearest_folder(folder.absolute()) / f"{PROBE}{token}-{rank}", b"")


def marks(folder: Path, token: str, expected: int, patience_s: float) -> tuple[int, ...]:
    """The ranks whose marks are here, once there are `expected`, or after `patience_s` seconds: a network
    file system may show a new file late.
    """
    at, end = nearest_folder(folder.absolute()), time.monotonic() + patience_s
    while True:
        with contextlib.suppress(OSError):
            sync_directory(at)
        found = sorted(int(p.name.rpartition("-")[2]) for p in at.glob(f"{PROBE}{token}-*"))
        if len(found) >= expected or time.monotonic() >= end:
            return tuple(found)
        time.sleep(0.2)


def take_mark_away(folder: Path, token: str, rank: int) -> None:
    """Remove it again."""
    with contextlib.suppress(OSError):
        (nearest_folder(folder.absolute()) / f"{PROBE}{token}-{rank}").unlink(missing_ok=True)
