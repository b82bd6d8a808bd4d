"""Learning rates: their values at the ends, their shape between, and what does not move them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from core_support import plan_for, recipe_with
from hypothesis import assume, given
from hypothesis import strategies as st

from distdl.engines.base import Applied
from distdl.train import loop
from distdl.train.fusing import Fusing
from distdl.train.schedule import learning_rate
from distdl.train.session import Session, StepBatch
from distdl.train.state import TrainState

PEAK = 0.5


def rates(steps: int, epochs: int | None = None, **schedule: Any) -> list[float]:
    """The rate of every update of a run of `steps` (of 9 steps an epoch)."""
    changes = {"train": {"epochs": epochs, "max_steps": steps}, "schedule": schedule}
    recipe, plan = recipe_with(**changes), plan_for(**changes)
    assert plan.total_steps == steps
    assert plan.steps_per_epoch == 9
    return [learning_rate(recipe, plan, update) for update in range(steps + 3)]


def test_constant() -> None:
    assert rates(20, name="constant") == [PEAK] * 23


@given(
    warmup=st.integers(1, 30), steps=st.integers(1, 60), name=st.sampled_from(["constant", "cosine", "step"])
)
def test_warm_up_rises_in_equal_steps_to_the_peak(warmup: int, steps: int, name: str) -> None:
    more = {"every_steps": 100} if name == "step" else {}
    rising = rates(steps, name=name, warmup_steps=warmup, **more)[: min(warmup, steps)]
    assert rising == pytest.approx([PEAK * (i + 1) / warmup for i in range(len(rising))])
    if steps >= warmup:
        assert rising[-1] == PEAK


@given(steps=st.integers(2, 80), warmup=st.integers(0, 79), final=st.floats(0, 1))
def test_cosine_falls_from_the_peak_to_its_final_factor(steps: int, warmup: int, final: float) -> None:
    assume(warmup < steps)
    found = rates(steps, name="cosine", warmup_steps=warmup, final_factor=final)
    assert found[warmup] == PEAK
    assert all(a + 1e-12 >= b for a, b in itertools.pairwise(found[warmup:]))
    assert found[steps:] == pytest.approx([PEAK * final] * 3, abs=1e-12)


def test_a_run_shorter_than_its_warm_up_never_reaches_the_peak() -> None:
    assert rates(2, name="cosine", warmup_steps=4)[:2] == pytest.approx([PEAK / 4, PEAK / 2])


def test_cosine_halfway_is_halfway() -> None:
    assert rates(110, name="cosine", warmup_steps=10, final_factor=0.2)[60] == pytest.approx(PEAK * 0.6)


def test_steps() -> None:
    assert rates(10, name="step", every_steps=4, gamma=0.1)[:10] == pytest.approx(
        [PEAK] * 4 + [PEAK * 0.1] * 4 + [PEAK * 0.01] * 2
    )
    by_epochs = rates(40, name="step", every_epochs=2, gamma=0.5)
    assert by_epochs == pytest.approx([PEAK * 0.5 ** (i // 18) for i in range(43)])


@given(
    steps=st.integers(2, 80),
    at=st.floats(0.05, 0.95),
    start=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_one_cycle(steps: int, at: float, start: float, final: float) -> None:
    found = rates(steps, name="one_cycle", peak_at=at, start_factor=start, final_factor=final)
    assert found[0] == pytest.approx(PEAK * start, abs=1e-12)
    assert found[steps - 1] == pytest.approx(PEAK * final, abs=1e-12)
    assert found[steps:] == pytest.approx([PEAK * final] * 3, abs=1e-12)
    top = next(i for i in range(steps) if i / (steps - 1) >= at)
    # The peak may lie between two updates; within rounding, the rate rises before it and falls after it.
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found[:top]))
    assert all(a + 1e-12 >= b for a, b in itertools.pairwise(found[top:]))
    assert max(found) <= PEAK


def test_one_cycle_reaches_its_peak() -> None:
    found = rates(101, name="one_cycle", peak_at=0.25)
    assert found[25] == pytest.approx(PEAK)
    assert found.index(max(found)) == 25


class FakeEngine:
    """Notes the learning rates it is given; its gradients are as finite as `norms` say."""

    def __init__(self, norms: list[float]) -> None:
        self.rates: list[float] = []
        self._norms: Iterator[float] = iter(norms)

    def apply(self, lr: float, counts: list[int]) -> Applied:
        self.rates.append(lr)
        norm = next(self._norms)
        return Applied(norm < float("inf"), norm)


@contextmanager
def loop_with(engine: FakeEngine) -> Iterator[Session]:
    changes = {"schedule": {"name": "cosine", "warmup_steps": 3}, "track": {"every_steps": 1000}}
    session = SimpleNamespace(
        recipe=recipe_with(**changes),
        plan=plan_for(**changes),
        engine=engine,
        state=TrainState(step=1, updates=1),
        row={},
        stepped=True,
        fusing=Fusing(),
        beat=lambda phase: None,
        event=lambda kind, **facts: None,
        console=SimpleNamespace(step=lambda step, row: None, say=lambda text: None),
    )
    yield cast(Session, session)


def test_a_skipped_step_does_not_move_the_schedule() -> None:
    inf = float("inf")
    engine = FakeEngine([1.0, inf, inf, 1.0, 1.0])
    with loop_with(engine) as s:
        for _ in range(5):
            loop.train_step(s, StepBatch([], total=1))
        expected = [learning_rate(s.recipe, s.plan, update) for update in (1, 2, 2, 2, 3)]
        assert engine.rates == expected
        assert len(set(expected)) > 1
        assert (s.state.step, s.state.updates, s.state.nonfinite_in_row) == (6, 4, 0)


def test_a_step_in_which_nothing_counts_is_no_update() -> None:
    engine = FakeEngine([])
    with loop_with(engine) as s:
        loop.train_step(s, StepBatch([], total=0))
        assert (s.state.step, s.state.updates, s.state.samples) == (2, 1, 12)
    assert engine.rates == []
