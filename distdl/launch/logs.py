"""One log file a rank, and rank 0 on the terminal as well."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import IO


class Tee(io.TextIOBase):
    """Text written here goes to the log and to the terminal."""

    def __init__(self, log: IO[str], terminal: IO[str]) -> None:
        self.log = log
        self._terminal = terminal

    def write(self, text: str) -> int:
        self.log.write(text)
        # Whoever read along may have gone away (`| head`); the run goes on, and the log has it all.
        with contextlib.suppress(OSError):
            self._terminal.write(text)
            self._terminal.flush()
        return len(text)

    def flush(self) -> None:
        self.log.flush()


def redirect(path: Path, *, to_terminal: bool) -> IO[str] | None:
    """Send standard output and error of this process to the log file `path`.

    With `to_terminal`, what Python prints also goes to the terminal, which is returned. What native code
    prints (file descriptors 1 and 2) goes to the log alone, so that a crash leaves its words there.
    """
    terminal = os.fdopen(os.dup(1), "w", buffering=1) if to_terminal else None
    log = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = log if terminal is None else Tee(log, terminal)
    sys.stderr = sys.stdout
    return terminal


def tail(path: Path, lines: int = 20, most_bytes: int = 16384) -> str:
    """The last lines of a file; empty where there is none."""
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - most_bytes))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
