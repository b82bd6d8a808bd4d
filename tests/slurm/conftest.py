"""A real Slurm cluster of two nodes, for all tests in this folder."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slurm.local_cluster import Cluster, missing

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "local_cluster.py"


class TestCluster:
    """The cluster, and commands as its user gives them on the login node."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(folder)
        self.environment = {**self.cluster.environment, "PYTHONPATH": str(ROOT)}

    def say(self, *words: str, on: str = "ctl", timeout_s: float = 90) -> tuple[int, str]:
        """Run a command to its end: (exit code, all that it printed)."""
        command = self.cluster.inside(on, ["env", f"--chdir={ROOT}", *words])
        done = subprocess.run(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return done.returncode, done.stdout

    def distdl(self, *words: str) -> str:
        """A `distdl` command that has to succeed; what it printed."""
        code, said = self.say(sys.executable, "-m", "distdl", *words)
        assert code == 0, said
        return said

    def control(self, *words: str) -> None:
        """A `local-cluster` command. In a process of its own: what it starts is no child of pytest's."""
        command = [sys.executable, str(SCRIPT), "--dir", str(self.cluster.folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    def queue(self) -> list[str]:
        """The states of all jobs that have not ended."""
        return self.say("squeue", "--noheader", "--format=%T")[1].split()

    def workers(self, node: str) -> list[str]:
        """The process ids of the ranks on a node: forked from its fork server, and named like it."""
        _, said = self.say("ps", "-eww", "-o", "pid=", "-o", "ppid=", "-o", "args=", on=node)
        rows = [line.split(None, 2) for line in said.splitlines()]
        forked = {pid: parent for pid, parent, command in rows if "multiprocessing.forkserver" in command}
        return [pid for pid, parent in forked.items() if parent in forked]

    def submit(self, recipe: Path, *words: str, nodes: str = "2") -> Path:
        """Submit a run to two nodes, one process each; returns its run directory."""
        options = ["--on", "slurm", "--nodes", nodes, "--procs", "1", "launch.slurm.cpus=2"]
        said = self.distdl("launch", str(recipe), *options, *words)
        return Path(said.splitlines()[-1].removeprefix("run directory: "))

    def processes(self) -> list[str]:
        """What runs on the nodes beside their daemons: node and command."""
        daemons = ("bash -c while", "sleep 1000", "slurmd ", "ps -e")
        return [
            f"{node}: {line}"
            for node in self.cluster.nodes
            for line in self.say("ps", "-e", "-o", "args=", on=node)[1].splitlines()
            if not line.startswith(daemons)
        ]

    def assert_nobody_left(self, within_s: float) -> None:
        """No job and no process of one is left, or they go in time."""
        end = time.monotonic() + within_s
        while left := [*self.queue(), *self.processes()]:
            assert time.monotonic() < end, f"left behind: {left}"
            select.select([], [], [], 0.1)


@contextmanager
def running(folder: Path, nodes: int) -> Iterator[TestCluster]:
    """A cluster of its own, as long as the block runs."""
    made = TestCluster(folder / "state")
    made.control("up", str(nodes))
    try:
        yield made
    finally:
        made.control("down")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """Skips, saying why, where this machine cannot have one."""
    if missing():
        pytest.skip(missing())
    with running(tmp_path_factory.mktemp("cluster"), nodes=2) as made:
        yield made


def wait_until(condition: Callable[[], object], limit_s: float, why: str) -> None:
    """Look every tenth of a second. Raises AssertionError."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s:g} s: {why}"
        select.select([], [], [], 0.1)
