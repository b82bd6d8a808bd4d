"""Which neighbouring microbatches a rank runs as one forward and backward.

The plan says how many at most. Whether this model's result stays that of separate passes is found out once,
by trial, in the first step in which a rank could join two; with `hardware.fuse: auto` on CUDA, the memory
that separate passes took in the step before lowers the number. All ranks decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from distdl.capabilities import ENGINES
from distdl.comm.together import alone
from distdl.engines import Group, Pass
from distdl.engines.groups import Rehearsal, groups_of, has_batchnorm, unfusable
from distdl.engines.precision import autocast, dtype_of
from distdl.keys import key, seed_everything
from distdl.samples import PACKED
from distdl.tasks import Batch
from distdl.train.batches import Micro
from distdl.train.joining import join, joinable, pad, rows_of, runs

if TYPE_CHECKING:
    from distdl.comm import World
    from distdl.engines import Engine
    from distdl.observe.console import RunConsole
    from distdl.plan import Plan
    from distdl.recipe import Recipe
    from distdl.tasks import Task
    from distdl.train.state import TrainState

TOLERANCE = {"fp32": 1e-4, "fp16": 1e-3, "bf16": 5e-3}
"""Relative, between the sum of two separate losses and the joint one: far above what rounding in that
precision does, far below what coupled samples or a mean instead of a sum do."""

_SPARE = 0.1
"""Share of the free GPU memory that is left free."""


@dataclass
class Fusing:
    """What a rank has found out. `most`: microbatches a pass; None: not settled yet."""

    most: int | None = None
    padding: Mapping[str, float] = field(default_factory=dict)
    _before: int | None = None
    _growth: int | None = None

    def watch_memory(self) -> None:
        """From here on the most memory that is in use counts as that of a separate pass."""
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def passes_done(self) -> None:
        """The passes of a step are over; the optimiser's memory does not count."""
        if self._before is not None and self._growth is None:
            self._growth = torch.cuda.max_memory_allocated() - self._before

    def may_hold(self, wanted: int) -> int:
        """How many of `wanted` microbatches fit into this rank's memory at once, as far as is known."""
        if self._growth is None:
            return wanted
        free, _ = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return fitting(wanted, self._growth, free + reserved)

    @property
    def measured(self) -> bool:
        return self._growth is not None


class Training(Protocol):
    """What these functions read of a `Session`."""

    recipe: Recipe
    plan: Plan
    world: World
    task: Task
    engine: Engine
    state: TrainState
    console: RunConsole
    fusing: Fusing

    def event(self, kind: str, **facts: Any) -> None: ...


def fitting(wanted: int, growth: int, free: int) -> int:
    """How many microbatches of `growth` bytes each fit into `free` bytes, a tenth kept; 1 to `wanted`."""
    if growth <= 0:
        return wanted
    return max(1, min(wanted, int(free * (1 - _SPARE)) // growth))


def keeps_apart(s: Training, micros: Sequence[Micro]) -> bool:
    """Whether this rank wants all microbatches of this step separate. Where engines communicate in each pass
    the ranks must have equally many, so one rank's wish binds all: the step boundary sums it.
    """
    if not ENGINES[s.plan.engine].equal_counts or s.world.size == 1 or s.plan.fuse == 1:
        return False
    even = len(set(s.plan.counts(s.state.step))) == 1
    return not even or not joinable([m.batch for m in micros], padding_of(s))


def passes_of(s: Training, micros: list[Micro], *, apart: bool) -> list[list[Micro]]:
    """This rank's microbatches of the step, cut into passes; each by itself where `apart`, which all ranks
    agree on (`keeps_apart`). Collective until `Fusing.most` is settled.
    """
    separate = [[m] for m in micros]
    if s.plan.fuse == 1 or apart or max(s.plan.counts(s.state.step)) == 1:
        return separate
    f = s.fusing
    if f.most == 1:
        return separate
    if f.most is None:
        if s.engine.device.type == "cuda" and s.recipe.hardware.fuse == "auto" and not f.measured:
            f.watch_memory()
            return separate
        _settle(s, micros)
    passes: list[list[Micro]] = []
    for lo, hi in runs(len(micros), f.most or 1):
        chunk = micros[lo:hi]
        fits = all(m.weight for m in chunk) and joinable([m.batch for m in chunk], f.padding)
        passes += [chunk] if fits else [[m] for m in chunk]
    return passes


def joined(s: Training, micros: Sequence[Micro], *, last: bool) -> tuple[Batch, Pass]:
    """One batch of neighbouring microbatches on the engine's device, and what the engine needs to know."""
    # Joined on the device, where a copy costs least; each comes there from its own pinned memory.
    placed = [s.engine.place(m.batch) for m in micros]
    batch, extents = join(placed, s.fusing.padding)
    seed, step = s.recipe.train.seed, s.state.step
    groups = tuple(
        Group(m.number, m.count, rows_of(m.batch), key(seed, "model", step, m.number), extent)
        for m, extent in zip(micros, extents, strict=True)
    )
    return batch, Pass(groups, micros[0].weight, last, sum(s.plan.counts(s.state.step)))


def padding_of(s: Training) -> Mapping[str, float]:
    """The task's `padding`; none where there is BatchNorm, whose statistics it would enter."""
    declared: Mapping[str, float] = getattr(s.task, "padding", None) or {}
    return {} if has_batchnorm(s.engine.module) or s.plan.order in PACKED else declared


def _settle(s: Training, micros: Sequence[Micro]) -> None:
    """Collective. Decide `most` for the rest of the run, and say why where it is one."""
    f = s.fusing
    f.padding = padding_of(s)
    pair = [m for m in micros if m.weight][:2]
    able = len(pair) == 2 and joinable([m.batch for m in pair], f.padding)
    pair = [_widened(s, m, i) for i, m in enumerate(pair)] if able else pair
    reason = unfusable(s.engine.module) or (_miscounted(s, pair) if able else None)
    # Before any forward: where one communicates, all ranks enter it or none does.
    known = any(why is not None for why in s.world.gather(reason))
    if able and not known:
        reason = _trial(s, pair)
    votes = s.world.gather([reason, able, f.may_hold(s.plan.fuse)])
    reasons = [why for why, _, _ in votes if why is not None]
    if not reasons and not any(able for _, able, _ in votes):
        reasons = [
            f"their tensors ({_shapes(pair)}) differ, and nothing says how to fill them up (`padding` of "
            "the task)"
        ]
    f.most = 1 if reasons else min(most for _, _, most in votes)
    if f.most == 1:
        why = reasons[0] if reasons else "the GPU memory holds no two of them at once"
        s.event("separate_passes", reason=why)
        s.console.say(f"microbatches are run one by one: {why}")


def _trial(s: Training, pair: Sequence[Micro]) -> str | None:
    """Why two microbatches as one are not the same as each by itself; None where they are.

    Three forwards in training mode, without gradient or trace, on every rank that has two microbatches; with
    an engine whose forward communicates, every rank has.
    """
    gathers = ENGINES[s.plan.engine].gathers and s.world.size > 1
    try:
        # Where it communicates the others are inside this forward: no boundary to tell them at.
        with alone() if gathers else nullcontext():
            return _compare(s, pair)
    except Exception as error:
        if gathers:
            raise
        return f"a joint forward failed: {type(error).__name__}: {error}"


def _miscounted(s: Training, pair: Sequence[Micro]) -> str | None:
    """Local. Why two microbatches cannot be joined, or do not count as much as each by itself; else None."""
    try:
        batch, _ = joined(s, pair, last=False)
        count = s.task.count(batch)
    except Exception as error:
        return f"two cannot be joined and counted: {type(error).__name__}: {error}"
    if count != sum(m.count for m in pair):
        return f"task.count of two together is {count}, of each {pair[0].count} and {pair[1].count}"
    return None


def _widened(s: Training, micro: Micro, i: int) -> Micro:
    """The second of two with one more column of padding, so that the trial always has some to deal with."""
    padding = s.fusing.padding
    batch = {
        name: pad(t, t.shape[1] + 1, padding[name]) if i and name in padding and t.ndim > 1 else t
        for name, t in micro.batch.items()
    }
    return Micro(micro.number, batch, micro.count, micro.weight)


def _compare(s: Training, pair: Sequence[Micro]) -> str | None:
    model, task, precision = s.engine.module, s.task, s.plan.precision
    batch, this = joined(s, pair, last=False)
    rehearsal = Rehearsal(model, s.engine.device)
    with rehearsal(), autocast(s.engine.device.type, dtype_of(precision)):
        apart = []
        for group, micro in zip(this.groups, pair, strict=True):
            seed_everything(group.key)
            apart.append(float(task.loss_sum(model, s.engine.place(micro.batch))))
        seed_everything(this.groups[0].key)
        with groups_of(model, this):
            value, reason = rehearsal.watch(lambda: float(task.loss_sum(model, batch)))
    if reason is not None:
        return reason
    expected = math.fsum(apart)
    if not abs(value - expected) <= TOLERANCE[precision] * max(abs(expected), 1e-6):
        return (
            f"the loss of two together is {value:.7g}, the sum of each by itself {expected:.7g}: the model "
            "or the loss couples samples, or the loss is no sum"
        )
    return None


def _shapes(micros: Sequence[Micro]) -> str:
    return " against ".join(", ".join(f"{k} {list(t.shape)}" for k, t in m.batch.items()) for m in micros)
