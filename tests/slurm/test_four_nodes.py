"""Four nodes of a real Slurm: networks of both kinds, shared out by DDP and by DeepSpeed; a spare node."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distdl.testing import assert_same_bits, worst
from tests.faults.support import events, tensors_of, wait_for_event, write_recipe
from tests.runs import train_here
from tests.slurm.conftest import TestCluster, running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.campaign]

MODELS: dict[str, dict[str, Any]] = {
    "cnn": {"name": "cnn5", "width": 4, "norm": "group", "dropout": 0.2, "hidden": 16},
    "lstm": {"name": "lstm", "embedding": 16, "hidden": 16, "dropout": 0.1},
}


def small(folder: Path, model: dict[str, Any]) -> Path:
    path = write_recipe(folder, train={"max_steps": 8}, eval={"every_steps": 100})
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model": model}))
    return path


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, cluster: TestCluster) -> Iterator[TestCluster]:
    """Another cluster, beside the one of two nodes, which says whether this machine can have any."""
    with running(tmp_path_factory.mktemp("four"), nodes=4) as made:
        yield made


@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
@pytest.mark.parametrize("model", MODELS)
def test_a_job_of_four_nodes(model: str, engine: str, four: TestCluster, tmp_path: Path) -> None:
    recipe = small(tmp_path, MODELS[model])
    words = ["--on", "slurm", "--nodes", "4", "--procs", "1", "--engine", engine, "launch.slurm.cpus=1"]
    said = four.distdl("launch", str(recipe), *words)
    run = Path(said.splitlines()[-1].removeprefix("run directory: "))
    wait_until(lambda: not four.queue(), 240, "the job ends")
    log = four.distdl("slurm", "logs", str(run))
    assert [e["world_size"] for e in events(run, "start")] == [4], log
    assert events(run, "done"), log
    assert "exit code 0; over" in log
    assert "step 8, saved 8, last: job_end" in four.distdl("slurm", "status", str(run))
    alone = tmp_path / "alone"
    train_here(small(alone, MODELS[model]), 1)
    name, error = worst(tensors_of(run), tensors_of(alone / "run"))
    assert error < 1e-4, f"{name} differs by {error:.1e}"


@pytest.mark.timeout(300)
def test_a_node_without_power_is_replaced_by_a_spare_one(four: TestCluster, tmp_path: Path) -> None:
    """Slurm starts the job again on the nodes that are left; no step that was saved is lost."""
    run = four.submit(write_recipe(tmp_path, **LONG))
    wait_for_event(run, "save")
    place = four.say("squeue", "--noheader", "--format=%N")[1].strip()
    assert place == "node[1-2]"
    four.control("off", "node2")
    try:
        wait_until(lambda: "down" in four.say("sinfo", "-hn", "node2", "-o%t")[1], 90, "Slurm notices")
        noticed = time.time()
        first = wait_for_event(run, "first_step", 2, timeout_s=150)["time"]
        again = events(run, "job_start")[-1]["time"]
        print(
            f"\nfrom Slurm's notice to the next step {first - noticed:.0f} s, from the job's new start to it"
        )
        print(f"{first - again:.0f} s")
        assert first - noticed < 60
        wait_until(lambda: not four.queue(), 150, "the job ends")
    finally:
        four.control("boot", "node2")
    assert [e["restarts"] for e in events(run, "job_start")] == [0, 1]
    assert [e["world_size"] for e in events(run, "start")] == [2, 2]
    assert "node2" not in {e["host"] for e in events(run, "launch")[2:]}
    check_bits(run, tmp_path / "calm")


LONG: dict[str, Any] = {
    "train": {"max_steps": 1000, "reduction": "exact"},
    "eval": {"every_steps": 1000},
    "launch": {"timeout_s": 5.0},
}


def check_bits(run: Path, folder: Path) -> None:
    """They are those that one process computes undisturbed."""
    calm = write_recipe(folder, **LONG)
    train_here(calm, 1)
    assert_same_bits(tensors_of(run), tensors_of(calm.parent / "run"))


@pytest.mark.timeout(400)
def test_a_node_whose_link_stays_cut_is_named_and_replaced_by_a_spare_one(
    four: TestCluster, tmp_path: Path
) -> None:
    """It lives on, cut off, with a rank that nobody hears; nothing of the job is left on it in the end."""
    run = four.submit(write_recipe(tmp_path, **LONG))
    wait_for_event(run, "save")
    four.control("link", "node2", "down")
    try:
        wait_for_event(run, "first_step", 2, timeout_s=200)
        wait_until(lambda: not four.queue(), 150, "the job ends")
        log = "".join(path.read_text() for path in (run / "slurm").glob("*.log"))
        assert "node 1 (node2) with rank 1 is lost" in log
        assert "node2" not in {e["host"] for e in events(run, "launch")[2:]}
        wait_until(lambda: not four.workers("node2"), 60, "the rank that was cut off ends")
    finally:
        four.control("link", "node2", "up")
        wait_until(lambda: four.cluster.idle() == 4, 90, "the node is back")
    check_bits(run, tmp_path / "calm")
