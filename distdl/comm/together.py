"""Errors as values: what fails on one rank fails on all, with its cause, and nobody waits for the dead."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from distdl import errors
from distdl.comm.world import World
from distdl.errors import DistdlError

T = TypeVar("T")


class PeerFailed(DistdlError):
    """Another rank raised something that is not a DistdlError; that rank tells the story."""

    exit_code = errors.RANK_FAILED


_BY_CODE: dict[int, type[DistdlError]] = {
    errors.USAGE: errors.RecipeError,
    errors.ENVIRONMENT: errors.EnvironmentProblem,
    errors.CHECKPOINT: errors.CheckpointError,
    errors.DATA: errors.DataError,
    errors.DIVERGED: errors.Diverged,
    errors.STOPPED_BEFORE_START: errors.Stopped,
    errors.RANK_FAILED: errors.EngineError,
}


def together(world: World, action: Callable[[], T]) -> T:
    """Collective. Run `action` on every rank; return its value where it succeeded everywhere.

    Where it raised on some rank, every rank raises: that rank its own error, the others one of the same
    exit code that names it (`PeerFailed` for an error that distdl did not raise on purpose).
    """
    mine: Exception | None = None
    try:
        value = action()
    except Exception as error:
        mine = error
    share_problem(world, mine)
    return value


@contextmanager
def alone() -> Iterator[None]:
    """Local. Around what may fail on this rank while others wait for it in a collective.

    A DistdlError passes for one that all ranks raise together, which rank 0 reports. Here it becomes a
    RuntimeError with the same text: a crash, which this rank reports by itself.
    """
    try:
        yield
    except DistdlError as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def share_problem(world: World, mine: Exception | None) -> None:
    """Collective. Tell all ranks of this rank's error, if it has one, and raise on all if any has."""
    problem = None
    if mine is not None:
        code = None  # of what was raised on purpose, here
        if isinstance(mine, DistdlError) and not isinstance(mine, PeerFailed):
            code = mine.exit_code
        problem = [code, str(mine), type(mine).__name__, socket.gethostname()]
    problems = world.gather(problem)
    if mine is not None:
        raise mine
    for rank, other in enumerate(problems):
        if other is not None:
            code, text, kind, host = other
            where = f"[rank {rank}/{world.size} on {host}]"
            raise _BY_CODE.get(code, PeerFailed)(f"{where} {text if code else f'{kind}: {text}'}")
