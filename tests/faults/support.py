"""Starting real runs and breaking them from outside."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
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
from tests.commands import Command

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
        self.process = Command(*arguments, env=env, cwd=cwd)

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.close()

    @property
    def output(self) -> str:
        """All that it has printed so far."""
        return self.process.output

    def pids(self) -> list[int]:
        """Every live process of this command's session, or that carries its tag in its environment.

        What it starts over ssh has the tag and a session of its own.
        """
        tag, session = self.tag.encode(), self.process.pid
        return [pid for pid in all_pids() if session_of(pid) == session or tag in environ_of(pid)]

    def finish(self, timeout_s: float = 90.0) -> int:
        """Wait for the command and return its exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            alive = self.pids()
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(
                f"no end within {timeout_s} s; alive {alive}; output:\n{self.output}"
            ) from None

    def wait_for_line(self, words: str) -> None:
        """Wait until the command has printed a line with `words`. Raises AssertionError at its end."""
        self.process.wait_for_line(words)

    def assert_nobody_left(self, within_s: float = 3.0) -> None:
        """All processes of this command are gone, or go within a moment."""
        end = time.monotonic() + within_s
        while (left := self.pids()) and time.monotonic() < end:
            select.select([], [], [], 0.02)
        assert not left, f"left behind: {[(p, command_of(p)) for p in left]}"


def all_pids() -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]


def environ_of(pid: int) -> bytes:
    """What the process was started with; nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes() if stat_of(pid)[0] != "Z" else b""
    except OSError:
        return b""


def session_of(pid: int) -> int:
    """The session of a live process; -1 of one that has ended."""
    state, _, _, session = stat_of(pid)[:4]
    return int(session) if state != "Z" else -1


def parent_of(pid: int) -> int:
    return int(stat_of(pid)[1])


def stat_of(pid: int) -> list[str]:
    """State, parent, group, session and so on (proc(5)); those of a process that has ended are "Z" and -1."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["Z", "-1", "-1", "-1"]


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
    parents = {pid: parent_of(pid) for pid in launched.pids()}
    return [pid for pid, parent in parents.items() if parents.get(parent) == launched.process.pid]


@contextlib.contextmanager
def launched(*arguments: str, fail_at: str = "") -> Iterator[Launched]:
    with Launched(list(arguments), fail_at=fail_at) as command:
        yield command
