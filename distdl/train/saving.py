"""Saving, as the loop sees it: when a save begins, when it becomes a checkpoint, and what is written down."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distdl.checkpoint.folders import Place, name_of
from distdl.checkpoint.replicas.keeper import Replicas, open_replicas
from distdl.checkpoint.retention import Keep
from distdl.checkpoint.store import store_at
from distdl.checkpoint.write import Saver
from distdl.comm import World
from distdl.errors import DistdlError
from distdl.recipe import Recipe

if TYPE_CHECKING:
    from distdl.train.session import Session


def replicas_of(recipe: Recipe, run: Path, world: World, say: Callable[[str], None]) -> Replicas | None:
    """Collective. The copies in memory that the recipe asks for; None where there are none."""
    if recipe.checkpoint.replicas == "none":
        return None
    return open_replicas(run, world, say, recipe.launch.timeout_s)


def saver_of(recipe: Recipe, place: Place, world: World, replicas: Replicas | None = None) -> Saver:
    """The saver that the recipe asks for. Local; all ranks make one, alike."""
    asked = recipe.checkpoint
    keep = Keep(asked.keep, asked.keep_best, asked.keep_every_steps, asked.keep_every_s)
    metric = (recipe.eval.metric, recipe.eval.mode)
    return Saver(
        store_at(place), world, keep, asynchronous=asked.asynchronous, metric=metric, replicas=replicas
    )


def begin_save(s: Session) -> None:
    """Collective. Save at this boundary; an asynchronous save becomes a checkpoint at a later one.

    What is in flight is committed first. The metrics of the step have been written before. Raises
    CheckpointError on all ranks together.
    """
    s.beat("saving")
    begin = time.perf_counter()
    commit(s)
    held = s.engine.held() | (s.carry.held() if s.carry is not None else {})
    done = s.saver.save(held, s.facts())
    s.saved_step = s.state.step
    s.stall_s = time.perf_counter() - begin
    s.not_training(s.stall_s)
    if done is not None:
        _note(s)


def commit(s: Session) -> None:
    """Collective. Make what is in flight, if anything is, a checkpoint; waits until it is written."""
    if s.saver.in_flight is None:
        return
    begin = time.perf_counter()
    s.saver.commit()
    took = time.perf_counter() - begin
    s.stall_s += took
    s.not_training(took)
    _note(s)


def settle(s: Session) -> None:
    """Collective. As `commit`, and waits until old checkpoints are removed: nothing goes on afterwards.

    Copies in memory go as well: the run ends in good order, and all of it is in its place.
    """
    _settle(s)
    if s.replicas is not None:
        s.replicas.forget()


def _settle(s: Session) -> None:
    commit(s)
    s.saver.settle()


def settle_after(s: Session) -> None:
    """Collective, where all ranks ended with an error together: what was saved before is committed yet.

    Copies in memory stay: the disk may be what failed.
    """
    try:
        _settle(s)
    except DistdlError as error:
        s.console.say(f"the checkpoint that was being written is lost: {error}")
    if s.replicas is not None:
        s.replicas.settle()


def _note(s: Session) -> None:
    """`seconds`: from the boundary to the commit. `stall_s`: of these, how long training waited."""
    last = s.saver.last
    assert last is not None
    if s.world.is_main:
        name = name_of(last.place)
        s.directory.event(
            "save",
            rank=0,
            step=last.step,
            path=name,
            seconds=round(last.seconds, 4),
            stall_s=round(s.stall_s, 4),
        )
