"""Accelerate does what one process does, or says that it will not."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distdl.comm import World
from distdl.engines import build_engine
from distdl.engines.accelerate import accelerator, check_accelerator
from distdl.errors import EngineError, PlanError
from distdl.pieces import InMemory
from distdl.plan import make_plan
from distdl.samples import DataInfo
from distdl.testing import assert_same_bits, run_world, worst
from distdl.topology import Topology
from tests.multiprocess.test_fsdp import Driver, Small, recipe_of, trained

INFO = DataInfo("x", {"train": 100, "test": 10}, {}, "f")
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def twice(world: World, changes: dict[str, Any]) -> dict[str, Any]:
    """Two engines in one process; the environment and Accelerate's state are as they were."""
    before = dict(os.environ)
    first = trained(world, "images", "accelerate", changes)
    second = Driver(world, "images", "accelerate", **changes)
    second.engine.load(InMemory(first["state"]))
    assert_same_bits(second.state(), first["state"])
    from accelerate.state import is_initialized

    assert not is_initialized()
    assert dict(os.environ) == before
    return first


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_what_one_process_computes(size: int) -> None:
    changes = {"train": {"ema_decay": 0.9}}
    (alone,) = run_world(trained, 1, "images", "ddp", changes)
    found = run_world(twice, size, changes)
    name, error = worst(found[0]["state"], alone["state"])
    assert error < 1e-5, name
    for rank in found:
        assert_same_bits(rank["state"], found[0]["state"])


def pretended(world: World) -> str:
    """One process, as `accelerate launch --cpu --num_processes 2` starts it."""
    with accelerator(world, torch.device("cpu"), 1, False) as found:
        check_accelerator(found, world, torch.device("cpu"))
        try:
            check_accelerator(found, World(0, 2), torch.device("cpu"))
        except EngineError as error:
            return str(error)
    return "no error"


@pytest.mark.slow
def test_what_accelerate_has_become_is_held_against_the_plan() -> None:
    (error,) = run_world(pretended, 1)
    assert "distributed_type = NO instead of MULTI_CPU, num_processes = 1 instead of 2" in error


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    driver = Driver(World(), "small", "ddp")
    recipe = recipe_of("accelerate")
    engine = build_engine(
        dataclasses.replace(driver.plan, engine="accelerate"), recipe, World(), torch.device("cpu")
    )
    with pytest.raises(EngineError, match=r"pip install \"distdl\[accelerate\]\""):
        engine.setup(Small())


@pytest.mark.parametrize(
    ("environ", "engine"),
    [
        ({}, "accelerate"),
        ({"ACCELERATE_USE_FSDP": "false"}, "accelerate"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, "zero2"),
        ({"ACCELERATE_USE_DEEPSPEED": "1", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "true"}, "fsdp"),
    ],
)
def test_its_own_configuration_chooses_what_wraps_the_model(environ: dict[str, str], engine: str) -> None:
    topology = Topology.from_env(environ)
    recipe = recipe_of("accelerate", train={"precision": "bf16"})
    assert make_plan(recipe, topology, INFO).engine == engine
    other = recipe_of("ddp", train={"precision": "bf16"})
    assert make_plan(other, topology, INFO).engine == "ddp"  # the recipe has not asked for Accelerate


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "train.precision = 'bf16'"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "hardware.compile=true"),
    ],
)
def test_a_configuration_that_the_recipe_contradicts_is_refused(environ: dict[str, str], says: str) -> None:
    recipe = recipe_of("accelerate", train={"precision": "bf16"})
    with pytest.raises(PlanError, match=says):
        make_plan(recipe, Topology.from_env(environ), INFO)


def test_what_it_asks_for_meets_the_limits_of_that_engine() -> None:
    recipe = recipe_of("accelerate", optim={"name": "lamb", "lr": 0.1})
    make_plan(recipe, Topology(), INFO)
    with pytest.raises(PlanError, match="engine 'fsdp' hands the optimiser slices"):
        make_plan(recipe, Topology.from_env({"ACCELERATE_USE_FSDP": "true"}), INFO)


CHECK = """
import os
from distdl.errors import EnvironmentProblem
from distdl.topology import Topology

try:
    Topology.from_env(os.environ)
    print("accepted")
except EnvironmentProblem as error:
    print("refused:", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "says"), [("2", "refused: Accelerate was asked"), ("1", "accepted")])
def test_one_process_where_several_were_asked_for(tmp_path: Path, processes: str, says: str) -> None:
    """Accelerate's own launcher: with `--cpu` it starts one process and says nothing."""
    script = tmp_path / "check.py"
    script.write_text(CHECK)
    places = ("RANK", "WORLD_SIZE", *ADDRESS)
    environ = {k: v for k, v in os.environ.items() if k not in places and not k.startswith("ACCELERATE_")}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", processes]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launch, *options, str(script)],
        env=environ | {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith(says)
