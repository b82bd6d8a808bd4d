"""Every way of starting a run ends with the same parameters, to the bit, in exact mode."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distdl.record import read_lines
from distdl.testing import assert_same_bits
from tests.faults.support import tensors_of, write_recipe
from tests.runs import train_here
from tests.slurm.conftest import ROOT, TestCluster, wait_until

pytestmark = pytest.mark.slow

PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]
ACCELERATE = [PYTHON, "-m", "accelerate.commands.launch", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
DEEPSPEED = [PYTHON, "-m", "deepspeed.launcher.runner"]
TRAIN = ["-m", "distdl", "train"]


def small(folder: Path) -> Path:
    return write_recipe(
        folder,
        batch={"global": 16, "micro": 8},
        train={"max_steps": 4, "reduction": "exact"},
        eval={"every_steps": 100},
        checkpoint={"every_steps": 2},
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process computes."""
    recipe = small(tmp_path_factory.mktemp("alone"))
    train_here(recipe, 1)
    return tensors_of(recipe.parent / "run")


def check(run: Path, alone: Any, world: int, said: str) -> None:
    events = read_lines(run / "events.jsonl")
    assert [e["world_size"] for e in events if e["event"] == "start"] == [world], said
    assert events[-1]["event"] in ("done", "job_end"), said
    assert_same_bits(tensors_of(run), alone)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


# --- on one machine ---

HERE: dict[str, tuple[int, list[str]]] = {
    "bare": (1, [PYTHON, *TRAIN]),
    "distdl launch": (2, [PYTHON, "-m", "distdl", "launch", "--procs", "2"]),
    "torchrun, static": (
        2,
        [*TORCHRUN, "--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port=PORT", *TRAIN],
    ),
    "torchrun, c10d": (
        2,
        [*TORCHRUN, "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *TRAIN],
    ),
    "accelerate": (2, [*ACCELERATE, "--multi_gpu", "--num_processes=2", "--main_process_port=PORT", *TRAIN]),
    "deepspeed": (2, [*DEEPSPEED, "--num_gpus=2", "--master_port=PORT", "--module", "distdl", "train"]),
    "mpirun": (2, ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", PYTHON, *TRAIN]),
}


@pytest.mark.parametrize("way", HERE)
def test_on_one_machine(way: str, tmp_path: Path, alone: Any) -> None:
    world, words = HERE[way]
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    pytest.importorskip(way) if way in ("accelerate", "deepspeed") else None
    recipe = small(tmp_path)
    command = [free_port().join(word.split("PORT")) for word in words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "HF_HOME": str(tmp_path)}
    environment["PATH"] = os.pathsep.join([str(Path(PYTHON).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*command, str(recipe)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check(tmp_path / "run", alone, world, done.stdout + done.stderr)


# --- under Slurm ---

TWO = ["srun", "--nodes=2", "--ntasks-per-node=1"]
SRUN: dict[str, list[str]] = {
    "srun train": [*TWO, PYTHON, *TRAIN],
    "srun train, one node": ["srun", "--nodes=1", "--ntasks=2", PYTHON, *TRAIN],
    "srun distdl launch": [*TWO, PYTHON, "-m", "distdl", "launch", "--nodes=2", "--procs=1"],
    "srun torchrun": [
        *TWO, *TORCHRUN, "--nnodes=2", "--nproc-per-node=1",
        "--rdzv-backend=c10d", "--rdzv-endpoint=node1:29511", *TRAIN,
    ],
}  # fmt: skip


@pytest.mark.parametrize("way", SRUN)
def test_under_srun(way: str, cluster: TestCluster, tmp_path: Path, alone: Any) -> None:
    code, said = cluster.say(*SRUN[way], str(small(tmp_path)))
    assert code == 0, said
    check(tmp_path / "run", alone, 2, said)


def test_submitted(cluster: TestCluster, tmp_path: Path, alone: Any) -> None:
    recipe, run = small(tmp_path), tmp_path / "run"
    words = ["launch", str(recipe), "--on", "slurm", "--nodes", "2", "--procs", "1", "launch.slurm.cpus=2"]
    assert "to start at" in cluster.distdl(*words, "--test-only")
    assert not run.exists()
    said = cluster.distdl(*words)
    number = said.splitlines()[0].removeprefix("job: ")
    assert said.splitlines()[1] == f"run directory: {run}"
    wait_until(lambda: not cluster.queue(), 60, "the job ends")
    log = (run / "slurm" / f"{number}.log").read_text()
    check(run, alone, 2, log)
    assert f"job {number}: exit code 0; over" in log
    assert f"job {number}" in cluster.distdl("slurm", "status", str(run))
    assert "exit code 0; over" in cluster.distdl("slurm", "logs", str(run))


# --- a launcher inside a launcher ---

NESTED = {
    "torchrun in each task": (
        ["srun", "--nodes=1", "--ntasks=2", *TORCHRUN, "--standalone", "--nproc-per-node=1", *TRAIN],
        "srun started torchrun 2 times, and each forms a world of 1 node by itself",
    ),
    "distdl launch in each task": (
        ["srun", "--nodes=1", "--ntasks=2", PYTHON, "-m", "distdl", "launch", "--procs=2"],
        "srun started 2 times `distdl launch` on 1 node",
    ),
    "more nodes than were started": (
        ["srun", "--nodes=1", "--ntasks=1", PYTHON, "-m", "distdl", "launch", "--nodes=2"],
        "2 nodes are asked for and 1 started",
    ),
}


@pytest.mark.parametrize("case", NESTED)
def test_a_launcher_inside_a_launcher_is_explained(case: str, cluster: TestCluster, tmp_path: Path) -> None:
    words, says = NESTED[case]
    code, said = cluster.say(*words, str(small(tmp_path)))
    assert code != 0
    assert says in said
    assert not (tmp_path / "run").exists()
