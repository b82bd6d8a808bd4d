"""`Session`: everything one rank holds while it trains, and the pieces of a step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import IO, Any

from distdl.checkpoint.manifest import Facts
from distdl.checkpoint.replicas.keeper import Replicas
from distdl.checkpoint.write import Saver
from distdl.comm import World, share_problem
from distdl.data import Rows
from distdl.data.table.rows import close
from distdl.engines import Engine
from distdl.errors import Stopped
from distdl.observe.console import RunConsole
from distdl.plan import Plan
from distdl.recipe import Recipe
from distdl.record import Heartbeat, RunDirectory
from distdl.tasks import Task
from distdl.train.batches import Batches, Micro
from distdl.train.carrying import Carry
from distdl.train.fusing import Fusing, keeps_apart
from distdl.train.resume import Identity
from distdl.train.state import TrainState
from distdl.train.stop import StopFlag


@dataclass(frozen=True)
class StepBatch:
    """This rank's microbatches of a step, and the count of the whole step over all ranks.

    `apart`: on some rank they cannot be joined, and the engine needs equally many passes on all.
    `all_written`: what is being saved is written on all ranks, so that it can be committed.
    """

    micros: list[Micro]
    total: int
    apart: bool = False
    all_written: bool = False


@dataclass
class Session:
    """One rank's run. Everything that changes while it trains is in `state`; the rest is fixed or derived."""

    recipe: Recipe
    plan: Plan
    world: World
    task: Task
    engine: Engine
    state: TrainState
    directory: RunDirectory
    console: RunConsole
    stop: StopFlag
    heartbeat: Heartbeat | None
    batches: Batches
    eval_rows: Rows
    identity: Identity
    saver: Saver
    replicas: Replicas | None = None
    carry: Carry | None = None
    """None where nothing is carried from step to step."""
    lock: IO[str] | None = None
    """What keeps others out of the run directory, where this process and no launcher holds it."""
    fusing: Fusing = field(default_factory=Fusing)
    saved_step: int | None = None
    """The last step whose save has begun, or that was resumed from."""
    stall_s: float = 0.0
    """How long training has waited for the save that began last."""
    resumed_step: int | None = None
    row: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    stepped: bool = False
    clock: float = field(default_factory=time.perf_counter)
    clock_samples: int = 0
    started: float = field(default_factory=time.perf_counter)
    started_samples: int = 0

    def beat(self, phase: str) -> None:
        """Note step and phase where the launcher and a person can see them."""
        if self.heartbeat is not None:
            self.heartbeat.beat(self.state.step, phase)

    def event(self, kind: str, **facts: Any) -> None:
        """Rank 0 writes an event; the others do nothing."""
        if self.world.is_main:
            self.directory.event(kind, rank=0, step=self.state.step, **facts)

    def not_training(self, seconds: float) -> None:
        """Keep time spent on evaluation or saving out of the throughput."""
        self.clock += seconds
        self.started += seconds

    def results(self) -> dict[str, Any]:
        """What a finished run reports."""
        seconds = time.perf_counter() - self.started
        return {
            "metrics": self.metrics,
            "metric": self.recipe.eval.metric,
            "best": self.state.best,
            "best_step": self.state.best_step,
            "world_size": self.world.size,
            "seconds": seconds,
            "samples_per_s": (self.state.samples - self.started_samples) / seconds,
        }

    def facts(self) -> Facts:
        """What the manifest of a checkpoint at this boundary says."""
        return Facts(
            step=self.state.step,
            recipe_hash=self.identity.recipe_hash,
            mathematics=self.identity.mathematics,
            data_fingerprint=self.identity.data_fingerprint,
            train_state=self.state.as_dict(),
            engine=self.plan.engine,
            versions=self.identity.arithmetic,
            metric=self._metric_here(),
        )

    def _metric_here(self) -> dict[str, Any] | None:
        """The evaluation at this very step, where there was one."""
        name = self.recipe.eval.metric
        if self.state.evaluated_step != self.state.step or name not in self.metrics:
            return None
        return {"name": name, "value": float(self.metrics[name]), "mode": self.recipe.eval.mode}

    def next_batch(self) -> StepBatch | None:
        """Collective, the step boundary: this step's microbatches, or None where any rank was told to stop.

        One small all-reduce carries the count, the flags and the vote on a save together. A rank whose data
        failed fails all of them here, with its cause.
        """
        problem: Exception | None = None
        micros: list[Micro] = []
        try:
            micros = self.batches.get(self.state.step)
        except Stopped:
            pass  # told to stop while it waited for data: the flag below says so
        except Exception as error:
            problem = error
        mine = sum(m.count for m in micros if m.weight)
        apart = problem is None and keeps_apart(self, micros)
        flags = [self.stop.requested, problem is not None, apart, self.saver.written()]
        total, stop, failed, apart_any, written = self.world.sum_ints([mine, *map(int, flags)])
        if failed:
            share_problem(self.world, problem)
        return None if stop else StepBatch(micros, total, apart_any > 0, written == self.world.size)

    def close(self) -> None:
        """End what runs in the background. May be called again."""
        self.console.close()
        self.batches.close()
        self.saver.close()
        close(self.eval_rows)
        if self.lock is not None:
            self.lock.close()

    def stop_agreed(self) -> bool:
        """Collective. True on every rank where any has been told to stop."""
        return self.world.sum_ints([int(self.stop.requested)])[0] > 0

    @property
    def finished(self) -> bool:
        """True where all steps are done, or early stopping says that no more are wanted."""
        patience = self.recipe.eval.patience
        stale = patience is not None and self.state.evals_without_gain >= patience
        return stale or self.state.step >= self.plan.total_steps

    @property
    def evaluation_due(self) -> bool:
        """True at a boundary whose evaluation has not been finished yet."""
        return evaluation_due(self.plan, self.state)

    @property
    def save_due(self) -> bool:
        """True at a boundary whose checkpoint is due and not there yet."""
        step, every = self.state.step, self.plan.save_every
        due = step > 0 and (self.finished or (every is not None and step % every == 0))
        return due and self.saved_step != step


def evaluation_due(plan: Plan, state: TrainState) -> bool:
    """True where an evaluation belongs to this boundary and has not been finished yet."""
    step, every = state.step, plan.eval_every
    due = step > 0 and (step >= plan.total_steps or (every is not None and step % every == 0))
    return due and state.evaluated_step < step
