"""Locks between the processes of a node: `flock` on empty files; the kernel frees those of a dead holder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distdl.data.stream.retry import Patience

_LONG_S = 10.0
POLL_S = 0.02
"""How often a lock that somebody else holds is tried. To block in `flock` could not be interrupted."""


@dataclass(frozen=True)
class Locks:
    """Locks by name, in `folder`. Two threads of one process exclude each other, too."""

    folder: Path
    patience: Patience

    @contextmanager
    def shared(self, name: str, holder: str = "") -> Iterator[None]:
        """Hold a lock together with others who only read. Raises Stopped while waiting, OSError.

        `holder` says what somebody who has it alone is about; a person hears it when that takes long.
        """
        with self._held(name, fcntl.LOCK_SH, holder):
            yield

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold a lock alone. Raises Stopped while waiting, OSError."""
        with self._held(name, fcntl.LOCK_EX):
            yield

    @contextmanager
    def attempt(self, name: str) -> Iterator[bool]:
        """Whether nobody has the lock; if so, it is held alone inside the block. Does not wait."""
        descriptor = self._open(name)
        try:
            yield _try(descriptor, fcntl.LOCK_EX)
        finally:
            _release(descriptor)

    @contextmanager
    def _held(self, name: str, kind: int, holder: str = "") -> Iterator[None]:
        descriptor = self._open(name)
        said_at = time.monotonic() + _LONG_S
        try:
            while not _try(descriptor, kind):
                self.patience.wait(POLL_S)
                if holder and time.monotonic() > said_at:
                    self.patience.notice(holder)
                    holder = ""
            yield
        finally:
            _release(descriptor)

    def _open(self, name: str) -> int:
        return os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _release(descriptor: int) -> None:
    # Not by closing alone: a process forked meanwhile has the same descriptor.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
