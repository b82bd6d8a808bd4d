"""The script that makes a cluster: safe to run twice, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path

import pytest

from slurm.local_cluster import missing
from tests.faults.support import all_pids, command_of

pytestmark = [pytest.mark.slow, pytest.mark.campaign]

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "local-cluster"


def mounts() -> list[str]:
    return Path("/proc/self/mounts").read_text().splitlines()


def test_up_and_down_twice(tmp_path: Path) -> None:
    if missing():
        pytest.skip(missing())
    folder = tmp_path / uuid.uuid4().hex[:12]

    def say(*words: str, folder: Path = folder) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", str(SCRIPT), "--dir", str(folder), *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    before, mounted = {*all_pids()}, mounts()
    code, said = say("up", "1", folder=tmp_path / ("long" * 20))
    assert (code, "is too long by" in said) == (3, True), said
    try:
        for _ in range(2):
            code, said = say("up", "1")
            assert (code, "up: 1 nodes" in said) == (0, True), said
        assert say("up", "2") == (3, "error: a cluster of 1 nodes is up; take it down first\n")
        assert say("exec", "srun", "hostname") == (0, "node1\n")
        assert "node1" in say("status")[1]
        assert say("link", "node1", "rate", "100")[0] == 0
        assert say("off", "node1")[0] == 0
        code, said = say("on", "node1", "true")
        assert (code, "node1 is off" in said) == (3, True), said
        assert say("boot", "node1")[0] == 0
        assert say("boot", "node1")[0] == 0
        assert say("on", "node1", "hostname") == (0, "node1\n")
    finally:
        down = [say("down"), say("down")]
    assert down == [(0, ""), (0, "")]
    left = [command for pid in {*all_pids()} - before if str(folder) in (command := command_of(pid))]
    daemons = [c for pid in {*all_pids()} - before if (c := command_of(pid)).startswith(("slurm", "munged"))]
    assert (left, daemons) == ([], [])
    assert not folder.exists()
    assert mounts() == mounted
