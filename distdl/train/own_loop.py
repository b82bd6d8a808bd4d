"""`open_run`: a run whose loop is the user's own. Data, engine, checkpoints, stops are those of any run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from distdl import errors
from distdl.comm.world import leave
from distdl.engines import Forward
from distdl.errors import DistdlError, RecipeError, Stopped
from distdl.keys import seed_everything
from distdl.lifeline import die_with_parent
from distdl.observe.failure import report_failure
from distdl.observe.summary import show_summary
from distdl.plan import Plan
from distdl.recipe import Recipe, load_recipe
from distdl.record import RunDirectory
from distdl.tasks import Batch
from distdl.testing import faults
from distdl.topology import Topology
from distdl.train.fusing import joined
from distdl.train.loop import begin_step, end_step, next_step
from distdl.train.process import (
    Options,
    announce_start,
    code_of,
    crash,
    exit_code_for,
    finished_already,
    open_here,
    settling,
)
from distdl.train.session import Session, StepBatch
from distdl.train.stop import StopFlag


class Model:
    """The run's model, to be called inside `Step.microbatches`; attributes are your module's."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._forward: nn.Module | None = None
        self._called = False

    def __call__(self, *args: Any, **named: Any) -> Any:
        if self._forward is None:
            raise RuntimeError(
                "run.model is called inside `for batch in step.microbatches():`; elsewhere use what "
                "`with run.evaluating() as model:` gives"
            )
        self._called = True
        return self._forward(*args, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run._s.engine.module, name)


class Step:
    """One step of the whole world, from `Run.steps`."""

    def __init__(self, run: Run, batch: StepBatch) -> None:
        self._run, self._batch = run, batch
        self._forward: Forward | None = None
        self._left = len(batch.micros) if batch.total else 0
        self._losses: list[tuple[Tensor, int]] = []
        self._applied = False
        self.number = run._s.state.step
        """Counts from 0 over the whole run, whatever was resumed."""

    def microbatches(self) -> Iterator[Batch]:
        """This rank's microbatches, as the task's `collate` made them, on the device.

        Each is gone through to `backward` before the next. torch's random streams are set for each.
        """
        s, batch, model = self._run._s, self._batch, self._run.model
        begin_step(s)
        for i in range(self._left):
            micro = batch.micros[i]
            tensors, this = joined(s, [micro], last=i == len(batch.micros) - 1)
            seed_everything(this.groups[0].key)
            with s.engine.running(this, batch.total) as self._forward:
                model._forward, model._called = self._forward.module, False
                self._count, self._weight = micro.count, micro.weight
                yield tensors
                model._forward = None
                if self._waiting():
                    raise RuntimeError("a microbatch has had no step.backward(loss_sum, count)")
            self._left -= 1

    def _waiting(self) -> bool:
        return self._forward is not None

    def backward(self, loss_sum: Tensor, count: int) -> None:
        """Add the gradient of a microbatch. `loss_sum` (scalar): the SUM of the loss over `count` samples,
        pixels or tokens. distdl divides by the count of the whole step, so no microbatch weighs too much.

        Raises ValueError where `count` is not what the task of the recipe counts of it: the count of the
        step is known on all ranks before it begins.
        """
        forward, self._forward = self._forward, None
        if forward is None:
            raise RuntimeError("step.backward is called once in each microbatch")
        if not isinstance(loss_sum, Tensor) or loss_sum.numel() != 1 or not loss_sum.requires_grad:
            raise ValueError(f"step.backward: expected one number with a gradient, not {loss_sum!r}")
        if count != self._count:
            raise ValueError(
                f"step.backward: {count} counted, and the recipe's task counts {self._count} of this "
                "microbatch. Sum the loss over those, or give the recipe a task whose `count` is yours"
            )
        if not self._run.model._called:
            raise RuntimeError(
                "the loss was computed without run.model(...): ranks would not share gradients"
            )
        forward.backward(loss_sum)
        if self._weight:
            self._losses.append((loss_sum.detach(), 1))

    def apply(self) -> None:
        """Collective. Sum the gradients over all ranks, clip, update, log. Blocks until all ranks have."""
        if self._left:
            raise RuntimeError(f"step.apply before {self._left} microbatches of this rank were gone through")
        if self._applied:
            raise RuntimeError("step.apply is called once in a step")
        self._applied = True
        with self._run._together():
            end_step(self._run._s, self._batch, self._losses)


class Run:
    """An open run; all ranks hold one. See `distdl.open_run`."""

    def __init__(self, recipe: Recipe, topology: Topology, options: Options) -> None:
        self._stop, self._topology = StopFlag(), topology
        self._stop.install(alone=topology.launcher == "none")
        faults.arm_from_environment(topology.rank)
        self._agreed: DistdlError | None = None
        try:
            session, resumed = open_here(recipe, topology, options, self._stop)
        except Stopped as error:
            code = code_of(error, recipe, topology, self._stop)
            leave()
            raise SystemExit(exit_code_for(topology, code)) from error
        self._session: Session | None = session
        self.recipe: Recipe = recipe
        self.plan: Plan = session.plan
        self.rank: int = session.world.rank
        """This process's number, from 0."""
        self.world_size: int = session.world.size
        """How many processes train together."""
        self.device: torch.device = session.engine.device
        """Where the model and the batches are."""
        self.metrics: dict[str, float] = {}
        """The newest evaluation of this attempt; empty before there was one."""
        self.model = Model(self)
        if session.carry is not None:
            self.close()
            raise RecipeError(
                f"task.name = {recipe.task.name!r} hands state from window to window, which a loop of your "
                "own cannot: use `distdl train`, or a task that does not"
            )
        announce_start(session, resumed)

    @property
    def _s(self) -> Session:
        if self._session is None:
            raise RuntimeError("this run is closed")
        return self._session

    def steps(self) -> Iterator[Step]:
        """Collective. The steps that are left, from where the newest checkpoint stands.

        Between them the run evaluates, saves and logs as its recipe says. Raises SystemExit where it was
        asked to stop, everything saved, so that nothing after the loop takes it for finished.
        """
        s, already = self._s, finished_already(self._s)
        while not isinstance(batch := self._next(), int):
            self.metrics = s.metrics
            step = Step(self, batch)
            yield step
            if not step._applied:
                raise RuntimeError("a step has had no step.apply()")
        self.metrics = s.metrics
        if batch != errors.DONE:
            raise SystemExit(exit_code_for(self._topology, batch))
        if not already:
            s.event("done", **s.results())
        s.console.close()
        if s.world.is_main:
            show_summary(s.directory)

    def _next(self) -> StepBatch | int:
        with self._together():
            return next_step(self._s)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Around what fails on all ranks or on none, unlike the code of the user."""
        try:
            with settling(self._s):
                yield
        except DistdlError as error:
            self._agreed = error
            raise

    def evaluating(self) -> AbstractContextManager[nn.Module]:
        """Collective. The model in evaluation mode, with averaged weights where the recipe keeps them."""
        return self._s.engine.evaluating()

    def close(self) -> None:
        """End what runs in the background, and leave the other ranks. May be called again."""
        if self._session is not None:
            self._session.close()
            self._session = None  # the engine goes before the group: see `leave`
        leave()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Where something was raised on one rank of several, that rank ends at once with a report, as in
        `distdl train`: the others wait for it in vain otherwise. What all raise together has its exit code.
        """
        if isinstance(error, Exception):
            if self.world_size > 1:
                if self._agreed is None or error is not self._agreed:
                    crash(error, RunDirectory.of(self.recipe), self._topology)
                code = code_of(self._agreed, self.recipe, self._topology, self._stop)
                self.close()
                raise SystemExit(exit_code_for(self._topology, code)) from error
            report_failure(RunDirectory.of(self.recipe), self.rank, error)
        self.close()


def open_run(
    config: str | os.PathLike[str], overrides: Sequence[str] = (), *, allow_changed: bool = False
) -> Run:
    """See `distdl.open_run`."""
    recipe, topology = load_recipe(config, list(overrides)), Topology.from_env(os.environ)
    if topology.launcher == "torchrun":
        die_with_parent(init_is_fine=True)
    return Run(recipe, topology, Options(allow_changed=allow_changed))
