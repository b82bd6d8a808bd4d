"""The prediction of memory: what is shared out is divided, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from core_support import images, plan_for, recipe_with

from distdl.memory import FP32, Memory, ModelSizes, predict
from distdl.plan import make_plan
from distdl.topology import Topology

SIZES = ModelSizes(parameters=1200, trainable=800, largest=400, units=(600,), buffers=10, activations=5000)


def predicted(world: int, **changes: dict[str, Any]) -> Memory:
    hardware = {"fuse": 1, **changes.pop("hardware", {})}
    batch = {"global": 16, "micro": 4}
    changes = {"optim": {"name": "adamw", "lr": 0.1}, "batch": batch, **changes, "hardware": hardware}
    return predict(recipe_with(**changes), plan_for(world, **changes), SIZES)


@pytest.mark.parametrize(
    ("engine", "weights", "gradients", "optimizer"),
    [
        ("ddp", 1200, 800, 1600),
        ("zero0", 1200, 800, 1600),
        ("zero1", 1200, 800, 400),
        ("zero2", 1200, 200, 400),
        ("zero3", 300, 200, 400),
        ("fsdp", 300, 200, 400),
    ],
)
def test_each_engine_divides_what_it_shards(
    engine: str, weights: int, gradients: int, optimizer: int
) -> None:
    found = predicted(4, hardware={"engine": engine})
    assert found.weights == FP32 * (weights + SIZES.buffers)
    assert found.gradients == FP32 * gradients
    assert found.optimizer == FP32 * optimizer
    assert found.activations == SIZES.activations
    alone = predicted(1, hardware={"engine": engine})
    assert (alone.weights, alone.gradients) == (FP32 * 1210, FP32 * 800)
    assert alone.communication == 0


def test_the_optimiser_counts_its_slots_and_its_sharding() -> None:
    assert predicted(1, optim={"name": "sgd", "lr": 0.1}).optimizer == 0
    assert predicted(1, optim={"name": "sgd", "lr": 0.1, "momentum": 0.9}).optimizer == FP32 * 800
    assert predicted(4, hardware={"shard_optimizer": True}).optimizer == FP32 * 400


def test_an_average_of_the_weights_and_the_sum_of_all() -> None:
    found = predicted(2, train={"epochs": 1, "ema_decay": 0.99})
    assert found.average == FP32 * 1200
    assert (
        found.as_dict()["total"] == found.total == sum(v for k, v in found.as_dict().items() if k != "total")
    )
    assert found.shown()["activations"] == "0 MiB"


def test_hybrid_shards_are_divided_inside_a_node() -> None:
    hybrid = {"engine": "fsdp", "fuse": 1, "hybrid_shard": True}
    changes = {"optim": {"name": "adamw", "lr": 0.1}, "batch": {"global": 16, "micro": 4}, "hardware": hybrid}
    recipe = recipe_with(**changes)
    plan = make_plan(recipe, Topology.of(2, 2, cpus=4), images())
    found = predict(recipe, plan, SIZES)
    assert (found.gradients, found.optimizer) == (FP32 * 400, FP32 * 800)
    assert found.weights == FP32 * (600 + SIZES.buffers)


def test_zero_holds_buckets_and_no_second_copy_of_the_weights() -> None:
    # The sizes of `benchmarks/memory.py`; measured there, in MiB, by stage.
    unit = 8_396_800
    sizes = ModelSizes(100_055_050, 100_055_050, 7_680_000, (unit,) * 11, 0, 8 * 2**20)
    changes: dict[str, Any] = {"optim": {"name": "adamw", "lr": 0.1}, "batch": {"global": 16, "micro": 4}}
    for stage, measured in {0: 1945, 2: 1316, 3: 1062}.items():
        changes["hardware"] = {"fuse": 1, "engine": f"zero{stage}"}
        found = predict(recipe_with(**changes), plan_for(2, **changes), sizes).total / 2**20
        assert found == pytest.approx(measured, rel=0.15), stage
