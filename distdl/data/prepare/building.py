"""The folder in which a dataset is made, DIR.building beside DIR, and the one rename that makes it exist.

DIR.building/
  lock             held by the process that prepares
  job.json         source and options: a later run with the same ones goes on, with others starts over
  source/          rows of formats that pyarrow cannot read by number
  records/         one small JSON file for each shard that is whole
  dataset/         becomes DIR
  replaced/        what --overwrite takes away, between two renames; a kill there leaves it the only copy
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from distdl.data.index import FORMAT, INDEX_FILE
from distdl.data.prepare.writer import fsync_path, write_durable
from distdl.errors import DataError, DistdlError, EnvironmentProblem
from distdl.testing.faults import point

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Building:
    """One preparation of `out`; its lock is held."""

    out: Path

    @property
    def folder(self) -> Path:
        """DIR.building."""
        return self.out.with_name(f"{self.out.name}.building")

    @property
    def source(self) -> Path:
        """Where the source's rows go, if they have to be rewritten."""
        return self.folder / "source"

    @property
    def records(self) -> Path:
        """What is known of the shards that are whole."""
        return self.folder / "records"

    @property
    def dataset(self) -> Path:
        """What becomes `out`."""
        return self.folder / "dataset"

    def start(self, job: dict[str, Any]) -> str:
        """Make this folder one of `job`; returns "new", "again" (the same job goes on) or "changed"."""
        path = self.folder / "job.json"
        text = json.dumps(job, indent=1, sort_keys=True, default=str)
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        if before != text:
            for name in ("job.json", "source", "records", "dataset", "replaced"):
                _remove(self.folder / name)
        self.records.mkdir(exist_ok=True)
        self.dataset.mkdir(exist_ok=True)
        if before != text:
            write_durable(path, text)
        return "new" if before is None else "again" if before == text else "changed"

    def publish(self, *, overwrite: bool) -> None:
        """Rename the finished dataset to `out`, and take the rest away."""
        for folder, _, _ in os.walk(self.dataset):
            fsync_path(Path(folder))
        point("prepare.before_rename")
        if overwrite and self.out.exists():
            _remove(self.folder / "replaced")
            self.out.rename(self.folder / "replaced")
            point("prepare.replaced")
        self.dataset.rename(self.out)
        fsync_path(self.out.parent)
        point("prepare.renamed")
        self.discard()

    def restore(self) -> None:
        """Put back what `publish` had taken away when it was killed before the new dataset stood there."""
        replaced = self.folder / "replaced"
        if replaced.exists() and not os.path.lexists(self.out):
            replaced.rename(self.out)
            fsync_path(self.out.parent)

    def discard(self) -> None:
        """Take this folder away, with all that is in it."""
        _remove(self.folder)

    def discard_unless_begun(self) -> None:
        """After an error: keep only what a later run can go on with."""
        if not any(self.records.glob("*.json")):
            self.discard()


@contextmanager
def building(out: Path, *, wait: bool) -> Iterator[Building]:
    """Hold the lock of `out`'s building folder. `wait`: until another process is done; else it is refused.

    Raises DataError where another process prepares `out`, EnvironmentProblem where nothing can be written.
    """
    made = Building(out)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(made, wait)
    with file:
        with disk_errors(out):
            made.restore()
        yield made


def _lock(made: Building, wait: bool) -> IO[str]:
    while True:
        made.folder.mkdir(exist_ok=True)
        try:
            file = open(made.folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - held open on purpose
        except FileNotFoundError:  # another process has just finished and removed the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise DataError(
                f"{made.out} is being prepared by {holder}; wait for it, or choose another --out"
            ) from error
        if _is_at(file, made.folder / "lock"):
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            return file
        file.close()  # the folder was removed, with this lock, while we waited


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def check_free(out: Path, overwrite: bool) -> None:
    """Raises DataError where something stands at `out` that may not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_prepared(out):
        raise DataError(f"{out} exists and is not a prepared dataset; choose another --out, or remove it")
    if not overwrite:
        raise DataError(f"{out} exists already; give --overwrite to make it anew, or choose another --out")


def is_prepared(folder: Path) -> bool:
    """Whether `folder` has an index of ours, whatever its state."""
    try:
        return FORMAT in (folder / INDEX_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def check_room(folder: Path, needed: int) -> None:
    """Raises DataError where the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} has {free / 1e9:.2f} GB of free space, and about {needed / 1e9:.2f} GB are needed; "
            "free some, or choose a folder on another disk"
        )


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """OSErrors as errors for a person: DataError for a full disk, else EnvironmentProblem."""
    try:
        yield
    except DistdlError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(
                f"no space left on the disk of {out}: {error.strerror}. Free some and run the same command "
                "again, which goes on where it stopped; or choose a folder on another disk."
            ) from error
        raise EnvironmentProblem(
            f"cannot write {error.filename or out}: {error.strerror or error}. Choose a folder that can be "
            "written; the cache lies where DISTDL_CACHE says."
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
