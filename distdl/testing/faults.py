"""Faults on purpose: the code names points, a test says what happens at one of them.

`point("save.hashed")` costs one attribute test in normal use. A test arms it in its own process with
`fail_at`, or in processes it starts through the environment variable DISTDL_FAIL_AT:

    DISTDL_FAIL_AT="1:save.before_manifest:kill"      rank 1 is killed there (the first time it gets there)
    DISTDL_FAIL_AT="*:train.step@40:raise"            any rank raises InjectedFault when the step is 40
    DISTDL_FAIL_AT="0:save.begin:TERM>launcher"       rank 0 sends SIGTERM to the launcher

Several faults are separated by commas. Actions: kill, raise, enospc, NAME (a signal to oneself, such as
TERM or USR1), NAME>launcher, NAME>all (this process group: the launcher and all its workers).
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

VARIABLE = "DISTDL_FAIL_AT"


class InjectedFault(RuntimeError):
    """Raised by the action `raise`."""


@dataclass
class Fault:
    """One armed fault: at which rank and point, and what happens."""

    rank: int | None
    point: str
    action: str
    spent: bool = False


_armed: list[Fault] = []
_rank = 0


def parse(text: str) -> list[Fault]:
    """Read the syntax above. Raises ValueError where it is not followed."""
    faults = []
    for part in filter(None, text.split(",")):
        rank, name, action = part.split(":")
        faults.append(Fault(None if rank == "*" else int(rank), name, action))
    return faults


def arm_from_environment(rank: int) -> None:
    """Called once by each worker: remember my rank and arm what DISTDL_FAIL_AT names."""
    global _rank
    _rank = rank
    if VARIABLE in os.environ:
        _armed.extend(parse(os.environ[VARIABLE]))


def point(name: str, step: int | None = None) -> None:
    """Name a place where a fault can happen. `step` also matches faults written `name@step`."""
    if _armed:
        _trigger(name, step)


def _trigger(name: str, step: int | None) -> None:
    names = {name, f"{name}@{step}"}
    for fault in _armed:
        if not fault.spent and fault.point in names and fault.rank in (None, _rank):
            fault.spent = True
            _act(fault.action, name)


def _act(action: str, where: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise InjectedFault(f"injected at {where}")
    elif action == "enospc":
        raise OSError(errno.ENOSPC, "No space left on device")
    else:
        name, _, target = action.partition(">")
        _send(target, signal.Signals[f"SIG{name}"])


def _send(target: str, number: signal.Signals) -> None:
    if target == "launcher":
        os.kill(int(os.environ["DISTDL_LAUNCHER_PID"]), number)
    elif target == "all":
        os.killpg(os.getpgrp(), number)
    else:
        os.kill(os.getpid(), number)


@contextmanager
def fail_at(rank: int | None, name: str, action: str = "raise", my_rank: int = 0) -> Iterator[None]:
    """Arm one fault in this process while the block runs. `rank` None means any."""
    global _rank
    before, _rank = _rank, my_rank
    fault = Fault(rank, name, action)
    _armed.append(fault)
    try:
        yield
    finally:
        _armed.remove(fault)
        _rank = before
