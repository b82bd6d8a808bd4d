"""Saving, as the loop sees it: when a save begins, when it becomes a checkpoint, and what is written down."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from distdl.checkpoint.folders import Place, name_of
from distdl.checkpoint.retention import Keep
from distdl.checkpoint.store import store_at
from distdl.checkpoint.write import Saver
from distdl.comm import World
from distdl.errors import DistdlError
from distdl.recipe import Recipe

if TYPE_CHECKING:
    from distdl.train.session import Session


def saver_of(recipe: Recipe, place: Place, world: World) -> Saver:
    """The saver that the recipe asks for. Local; all ranks make one, alike."""
    asked = recipe.checkpoint
    keep = Keep(asked.keep, asked.keep_best, asked.keep_every_steps, asked.keep_every_s)
    metric = (recipe.eval.metric, recipe.eval.mode)
    return Saver(store_at(place), world, keep, asynchronous=asked.asynchronous, metric=metric)


def begin_save(s: Session) -> None:
    """Collective. Save at this boundary; an asynchronous save becomes a checkpoint at a later one.

    What is in flight is committed first. The metrics of the step have been written before. Raises
    CheckpointError on all ranks together.
    """
    s.beat("saving")
    begin = time.perf_counter()
    commit(s)
    done = s.saver.save(s.engine.held(), s.facts())
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
    """Collective. As `commit`, and waits until old checkpoints are removed: nothing goes on afterwards."""
    commit(s)
    s.saver.settle()


def settle_after(s: Session) -> None:
    """Collective, where all ranks ended with an error together: what was saved before is committed yet."""
    try:
        settle(s)
    except DistdlError as error:
        s.console.say(f"the checkpoint that was being written is lost: {error}")


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
