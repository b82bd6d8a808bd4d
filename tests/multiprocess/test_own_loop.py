"""A loop of one's own: the same run as the one that distdl's loop makes, and what it must not be used for."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from distdl.checkpoint.read import find_latest
from distdl.comm import World
from distdl.errors import EnvironmentProblem
from distdl.recipe import Recipe
from distdl.record import RunDirectory
from distdl.testing import assert_same_bits, run_world
from distdl.testing.worlds import WorldFailed
from distdl.train.own_loop import Options, Run, Step
from tests.multiprocess.test_parity import recipe_for, results
from tests.runs import topology_of, train_rank

ROOT = Path(__file__).resolve().parents[2]


def recipe_of(folder: Path, **hardware: Any) -> Recipe:
    hardware = {"threads": 1, "device": "cpu", "fuse": 1, **hardware}
    reduction = "exact" if hardware.get("engine", "ddp") == "ddp" else "fast"
    return recipe_for(folder, hardware=hardware, train={"reduction": reduction, "ema_decay": 0.9})


def plain(run: Run, step: Step, batch: dict[str, Any]) -> None:
    loss = cross_entropy(run.model(batch["images"]).float(), batch["labels"], reduction="sum")
    step.backward(loss, len(batch["labels"]))


def loop(world: World, recipe: Recipe) -> int:
    """Train, or go on, as the task itself would; returns the exit code."""
    try:
        with Run(recipe, topology_of(world), Options()) as run:
            for step in run.steps():
                for batch in step.microbatches():
                    plain(run, step, batch)
                step.apply()
    except SystemExit as leaving:
        return int(str(leaving.code))
    return 0


@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        pytest.param("fsdp", marks=pytest.mark.slow),
        pytest.param("zero2", marks=(pytest.mark.slow, pytest.mark.campaign)),
    ],
)
@pytest.mark.slow
def test_it_is_the_run_of_the_loop_of_distdl(engine: str, tmp_path: Path) -> None:
    assert run_world(train_rank, 2, recipe_of(tmp_path / "theirs", engine=engine)) == [0, 0]
    assert run_world(loop, 2, recipe_of(tmp_path / "own", engine=engine)) == [0, 0]
    rows, tensors = results(tmp_path / "theirs")
    own_rows, own = results(tmp_path / "own")
    assert_same_bits(own, tensors)
    for key in ("loss", "lr", "grad_norm", "eval_accuracy"):
        assert [row.get(key) for row in own_rows] == [row.get(key) for row in rows]


@pytest.mark.slow
def test_stopped_and_gone_on_with_at_another_size(tmp_path: Path) -> None:
    assert run_world(loop, 1, recipe_of(tmp_path / "whole")) == [0]
    stop = {"DISTDL_FAIL_AT": "1:train.step@5:TERM"}
    # torchrun would start it again for any code but 0.
    assert run_world(loop, 2, recipe_of(tmp_path / "parts"), env=stop) == [0, 0]
    assert "stop" in (tmp_path / "parts" / "events.jsonl").read_text()
    assert run_world(loop, 3, recipe_of(tmp_path / "parts")) == [0] * 3
    assert_same_bits(results(tmp_path / "parts")[1], results(tmp_path / "whole")[1])


def test_what_fails_on_one_rank_ends_it_at_once_with_a_report(tmp_path: Path) -> None:
    with pytest.raises(WorldFailed, match="rank 1 of 2 ---\nthe process died"):
        run_world(fails_on_one, 2, recipe_of(tmp_path), deadline_s=60)
    (report,) = tmp_path.glob("attempts/*/failures/*1*")
    assert "a bug of the user" in report.read_text()


def fails_on_one(world: World, recipe: Recipe) -> None:
    with Run(recipe, topology_of(world), Options()) as run:
        for step in run.steps():
            for batch in step.microbatches():
                plain(run, step, batch)
            if run.rank == 1 and step.number == 3:
                raise ValueError("a bug of the user")
            step.apply()


@pytest.mark.parametrize("how", [train_rank, loop])
@pytest.mark.slow
def test_no_engine_outlives_the_process_group(how: Callable[[World, Recipe], int], tmp_path: Path) -> None:
    """It would end the group with Python's lock held, and now and then hang at the exit."""
    assert run_world(left_at_the_end, 2, how, recipe_of(tmp_path, fuse=1)) == [[], []]


def left_at_the_end(world: World, how: Callable[[World, Recipe], int], recipe: Recipe) -> list[str]:
    """What holds the group, of what is alive when it is destroyed."""
    left: list[str] = ["the group was not destroyed"]
    destroy = dist.destroy_process_group

    def note() -> None:
        left[:] = [type(o).__name__ for o in gc.get_objects() if type(o) is DistributedDataParallel]
        destroy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", note)
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"reduction": "fast"})})
        assert how(world, recipe) == 0
    return left


def test_a_run_directory_is_locked_as_long_as_the_run_is_open(tmp_path: Path) -> None:
    assert run_world(locked, 1, recipe_of(tmp_path))[0] == [True, False]


def locked(world: World, recipe: Recipe) -> list[bool]:
    """Whether another may not have the directory: while the run is open, and after it."""
    found = []
    with Run(recipe, topology_of(world), Options()):
        found.append(in_use(recipe))
    return [*found, in_use(recipe)]


def in_use(recipe: Recipe) -> bool:
    try:
        RunDirectory.of(recipe).lock().close()
    except EnvironmentProblem:
        return True
    return False


def test_a_run_that_diverges_keeps_what_it_was_saving_and_ends_alike_on_all_ranks(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, engine="ddp")
    saving = recipe.checkpoint.model_copy(update={"every_steps": 3})
    limit = recipe.train.model_copy(update={"max_nonfinite_steps": 1})
    recipe = recipe.model_copy(update={"checkpoint": saving, "train": limit})
    assert run_world(diverges, 2, recipe) == [6, 6]
    latest = find_latest(tmp_path / "checkpoints")
    assert latest is not None
    assert latest.manifest.step == 3


def diverges(world: World, recipe: Recipe) -> int:
    """The step after the first save has a gradient that is not finite; returns the exit code."""
    try:
        with Run(recipe, topology_of(world), Options()) as run:
            for step in run.steps():
                for batch in step.microbatches():
                    spoilt = float("nan") if step.number == 3 else 1.0
                    loss = cross_entropy(run.model(batch["images"]), batch["labels"], reduction="sum")
                    step.backward(loss * spoilt, len(batch["labels"]))
                step.apply()
    except SystemExit as leaving:
        return int(str(leaving.code))
    return 0


# --- misuse: an error at once, never a run that is not what it says ---


def no_backward(run: Run, step: Step) -> None:
    for batch in step.microbatches():
        run.model(batch["images"])


def not_all(run: Run, step: Step) -> None:
    for batch in step.microbatches():
        plain(run, step, batch)
        break
    step.apply()


def no_apply(run: Run, step: Step) -> None:
    for batch in step.microbatches():
        plain(run, step, batch)


def apply_twice(run: Run, step: Step) -> None:
    no_apply(run, step)
    step.apply()
    step.apply()


def backward_twice(run: Run, step: Step) -> None:
    for batch in step.microbatches():
        plain(run, step, batch)
        plain(run, step, batch)


def around_the_model(run: Run, step: Step) -> None:
    for batch in step.microbatches():
        loss = sum(p.sum() for p in run.model.parameters())
        step.backward(loss, len(batch["labels"]))


def wrong_count(run: Run, step: Step) -> None:
    for batch in step.microbatches():
        loss = cross_entropy(run.model(batch["images"]), batch["labels"], reduction="sum")
        step.backward(loss, 10 * len(batch["labels"]))


def a_mean_of_each(run: Run, step: Step) -> None:
    for batch in step.microbatches():
        loss = cross_entropy(run.model(batch["images"]), batch["labels"], reduction="none")
        step.backward(loss, len(batch["labels"]))


def outside(run: Run, step: Step) -> None:
    no_apply(run, step)
    run.model(None)


MISUSES: list[tuple[Callable[[Run, Step], None], str]] = [
    (no_backward, "a microbatch has had no step.backward"),
    (not_all, "step.apply before"),
    (no_apply, "a step has had no step.apply"),
    (apply_twice, "step.apply is called once in a step"),
    (backward_twice, "step.backward is called once in each microbatch"),
    (around_the_model, "computed without run.model"),
    (wrong_count, "80 counted, and the recipe's task counts 8 "),
    (a_mean_of_each, "expected one number with a gradient"),
    (outside, "run.model is called inside"),
]


def misused(world: World, recipe: Recipe, misuse: Callable[[Run, Step], None]) -> str:
    try:
        with Run(recipe, topology_of(world), Options()) as run:
            for step in run.steps():
                misuse(run, step)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was said"


@pytest.mark.parametrize(("misuse", "said"), MISUSES)
def test_misuse_is_named(misuse: Callable[[Run, Step], None], said: str, tmp_path: Path) -> None:
    assert said in run_world(misused, 1, recipe_of(tmp_path), misuse)[0]


@pytest.mark.slow
def test_the_example_trains_under_torchrun(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    words += ["-m", "examples.own_loop.train", f"run.dir={tmp_path / 'run'}", "train.max_steps=4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "accuracy after 4 steps: 0." in done.stdout
