"""Every error that distdl raises on purpose, and the exit code that each one ends a command with.

    DistdlError
    ├── RecipeError            2   the recipe or an override cannot be read or is not valid
    ├── PlanError              2   a valid recipe that this hardware or data cannot run
    ├── EnvironmentProblem     3   the machine: an unwritable or locked run directory, a missing device
    ├── LaunchError           70   a rank failed and the restart budget is spent
    ├── EngineError           70   the engine cannot do what the plan asks
    ├── CheckpointError        4
    │   ├── Incomplete             no manifest, or a file of it is missing
    │   ├── Corrupt                a size, a hash or the manifest itself is wrong
    │   └── Incompatible           a checkpoint of another recipe or another model
    ├── DataError              5   missing, unreadable or unsuitable data
    ├── Diverged               6   too many non-finite steps in a row
    └── Stopped              143   no error: a wait that ended because a stop was asked for

Three codes have no exception: 75, stopped on request with everything saved (a scheduler should requeue);
143, stopped before there was anything to save; and 130, ended at once by a second Ctrl-C.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

DONE = 0
USAGE = 2
ENVIRONMENT = 3
CHECKPOINT = 4
DATA = 5
DIVERGED = 6
RANK_FAILED = 70
STOPPED = 75
STOPPED_BEFORE_START = 143
STOPS = (STOPPED, STOPPED_BEFORE_START)
"""Of a run that was asked to stop: no failure."""


class DistdlError(Exception):
    """Base of every error raised on purpose. The message says what is wrong and what to do about it."""

    exit_code: ClassVar[int] = 1


class RecipeError(DistdlError):
    """A recipe or an override that cannot be read, or that says something not allowed."""

    exit_code = USAGE


class PlanError(DistdlError):
    """A valid recipe that cannot run on this hardware or this data."""

    exit_code = USAGE


class EnvironmentProblem(DistdlError):
    """The machine is in the way: an unwritable or locked run directory, a missing device or library."""

    exit_code = ENVIRONMENT


class LaunchError(DistdlError):
    """A rank failed and the restart budget is spent."""

    exit_code = RANK_FAILED


class EngineError(DistdlError):
    """The engine cannot do what the plan asks of it."""

    exit_code = RANK_FAILED


class CheckpointError(DistdlError):
    """A checkpoint could not be written or read."""

    exit_code = CHECKPOINT


class Incomplete(CheckpointError):
    """A checkpoint without its manifest, or without one of the files its manifest names."""


class Corrupt(CheckpointError):
    """A checkpoint whose bytes are not those that were written."""


class Incompatible(CheckpointError):
    """A sound checkpoint that belongs to another recipe or another model."""


class DataError(DistdlError):
    """Data that is missing, unreadable or not what the task needs."""

    exit_code = DATA


class Diverged(DistdlError):
    """Training produced too many non-finite steps in a row."""

    exit_code = DIVERGED


class Stopped(DistdlError):
    """A wait for data ended because a stop was asked for. Not an error: whoever asked for it expects it."""

    exit_code = STOPPED_BEFORE_START


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'momentum'?``, or an empty string where nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    if not close:
        return ""
    return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
