"""What every test is held to: it leaves the process, and the machine, as it found them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir

# A failure is reported with the code that repeats it, so nothing needs to be kept on disk for the next run.
hypothesis.settings.register_profile("distdl", database=None, deadline=None, print_blob=True)
hypothesis.settings.load_profile("distdl")

_NOT_THE_TESTS = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")
"""Set by pytest for each test, and by torch when it first imports its compiler."""


def pytest_configure(config: pytest.Config) -> None:
    # hypothesis caches tables beside its database, too: into a folder that goes when pytest does.
    folder = tempfile.TemporaryDirectory(prefix="distdl-hypothesis-")
    set_hypothesis_home_dir(Path(folder.name))
    config.add_cleanup(folder.cleanup)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums on one thread have the same bits everywhere, and several tests share the cores of a machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves an environment variable, a process group or a child process behind.

    What was there before the test, from a fixture of the whole module say, is not held against it. Whatever
    is found is undone, so that the tests after it do not fail as well.
    """
    environment, processes = _environment(), set(_descendants())
    yield
    problems = [
        *_environment_changes(environment),
        *_process_group(),
        *_children(processes),
    ]
    if problems:
        pytest.fail("the test left something behind:\n  " + "\n  ".join(problems), pytrace=False)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _NOT_THE_TESTS}


def _environment_changes(before: dict[str, str]) -> list[str]:
    after = _environment()
    changed = [n for n in sorted({*before, *after}) if before.get(n) != after.get(n)]
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    return [f"environment variable {n}: {before.get(n)!r} -> {after.get(n)!r}" for n in changed]


def _process_group() -> list[str]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    torch.distributed.destroy_process_group()
    return ["an initialised torch.distributed process group"]


def _children(before: set[int]) -> list[str]:
    multiprocessing.active_children()  # takes leave of those that have ended
    left = {pid: name for pid, name in _descendants().items() if pid not in before}
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    return [f"child process {pid} ({name})" for pid, name in left.items()]


def _descendants() -> dict[int, str]:
    """Process id -> name of all processes below this one; without multiprocessing's own two servers."""
    servers = {
        getattr(forkserver._forkserver, "_forkserver_pid", None),
        getattr(resource_tracker._resource_tracker, "_pid", None),
    }
    table = _process_table()
    found: dict[int, str] = {}
    parents = {os.getpid()}
    while parents:
        below = {pid: name for pid, (parent, name) in table.items() if parent in parents and pid not in found}
        found.update(below)
        parents = set(below)
    return {pid: name for pid, name in found.items() if pid not in servers}


def _process_table() -> dict[int, tuple[int, str]]:
    """Process id -> (parent, name), from Linux's /proc; empty elsewhere."""
    table: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
            table[int(entry.name)] = (int(rest.split()[1]), name)
    return table
