"""Four nodes of a real Slurm: networks of both kinds, shared out by DDP and by DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distdl.testing import worst
from tests.faults.support import events, tensors_of, write_recipe
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
