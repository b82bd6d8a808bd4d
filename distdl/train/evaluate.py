"""Evaluation: every sample exactly once, and the same figures whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from distdl.capabilities import ENGINES
from distdl.comm import World, share_problem, together
from distdl.comm.together import alone
from distdl.engines.precision import autocast, dtype_of
from distdl.errors import Stopped
from distdl.plan import Plan, share
from distdl.tasks import Batch, Columns
from distdl.testing.faults import point

if TYPE_CHECKING:
    from distdl.data import Rows
    from distdl.engines import Engine
    from distdl.tasks import Task

BOUNDARY = 8
"""Microbatches between two agreements on stopping and errors."""


Measured = Any
"""What `Task.measure` returns, or sum and count by metric: JSON, since nothing received is unpickled."""


class Evaluated(Protocol):
    """What an evaluation needs; a `Session` is one."""

    @property
    def plan(self) -> Plan: ...
    @property
    def world(self) -> World: ...
    @property
    def task(self) -> Task: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def eval_rows(self) -> Rows: ...


def evaluate(s: Evaluated, stop_agreed: Callable[[], bool] | None = None) -> dict[str, float] | None:
    """Collective. The metrics over all evaluation rows; None where `stop_agreed` turned true midway.

    Rows are cut into microbatches in their stored order, shared out over the ranks; no row is repeated to
    fill a batch. Sums are added exactly (math.fsum), so the shares do not matter.
    """
    total = -(-s.plan.eval_rows // s.plan.micro_batch)
    lo, hi = share(total, s.world.rank, s.world.size)
    found: list[Measured] = []
    problem: Exception | None = None
    halted = False
    # Where a forward communicates, ranks must not enter one that another never will: they agree before each,
    # and a rank without a microbatch repeats one.
    gathers = ENGINES[s.plan.engine].gathers and s.world.size > 1
    with s.engine.evaluating():
        for i in range(-(-total // s.world.size)):
            mine = lo + i if lo + i < hi else total - 1 if gathers else None
            batch = None
            if mine is not None and problem is None and not halted:
                try:
                    point("eval.batch", i)
                    batch = fetch(s, *_bounds(s, mine))
                except Stopped:
                    halted = True  # told to stop while it waited for data
                except Exception as error:
                    problem = error
            if (gathers or i % BOUNDARY == 0) and _agree(s.world, problem, halted):
                return None
            if i % BOUNDARY == 0 and stop_agreed is not None and stop_agreed():
                return None
            if batch is not None:
                try:
                    # Where it communicates the others are inside this forward: no boundary to tell them at.
                    with alone() if gathers else nullcontext():
                        measured = measure(s, batch)
                except Exception as error:
                    if gathers:
                        raise
                    problem = error
                    continue
                if lo + i < hi:
                    found.append(measured)
        if _agree(s.world, problem, halted):
            return None
    everything = [m for part in s.world.gather(found) for m in part]
    return together(s.world, lambda: metrics_of(s.task, everything))


def _bounds(s: Evaluated, number: int) -> tuple[int, int]:
    start = number * s.plan.micro_batch
    return start, min(start + s.plan.micro_batch, s.plan.eval_rows)


def _agree(world: World, problem: Exception | None, halted: bool) -> bool:
    """Whether any rank was told to stop; raises on all where any has a problem."""
    failed, stopped = world.sum_ints([int(problem is not None), int(halted)])
    if failed:
        share_problem(world, problem)
    return stopped > 0


def fetch(s: Evaluated, start: int, stop: int) -> Batch:
    """Evaluation rows [start, stop), collated and on the engine's device."""
    return s.engine.place(s.task.collate(Columns(s.eval_rows.gather(np.arange(start, stop)))))


def measure(s: Evaluated, batch: Batch) -> Measured:
    """What the task notes of one batch. Call inside `engine.evaluating`."""
    with torch.no_grad(), autocast(s.engine.device.type, dtype_of(s.plan.precision)):
        if hasattr(s.task, "measure"):
            return s.task.measure(s.engine.module, batch)
        sums = s.task.metric_sums(s.engine.module, batch)
    return {name: (float(total), int(count)) for name, (total, count) in sums.items()}


def metrics_of(task: Task, found: list[Measured]) -> dict[str, float]:
    """The metrics of all batches, in their order. Local, and the same on every rank."""
    if hasattr(task, "metrics"):
        return {name: float(value) for name, value in task.metrics(found).items()}
    names = found[0].keys() if found else ()
    return {
        name: exact_sum(m[name][0] for m in found) / max(sum(m[name][1] for m in found), 1) for name in names
    }


def exact_sum(values: Iterable[float]) -> float:
    """The exactly rounded sum, whatever the order (math.fsum); NaN where infinities meet or it overflows."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):
        return math.nan
