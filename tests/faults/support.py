"""Starting real runs and breaking them from outside."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from distdl.checkpoint.folders import Place
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import find_latest
from distdl.record import read_lines

TAG = "DISTDL_TEST_TAG"


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A small network on the embedded images; a step takes about 10 ms. Returns the recipe's file."""
    sections: dict[str, Any] = {
        "task": {"name": "image_classification"},
        "model": {"name": "cnn5", "width": 4, "norm": "batch", "dropout": 0.2, "hidden": 16},
        "data": {"name": "fashion_mnist"},
        "batch": {"global": 32, "micro": 8},
        "optim": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
        "train": {"max_steps": 60, "seed": 1},
        "eval": {"every_steps": 25},
        "checkpoint": {"every_steps": 10, "keep": 3},
        "track": {"every_steps": 10},
        "hardware": {"threads": 1, "device": "cpu"},
        "run": {"dir": str(folder / "run")},
    }
    for name, section in changes.items():
        sections[name] = {**sections.get(name, {}), **section}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's newest checkpoint."""
    return tensors_at(run / "checkpoints")


def tensors_at(place: Place) -> dict[str, torch.Tensor]:
    """The tensors of the newest checkpoint in a folder or below a URL."""
    found = find_latest(place)
    assert found.path is not None
    saved = open_checkpoint(found.path)
    return {name: saved.whole(name) for name in saved.metas}


class Launched:
    """One `distdl` command in a process group of its own, and everything it starts."""

    def __init__(self, arguments: list[str], *, fail_at: str = "", cwd: Path | None = None) -> None:
        self.tag = uuid.uuid4().hex
        env = {**os.environ, TAG: self.tag, "PYTHONUNBUFFERED": "1"}
        env.pop("DISTDL_FAIL_AT", None)
        if fail_at:
            env["DISTDL_FAIL_AT"] = fail_at
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distdl", *arguments],
            env=env,
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.output = ""

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def pids(self) -> list[int]:
        """Every live process that carries this command's tag in its environment."""
        return [pid for pid in all_pids() if self.tag.encode() in environ_of(pid)]

    def finish(self, timeout_s: float = 90.0) -> int:
        """Wait for the command and return its exit code; everything it printed is in `output`."""
        try:
            self.output += self.process.communicate(timeout=timeout_s)[0]
        except subprocess.TimeoutExpired:
            alive = self.pids()
            os.killpg(self.process.pid, signal.SIGKILL)
            self.output += self.process.communicate()[0]
            raise AssertionError(
                f"no end within {timeout_s} s; alive {alive}; output:\n{self.output}"
            ) from None
        return self.process.returncode

    def wait_for_line(self, words: str) -> None:
        """Read what the command prints until a line has `words`. Raises AssertionError at its end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if words in line:
                return
        raise AssertionError(f"ended without saying {words!r}:\n{self.output}")

    def assert_nobody_left(self, within_s: float = 3.0) -> None:
        """All processes of this command are gone, or go within a moment."""
        end = time.monotonic() + within_s
        while (left := self.pids()) and time.monotonic() < end:
            select.select([], [], [], 0.02)
        assert not left, f"left behind: {[(p, command_of(p)) for p in left]}"


def all_pids() -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]


def environ_of(pid: int) -> bytes:
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return b""
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "?"


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_lines(run / "events.jsonl") if e["event"] == kind]


def wait_for_event(run: Path, kind: str, count: int = 1, timeout_s: float = 60.0) -> dict[str, Any]:
    """The `count`-th event of that kind, as soon as it is written."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = events(run, kind)
        if len(found) >= count:
            return found[count - 1]
        select.select([], [], [], 0.01)
    raise AssertionError(f"{len(events(run, kind))} of {count} events {kind!r} within {timeout_s} s")


def worker_pids(launched: Launched) -> list[int]:
    """Ranks' processes: children of the fork server, which is a child of the launcher."""
    tagged = launched.pids()
    parents = {pid: parent_of(pid) for pid in tagged}
    servers = [p for p in tagged if "forkserver" in command_of(p) and parents[p] == launched.process.pid]
    return [p for p in tagged if parents[p] in servers]


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


@contextlib.contextmanager
def launched(*arguments: str, fail_at: str = "") -> Iterator[Launched]:
    with Launched(list(arguments), fail_at=fail_at) as command:
        yield command
