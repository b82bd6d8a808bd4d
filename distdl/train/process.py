"""One rank's process, from its place in the world to its exit code."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from distdl import errors
from distdl.checkpoint.folders import name_of, shown
from distdl.checkpoint.store import store_at
from distdl.comm import PeerFailed, together
from distdl.comm.world import Unmet, leave
from distdl.data.description import access_of
from distdl.engines.precision import slow_here
from distdl.errors import DistdlError, Stopped
from distdl.observe.failure import is_consequence, report_failure
from distdl.observe.summary import show_summary
from distdl.recipe import Recipe
from distdl.record import RunDirectory
from distdl.testing import faults
from distdl.topology import Topology
from distdl.train.loop import fit
from distdl.train.notices import Notices
from distdl.train.placement import bind, devices
from distdl.train.resume import Resumed
from distdl.train.saving import settle_after
from distdl.train.session import Session
from distdl.train.setup import Opening, enter_world, open_session
from distdl.train.stop import StopFlag, code_of_a_stop


@dataclass(frozen=True)
class Options:
    """How this process was started. `attempt` and `locked`: a launcher made the folder, holds the lock."""

    allow_changed: bool = False
    attempt: Path | None = None
    locked: bool = False
    terminal: IO[str] | None = None


def train_process(recipe: Recipe, topology: Topology, options: Options) -> int:
    """Train as one rank; all ranks call it. Blocks until the run ends; returns its exit code.

    An error that distdl raises on purpose is reported and becomes its code. Anything else is a crash: it is
    written to the attempt's `failures/`, and the process ends at once with code 70, without a collective.
    """
    stop = StopFlag()
    stop.install(alone=topology.launcher == "none")
    faults.arm_from_environment(topology.rank)
    try:
        code = _run(*open_here(recipe, topology, options, stop))
    except Exception as error:
        code = code_of(error, recipe, topology, stop)
    leave()
    return code


def code_of(error: Exception, recipe: Recipe, topology: Topology, stop: StopFlag) -> int:
    """Report what ended a run on this rank; returns its exit code. A crash does not return: see `crash`."""
    directory = RunDirectory.of(recipe)
    if isinstance(error, PeerFailed) or not isinstance(error, DistdlError):
        crash(error, directory, topology)
    if isinstance(error, Stopped):
        # Before the first step of this attempt; later, ranks agree at a boundary.
        code = code_of_a_stop(directory)
        if topology.rank == 0:
            directory.event("stop", rank=0, signal=stop.signal, saved=code == errors.STOPPED)
        return code
    if topology.rank == 0 or isinstance(error, Unmet):
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
    if topology.rank == 0:
        with contextlib.suppress(OSError):
            if directory.path.is_dir() and error.exit_code != errors.ENVIRONMENT:
                directory.event("error", rank=0, exit_code=error.exit_code, message=str(error))
    return error.exit_code


def crash(error: Exception, directory: RunDirectory, topology: Topology) -> NoReturn:
    """Leave a report and end this process at once. No collective: the other ranks may be gone."""
    where = f"[rank {topology.rank}/{topology.world_size} on {socket.gethostname()}] "
    if is_consequence(error):
        # The rank that died is the cause; a survivor's traceback in front of it would mislead.
        story = f"{type(error).__name__}: another rank is gone\n"
    else:
        story = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):  # a full disk, a terminal that is gone
        if directory.attempts.is_dir():
            report_failure(directory, topology.rank, error)
    with contextlib.suppress(OSError):
        print(f"{where}{story}", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(errors.RANK_FAILED)


def open_here(
    recipe: Recipe, topology: Topology, options: Options, stop: StopFlag
) -> tuple[Session, Resumed]:
    """Collective. Enter the world, make the run directory, open the session. Raises on all ranks together."""
    placement = bind(recipe, topology)
    directory = RunDirectory.of(recipe)
    notices = Notices(topology.rank, directory)
    access = access_of(recipe, notices, lambda: stop.requested)
    world, plan, _ = enter_world(recipe, topology, access)
    faults.point("start.joined")
    held = together(world, lambda: _open_directory(directory, options) if world.is_main else None)
    attempt = Path(world.from_main(held and str(held[0])))
    opening = Opening(recipe, plan, world, topology, directory, attempt, stop, notices)
    session, resumed = open_session(
        opening, allow_changed=options.allow_changed, terminal=options.terminal, quiet=not world.is_main
    )
    session.lock = held and held[1]
    if slow_here(plan.precision, plan.device):
        session.console.say(
            f"slow: this processor has no instructions for train.precision={plan.precision} and imitates "
            "them, many times slower than train.precision=fp32"
        )
    session.console.say(f"{placement}; {devices(plan, topology, os.environ.get('CUDA_VISIBLE_DEVICES'))}")
    faults.point("start.loaded")
    return session, resumed


def announce_start(s: Session, resumed: Resumed) -> None:
    """Say, and write down, where the run goes on, and what is not as it was."""
    for name, reason in resumed.damaged:
        s.console.say(f"damaged checkpoint passed over: {name}: {reason}")
        s.event("damaged_checkpoint", path=name, reason=reason)
    for note in resumed.notes:
        s.console.say(note)
        s.event("damaged_copy", reason=note)
    memory = {"in_memory": True} if resumed.in_memory else {}
    s.event("start", world_size=s.world.size, resumed_from=resumed.path and name_of(resumed.path), **memory)
    if resumed.path:
        which = f"{shown(resumed.path)}{' (from memory)' if resumed.in_memory else ''}"
        s.console.say(f"{'finished already' if finished_already(s) else 'resuming'}: {which}")
    if resumed.changed:
        s.console.say(
            f"the recipe changed; going on at step {s.state.step}, which is sample "
            f"{s.state.step % s.plan.steps_per_epoch * s.plan.global_batch} of epoch "
            f"{s.plan.epoch_of(s.state.step)} now: {'; '.join(resumed.changed)}"
        )
        s.event("recipe_changed", changes=list(resumed.changed))
    if resumed.arithmetic and s.recipe.train.reduction == "exact":
        s.console.say(
            "train.reduction is exact, but from here on bits may differ from those of an undisturbed run: "
            f"{'; '.join(resumed.arithmetic)} (checkpoint -> now)"
        )
        s.event("arithmetic_changed", changes=list(resumed.arithmetic))


def finished_already(s: Session) -> bool:
    """Of a session that has just been opened: nothing is left to do."""
    return s.finished and not s.evaluation_due


def _run(s: Session, resumed: Resumed) -> int:
    announce_start(s, resumed)
    already = finished_already(s)
    try:
        with settling(s):
            code = fit(s)
        if code == errors.DONE and not already:
            s.event("done", **s.results())
    finally:
        s.close()
    if code == errors.DONE and s.world.is_main:
        show_summary(s.directory)
    return code


@contextmanager
def settling(s: Session) -> Iterator[None]:
    """Collective. Around what raises DistdlError on all ranks together: what is being saved is committed."""
    problem: DistdlError | None = None
    try:
        yield
    except PeerFailed:
        raise  # the rank that crashed takes part in nothing any more
    except DistdlError as error:
        problem = error
    if problem is not None:
        settle_after(s)
        raise problem


def _open_directory(directory: RunDirectory, options: Options) -> tuple[Path, IO[str] | None]:
    """Rank 0: the folder of this attempt, and the lock on the run where no launcher holds it."""
    directory.create()
    lock = None if options.locked else directory.lock()
    store_at(directory.checkpoints).sweep()
    return options.attempt or directory.new_attempt(), lock


def exit_code_for(topology: Topology, code: int) -> int:
    """The code that `distdl train` ends with. torchrun restarts its workers on any code but 0, so a stop on
    request leaves as 0 there; events.jsonl says why. Errors keep their codes everywhere.
    """
    stopped = code in errors.STOPS
    return errors.DONE if stopped and topology.launcher == "torchrun" else code
