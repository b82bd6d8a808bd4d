"""Two machines whose only addresses are IPv6."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distdl.testing import assert_same_bits
from slurm.local_cluster import missing
from tests.faults.support import events, tensors_of, write_recipe
from tests.runs import train_here

pytestmark = [pytest.mark.slow, pytest.mark.campaign]

ROOT = Path(__file__).resolve().parents[2]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: fd00::1 and fd00::2."""
    refused = missing()
    if refused:
        pytest.skip(refused)
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this kernel has no IPv6")
    names = [f"distdl-{os.getpid()}-{i}" for i in (1, 2)]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for i, name in enumerate(names, 1):
            ip("-n", name, "-6", "address", "add", f"fd00::{i}/64", "dev", "cable", "nodad")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)


def together(machines: list[str], *words: str, **environ: str) -> list[tuple[int, str]]:
    """(exit code, what it printed) of a command on each machine at once; NODE in it becomes its number."""
    started = []
    for node, name in enumerate(machines):
        command = [sys.executable, "-m", "distdl", *(word.replace("NODE", str(node)) for word in words)]
        mine = {key: value.replace("NODE", str(node)) for key, value in environ.items()}
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                cwd=ROOT,
                env={**os.environ, **mine},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        said = [process.communicate(timeout=90)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_the_doctor_finds_no_fault_with_it(machines: list[str], tmp_path: Path) -> None:
    place = {"RANK": "NODE", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "fd00::1", "MASTER_PORT": "29400"}
    recipe = write_recipe(tmp_path)
    for code, said in together(machines, "doctor", str(recipe), **place, GLOO_SOCKET_IFNAME="cable"):
        assert code == 0, said


def test_a_run_over_ipv6_alone(machines: list[str], tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, train={"max_steps": 20, "reduction": "exact"}), tmp_path / "run"
    where = ["--nodes", "2", "--procs", "1", "--rendezvous", "[fd00::1]:29400", "--node-rank", "NODE"]
    for code, said in together(machines, "launch", str(recipe), *where):
        assert code == 0, said
    assert [e["world_size"] for e in events(run, "start")] == [2]
    calm = write_recipe(tmp_path / "calm", train={"max_steps": 20, "reduction": "exact"})
    train_here(calm, 1)
    assert_same_bits(tensors_of(run), tensors_of(calm.parent / "run"))
