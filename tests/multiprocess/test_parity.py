"""The same run at any world size: ids, learning rates, losses, parameters; and a resume to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import find_latest
from distdl.data import Full
from distdl.plan import make_plan
from distdl.recipe import Recipe, parse_recipe
from distdl.record import read_lines
from distdl.samples import DataInfo
from distdl.testing import assert_same_bits, run_world, worst
from distdl.topology import Topology
from tests.runs import train_rank

STEPS = 12


def recipe_for(folder: Path, **changes: dict[str, Any]) -> Recipe:
    """A small network on the embedded images: 13 steps an epoch, the last one short."""
    sections: dict[str, Any] = {
        "task": {"name": "image_classification"},
        "model": {"name": "cnn5", "width": 4, "norm": "group", "dropout": 0.3, "hidden": 16},
        "data": {"name": "fashion_mnist", "augment": {"flip": True, "crop_padding": 2}},
        "batch": {"global": 64, "micro": 8},
        "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "clip_norm": 1.0},
        "schedule": {"name": "cosine", "warmup_steps": 4},
        "train": {"max_steps": STEPS, "seed": 3},
        "eval": {"every_epochs": None},
        "checkpoint": {"every_steps": 5, "keep": 9},
        "track": {"every_steps": 1},
        # Fused, a rank's microbatches meet in one sum over their rows, in another order (test_fuse.py).
        "hardware": {"threads": 1, "device": "cpu", "fuse": 1},
        "run": {"dir": str(folder)},
    }
    for name, section in changes.items():
        old = {} if "name" in section else sections.get(name, {})
        sections[name] = {**old, **section}
    return parse_recipe(sections)


def train(folder: Path, size: int, **changes: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train to the end; returns (rows of metrics, tensors of the newest checkpoint)."""
    assert run_world(train_rank, size, recipe_for(folder, **changes)) == [0] * size
    return results(folder)


def results(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    found = find_latest(folder / "checkpoints")
    assert found.path is not None
    assert found.manifest is not None
    saved = open_checkpoint(found.path)
    return read_lines(folder / "metrics.jsonl"), {name: saved.whole(name) for name in saved.metas}


def check_learns_alike(alone: Path, together: Path) -> None:
    """Two runs have the same bits, losses and measures, and their loss went down."""
    rows, tensors = results(alone)
    others, other_tensors = results(together)
    assert_same_bits(other_tensors, tensors)
    losses = [row["loss"] for row in rows]
    assert [row["loss"] for row in others] == losses
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    measured = {key: value for key, value in rows[-1].items() if key.startswith("eval_")}
    assert measured
    assert all(math.isfinite(value) for value in measured.values())
    assert measured == {key: others[-1][key] for key in measured}


SMOOTH = {"model": {"name": "tests.multiprocess.own_models:Smooth"}}
"""A sum in another order differs in its last bits. Where an activation is within them of a kink, its gradient
is on in one run and off in the other, and a bias that few activations move differs by 1e-3: that is not what
is tested here.
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return train(tmp_path_factory.mktemp("one"), 1, **SMOOTH)


SLOWER = [pytest.param(size, marks=pytest.mark.slow) for size in (3, 4)]


@pytest.mark.parametrize("size", [2, *SLOWER])
def test_world_size_does_not_change_the_run(size: int, alone: Any, tmp_path: Path) -> None:
    rows, tensors = train(tmp_path, size, **SMOOTH)
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    for mine, theirs in zip(rows, alone[0], strict=True):
        assert mine["lr"] == theirs["lr"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["samples"] == theirs["samples"]
    name, error = worst(tensors, alone[1])
    print(f"\nworld {size} against 1 after {STEPS} steps: worst relative error {error:.2e} ({name})")
    assert error < 1e-5
    assert rows[-1]["eval_accuracy"] == alone[0][-1]["eval_accuracy"]


def test_every_step_trains_on_the_same_samples_at_any_world_size() -> None:
    recipe = recipe_for(Path("unused"))
    info = DataInfo("x", {"train": 1003, "test": 100}, {}, "f")
    order = Full(recipe.train.seed, 1003)

    def ids(size: int, step: int) -> list[int]:
        plan = make_plan(recipe, Topology.of(1, size), info)
        runs = [m for r in range(size) for m in plan.microbatches_of(step, r) if m.weight]
        return [i for m in runs for i in order.ids(plan.epoch_of(step), m.start, m.stop).tolist()]

    for step in range(40):
        assert all(ids(size, step) == ids(1, step) for size in (2, 3, 4, 5, 8))
    epoch = [i for step in range(16) for i in ids(3, step)]
    assert sorted(epoch) == list(range(1003))


def test_two_microbatches_on_two_ranks_are_bit_identical_to_one_rank(tmp_path: Path) -> None:
    """A sum of two terms has one order only. BatchNorm's running statistics are exact as well."""
    changes = {"model": {"norm": "batch"}, "train": {"max_steps": 15, "seed": 3}, "batch": {"micro": 32}}
    one = train(tmp_path / "one", 1, **changes)
    two = train(tmp_path / "two", 2, **changes)
    assert_same_bits(two[1], one[1])
    assert two[0][-1]["eval_loss"] == one[0][-1]["eval_loss"]


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.slow
def test_resume_is_bit_identical(size: int, tmp_path: Path) -> None:
    """Stopped at a step between two checkpoints, by a signal to one rank, in the middle of an epoch."""
    whole = train(tmp_path / "whole", size)
    parts = recipe_for(tmp_path / "parts")
    stop = {"DISTDL_FAIL_AT": f"{size - 1}:train.step@6:USR1"}
    assert run_world(train_rank, size, parts, env=stop) == [75] * size
    assert run_world(train_rank, size, parts) == [0] * size
    rows, tensors = results(tmp_path / "parts")
    assert_same_bits(tensors, whole[1])
    volatile = ("time", "samples_per_s")
    strip = [{k: v for k, v in r.items() if k not in volatile} for r in rows]
    assert strip == [{k: v for k, v in r.items() if k not in volatile} for r in whole[0]]


@pytest.mark.slow
def test_adamw_resumes_at_another_world_size(tmp_path: Path) -> None:
    whole = train_adamw(tmp_path / "whole", 1)
    assert (
        run_world(train_rank, 3, adamw(tmp_path / "parts"), env={"DISTDL_FAIL_AT": "2:train.step@6:TERM"})
        == [75] * 3
    )
    assert run_world(train_rank, 2, adamw(tmp_path / "parts")) == [0, 0]
    assert_same_bits(results(tmp_path / "parts")[1], whole)


def adamw(folder: Path) -> Recipe:
    sections = json.loads(recipe_for(folder).model_dump_json(by_alias=True))
    sections["optim"] = {"name": "adamw", "lr": 0.003}
    # Max-pooling ties on these images, and AdamW makes much of rounding: in fast mode it shows after a while.
    sections["train"]["reduction"] = "exact"
    return parse_recipe(sections)


def train_adamw(folder: Path, size: int) -> dict[str, torch.Tensor]:
    assert run_world(train_rank, size, adamw(folder)) == [0] * size
    return results(folder)[1]
