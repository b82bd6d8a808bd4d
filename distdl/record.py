"""What a run leaves behind: the run directory, its lock, its events and its metrics.

runs/NAME/
  recipe.yaml                resolved, with its hash
  metrics.jsonl              one object a logged step; after a resume no step stands twice
  events.jsonl               start, save, signal, restart, ...: time, host, rank, cause
  attempts/0001/             plan.json, environment.json, heartbeat, logs/rank-00003.log, failure.json
  checkpoints/step-00001000/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import mmap
import os
import socket
import struct
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from distdl.errors import EnvironmentProblem

if TYPE_CHECKING:
    from distdl.recipe import Recipe


LOCK = ".lock"


class RunDirectory:
    """Paths inside one run's folder, and what is appended there. Creates nothing until `create`.

    `checkpoints` is in the folder unless another path, or the URL of an object store, is given.
    """

    def __init__(self, path: str | Path, checkpoints: str | None = None) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.checkpoints: str | Path = self.path / "checkpoints"
        if checkpoints is not None:
            self.checkpoints = checkpoints if "://" in checkpoints else Path(checkpoints)
        self.attempts = self.path / "attempts"

    @classmethod
    def of(cls, recipe: Recipe) -> RunDirectory:
        """The run directory that `recipe` names."""
        return cls(recipe.run.dir or "runs/unnamed", recipe.checkpoint.dir)

    def create(self) -> None:
        """Make the folders. Raises EnvironmentProblem when that is not possible."""
        try:
            if isinstance(self.checkpoints, Path):
                self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.attempts.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise EnvironmentProblem(
                f"the run directory {self.path} cannot be written: {error.strerror or error}. "
                "Choose another with run.dir=PATH"
            ) from error

    def new_attempt(self) -> Path:
        """Create and return the folder of the next attempt, numbered from 0001."""
        taken = [int(p.name) for p in self.attempts.iterdir() if p.name.isdigit()]
        path = self.attempts / f"{max(taken, default=0) + 1:04d}"
        (path / "logs").mkdir(parents=True)
        return path

    def event(self, kind: str, *, rank: int | None = None, **facts: Any) -> None:
        """Append one event. Any process may, at any time; a line is written in one piece."""
        head = {"time": time.time(), "event": kind, "host": socket.gethostname(), "pid": os.getpid()}
        append_line(self.events, head | ({} if rank is None else {"rank": rank}) | facts)

    def lock(self) -> IO[str]:
        """Hold this run directory until the returned file is closed or the process ends.

        Raises EnvironmentProblem, naming the holder, where another process has it.
        """
        file = open(self.path / LOCK, "a+")  # noqa: SIM115 - held open on purpose
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(file)
            file.close()
            raise EnvironmentProblem(
                f"the run directory {self.path} is in use by {holder}. Wait for it, stop it, or choose "
                "another with run.dir=PATH"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file

    def in_use_by(self) -> str | None:
        """Who holds this run directory; None where nobody does, or where that cannot be told.

        Takes no lock that would keep a run out for longer than a moment, and several may ask at once.
        """
        try:
            with open(self.path / LOCK) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return _holder(file)
        except OSError:
            pass
        return None


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read().strip() or "an unknown process"


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON object as one line with one write, so that several writers never mix."""
    data = json.dumps(_finite(value)).encode() + b"\n"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _finite(value: Any) -> Any:
    # JSON has no NaN; a reader in another language would refuse the file.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without a last line that a kill cut short. Missing file: empty."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader, or a kill, sees the old or the new whole."""
    # Two nodes may have processes of the same number, and share this folder.
    temporary = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def rewind_metrics(path: Path, step: int) -> dict[str, Any]:
    """Drop the rows that a resume at `step` will write again; returns the row of `step` itself, or {}.

    That row stays: an evaluation at `step` that was interrupted adds to it with `put_row`.
    """
    kept = [row for row in read_lines(path) if row["step"] <= step]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    # A line that a kill cut short goes too: the next row would be appended to it and be lost with it.
    if path.exists() and path.read_text() != text:
        write_atomic(path, text)
    return kept[-1] if kept and kept[-1]["step"] == step else {}


def put_row(path: Path, row: dict[str, Any]) -> None:
    """Write `row` in place of the last row, where that has the same step; else after it."""
    rows = read_lines(path)
    if not rows or rows[-1]["step"] != row["step"]:
        append_line(path, row)
    elif rows[-1] != row:
        write_atomic(path, "".join(json.dumps(_finite(r)) + "\n" for r in [*rows[:-1], row]))


PHASES = ("starting", "step", "evaluating", "saving", "finished")


class Heartbeat:
    """A 24-byte memory-mapped file in which rank 0 notes its step and phase at no cost.

    The launcher reads it to tell whether an attempt gained a step; later, whether it hangs.
    """

    _FORMAT = struct.Struct("<qqd")

    def __init__(self, path: Path) -> None:
        with open(path, "a+b") as file:
            file.truncate(self._FORMAT.size)
            self._map = mmap.mmap(file.fileno(), self._FORMAT.size)

    def beat(self, step: int, phase: str) -> None:
        """Note that `step` steps are complete and what goes on now."""
        self._FORMAT.pack_into(self._map, 0, step, PHASES.index(phase), time.time())

    @classmethod
    def read(cls, path: Path) -> tuple[int, str, float]:
        """(steps complete, phase, time of the last beat); (0, "starting", 0.0) before the first."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        if len(data) < cls._FORMAT.size:
            return 0, PHASES[0], 0.0
        step, phase, at = cls._FORMAT.unpack(data)
        return step, PHASES[phase], at
