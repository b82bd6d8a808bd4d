"""What needs a GPU. Without one, all of it is skipped, and says so; no GPU has run it yet."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from distdl.capabilities import ENGINES
from distdl.comm import World
from distdl.testing import assert_same_bits, run_world
from distdl.testing.parity import relative_error
from distdl.train.arithmetic import settle
from tests.multiprocess.contract import CASES, by_hand, drive, plan_for, recipe_for

GPUS = torch.cuda.device_count()
one = pytest.mark.skipif(GPUS < 1, reason=f"needs a GPU that torch can use; there are {GPUS}")
two = pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs that torch can use; there are {GPUS}")
STEPS = 6
FUSABLE = next(name for name, case in CASES.items() if case.optim["name"] in ("sgd", "adamw"))


def on_gpu(world: World, name: str, hardware: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    hardware = {**hardware, "device": "cuda"}
    recipe = recipe_for(CASES[name], hardware, train)
    settle(plan_for(recipe, world.size), recipe.train.reduction)
    torch.cuda.set_device(world.rank)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    run = drive(world, name, hardware, train)
    for step in range(STEPS):
        assert run.step(step).updated
    optimizer: torch.optim.Optimizer = vars(run.engine)["_optimizer"]
    facts = {
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "device": run.engine.device.type,
        "fused": bool(optimizer.param_groups[0].get("fused")),
    }
    return {n: t.cpu() for n, t in (run.state() | run.facts).items()} | {"facts": facts}


@one
@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("name", ["cnn_groupnorm", "tied"])
def test_one_gpu_computes_what_the_cpu_does(engine: str, name: str) -> None:
    """No dropout here: a GPU draws other masks. TF32 off."""
    found = run_world(on_gpu, 1, name, {"engine": engine}, {})[0]
    assert found["facts"]["device"] == "cuda"
    wanted = by_hand(name, STEPS)
    errors = {n: relative_error(found[n], t) for n, t in wanted.items()}
    assert max(errors.values()) < 1e-4, errors


@one
@pytest.mark.parametrize("name", list(CASES))
def test_exact_repeats_to_the_bit(name: str) -> None:
    exact = {"reduction": "exact"}
    first, second = (run_world(on_gpu, 1, name, {"engine": "ddp"}, exact)[0] for _ in range(2))
    assert first.pop("facts")["workspace"] in (":4096:8", ":16:8")
    second.pop("facts")
    assert_same_bits(first, second)


@one
@pytest.mark.parametrize(("reduction", "fused"), [("fast", True), ("exact", False)])
def test_optimisers_are_fused_but_in_exact_mode(reduction: str, fused: bool) -> None:
    found = run_world(on_gpu, 1, FUSABLE, {"engine": "ddp"}, {"reduction": reduction})[0]
    assert found["facts"]["fused"] is fused


@two
@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("name", list(CASES))
def test_two_gpus_compute_what_one_does(engine: str, name: str) -> None:
    alone = run_world(on_gpu, 1, name, {"engine": "ddp"}, {})[0]
    alone.pop("facts")
    for found in run_world(on_gpu, 2, name, {"engine": engine}, {}):
        errors = {n: relative_error(found[n], t) for n, t in alone.items()}
        assert max(errors.values()) < 1e-4, errors


@two
def test_exact_has_the_same_bits_on_one_and_two_gpus() -> None:
    exact = {"reduction": "exact"}
    alone = run_world(on_gpu, 1, "cnn_batchnorm", {"engine": "ddp"}, exact)[0]
    pair = run_world(on_gpu, 2, "cnn_batchnorm", {"engine": "ddp"}, exact)[0]
    alone.pop("facts")
    pair.pop("facts")
    assert_same_bits(pair, alone)


@one
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("engine", list(ENGINES))
def test_short_arithmetic_trains(precision: str, engine: str) -> None:
    found = run_world(on_gpu, 1, "lstm_ragged", {"engine": engine}, {"precision": precision})[0]
    wanted = by_hand("lstm_ragged", STEPS)
    assert float(found["norm/0"]) == pytest.approx(float(wanted["norm/0"]), rel=0.1)
