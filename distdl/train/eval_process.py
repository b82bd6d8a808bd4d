"""`distdl eval`: the metrics of one checkpoint."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from distdl import errors
from distdl.checkpoint.folders import Place, shown
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import find_latest, verify
from distdl.comm import World, together
from distdl.comm.world import leave
from distdl.data import Feed, Rows
from distdl.data.description import access_of
from distdl.data.table.rows import close
from distdl.engines import Engine
from distdl.errors import CheckpointError, DistdlError
from distdl.observe.console import show
from distdl.plan import Plan
from distdl.recipe import Recipe
from distdl.record import RunDirectory
from distdl.tasks import Task
from distdl.topology import Topology
from distdl.train.evaluate import evaluate
from distdl.train.resume import reading_alone
from distdl.train.setup import build, enter_world, prepare_data


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's weights in an engine, and the data that the recipe names."""

    path: str
    plan: Plan
    world: World
    feed: Feed
    task: Task
    engine: Engine
    data_fingerprint: str
    """Of the data that the checkpoint was trained on."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` reads."""

    plan: Plan
    world: World
    task: Task
    engine: Engine
    eval_rows: Rows


def evaluate_process(recipe: Recipe, topology: Topology, checkpoint: str | None, *, as_json: bool) -> int:
    """Evaluate as one rank; all ranks call it. Rank 0 prints the metrics. Returns the exit code."""
    try:
        path, plan, metrics = _evaluate(recipe, topology, checkpoint)
    except DistdlError as error:
        if topology.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return error.exit_code
    leave()
    if topology.rank == 0:
        if as_json:
            print(json.dumps({"checkpoint": str(path), "rows": plan.eval_rows, **metrics}))  # noqa: T201
        else:
            rows_shown = {"rows": plan.eval_rows} | {k: f"{v:.4f}" for k, v in metrics.items()}
            show("evaluation", rows_shown, {"checkpoint": path})
    return errors.DONE


def _evaluate(
    recipe: Recipe, topology: Topology, checkpoint: str | None
) -> tuple[str, Plan, dict[str, float]]:
    # A function of its own, so that the engine is gone before the process group is left: its last reference
    # to the group must not be dropped while the group's thread still waits for the interpreter's lock.
    found = load(recipe, topology, checkpoint)
    rows = together(found.world, lambda: found.feed.rows(recipe.data.eval_split))
    try:
        evaluation = Evaluation(found.plan, found.world, found.task, found.engine, rows)
        return found.path, found.plan, evaluate(evaluation) or {}
    finally:
        close(rows)


def load(recipe: Recipe, topology: Topology, checkpoint: str | None) -> Loaded:
    """Collective. Join the world, and build the task and an engine with the weights of `checkpoint` (None:
    the newest whole one of the run). Raises on all ranks together.
    """
    world, plan, _ = enter_world(recipe, topology)
    chosen = together(world, lambda: str(checkpoint or _newest(recipe)) if world.is_main else None)
    path = world.from_main(chosen)
    feed = prepare_data(recipe, world, access_of(recipe))
    task, engine = build(recipe, plan, world, topology, feed.info)
    # Rank 0 reads every byte of it for all.
    together(world, lambda: verify(path) if world.is_main else None)
    saved = together(world, lambda: open_checkpoint(path))
    with reading_alone():
        engine.load_model(saved)
    return Loaded(path, plan, world, feed, task, engine, saved.manifest.data_fingerprint)


def _newest(recipe: Recipe) -> Place:
    checkpoints = RunDirectory.of(recipe).checkpoints
    found = find_latest(checkpoints)
    if found.path is None:
        raise CheckpointError(
            f"there is no checkpoint in {shown(checkpoints)}; train first, or give --checkpoint PATH"
        )
    return found.path
