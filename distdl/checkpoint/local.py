"""`LocalStore`: checkpoints below a directory that all ranks share. See `distdl.checkpoint.store.Store`."""

from __future__ import annotations

import os
from pathlib import Path

from distdl.checkpoint.disk import aside, remove, require_room, sync_directory, write_durably
from distdl.checkpoint.folders import CHUNK, Folder, LocalFolder, Place
from distdl.checkpoint.manifest import MANIFEST, step_name, step_of
from distdl.errors import CheckpointError
from distdl.testing import faults

TEMPORARY = "tmp"


class LocalStore:
    """A save happens in `step-N.tmp-<random>`, renamed once all is written: any POSIX file system."""

    def __init__(self, directory: Path) -> None:
        self.place: Place = directory
        self._directory = directory

    def __str__(self) -> str:
        return str(self._directory)

    def steps(self) -> list[int]:
        """See `Store`."""
        if not self._directory.is_dir():
            return []
        found = (step_of(name) for name in os.listdir(self._directory))
        return sorted((step for step in found if step is not None), reverse=True)

    def begin(self, step: int, needed: int) -> str:
        """See `Store`. The attempt is the name of its directory."""
        if not self._directory.is_dir():
            self._directory.mkdir(parents=True)
            sync_directory(self._directory.parent)
        require_room(self._directory, needed)
        temporary = aside(self._directory / step_name(step), TEMPORARY)
        temporary.mkdir()
        return temporary.name

    def mark(self, attempt: str) -> str:
        """See `Store`: the directory is mark enough."""
        return ""

    def create(self, attempt: str, step: int, file: str, nbytes: int) -> LocalSink:
        """See `Store`."""
        try:
            return LocalSink(self._directory / attempt / file)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self._directory / attempt} is not there, though rank 0 has made it: the run directory has "
                "to be on a file system that all nodes share"
            ) from error

    def written(self, attempt: str, step: int) -> Folder:
        """See `Store`."""
        return LocalFolder(self._directory / attempt)

    def commit(self, attempt: str, step: int, manifest: bytes, kept_as: str | None) -> None:
        """See `Store`."""
        temporary, target = self._directory / attempt, self._directory / step_name(step)
        write_durably(temporary / MANIFEST, manifest)
        faults.point("save.manifest_written", step)
        sync_directory(temporary)
        faults.point("save.before_rename", step)
        if kept_as is not None:
            target.rename(aside(target, kept_as))
        temporary.rename(target)
        self.sync()
        faults.point("save.renamed", step)

    def sync(self) -> None:
        """Make the names in the directory durable."""
        sync_directory(self._directory)

    def stands(self, step: int) -> bool:
        """See `Store`."""
        return os.path.lexists(self._directory / step_name(step))

    def is_committed(self, attempt: str, step: int) -> bool:
        """See `Store`."""
        return self.stands(step) and not (self._directory / attempt).exists()

    def discard(self, attempt: str, step: int) -> None:
        """See `Store`."""
        if (self._directory / attempt).exists():
            remove(self._directory / attempt)

    def remove(self, step: int) -> None:
        """See `Store`."""
        path = self._directory / step_name(step)
        # The new name first: a kill in the middle of the removal then leaves what `sweep` takes.
        remove(path.rename(aside(path, TEMPORARY)))

    def sweep(self) -> list[str]:
        """See `Store`."""
        if not self._directory.is_dir():
            return []
        left = [name for name in os.listdir(self._directory) if _is_temporary(name)]
        for name in left:
            remove(self._directory / name)
        return left


class LocalSink:
    """A new file. Raises FileExistsError where there is one: nothing that stands is ever written into."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by finish or abandon)

    def write(self, data: memoryview) -> None:
        """See `Sink`."""
        while data:
            data = data[self._file.write(data[:CHUNK]) :]  # may be short, on a disk that is nearly full

    def finish(self) -> None:
        """See `FileSink`."""
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def abandon(self) -> None:
        """See `FileSink`."""
        self._file.close()


def _is_temporary(name: str) -> bool:
    step, mark, rest = name.partition(f".{TEMPORARY}-")
    return bool(mark and rest) and step_of(step) is not None
