"""Learning-rate schedules: pure functions of the update number, in steps of the run, never of a rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distdl.plan import Plan
    from distdl.recipe import Recipe
    from distdl.recipe.optimisers import Cosine, OneCycle, Step


def learning_rate(recipe: Recipe, plan: Plan, update: int) -> float:
    """The learning rate of update number `update` (from 0) of the run.

    Skipped steps are not updates, so a skipped step does not move the schedule.
    """
    schedule, peak = recipe.schedule, recipe.optim.lr
    if schedule.name == "one_cycle":
        return peak * _one_cycle(schedule, update, plan.total_steps)
    warmup = schedule.warmup_steps
    if update < warmup:
        return peak * (update + 1) / warmup
    if schedule.name == "cosine":
        return peak * _cosine(schedule, update - warmup, plan.total_steps - warmup)
    if schedule.name == "step":
        return peak * _step(schedule, update, plan.steps_per_epoch)
    return peak


def _cosine(schedule: Cosine, update: int, length: int) -> float:
    """Loshchilov and Hutter, SGDR (arXiv 1608.03983), equation 5, one period."""
    done = min(update / max(length, 1), 1.0)
    return _between(1.0, schedule.final_factor, done)


def _one_cycle(schedule: OneCycle, update: int, length: int) -> float:
    """Smith and Topin, Super-Convergence (arXiv 1708.07120): cosine up to the peak, cosine down."""
    done = min(update / max(length - 1, 1), 1.0)
    if done < schedule.peak_at:
        return _between(schedule.start_factor, 1.0, done / schedule.peak_at)
    return _between(1.0, schedule.final_factor, (done - schedule.peak_at) / (1 - schedule.peak_at))


def _step(schedule: Step, update: int, steps_per_epoch: int) -> float:
    every = schedule.every_steps or (schedule.every_epochs or 1) * steps_per_epoch
    return float(schedule.gamma ** (update // every))


def _between(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
