"""What is counted, and a request to stop."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distdl.train.state import TrainState
from distdl.train.stop import REQUESTS, StopFlag


@given(
    step=st.integers(0, 2**53),
    best=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    best_step=st.none() | st.integers(0, 2**53),
)
def test_a_state_comes_back_from_json(step: int, best: float | None, best_step: int | None) -> None:
    state = TrainState(step=step, updates=step // 2, samples=step, best=best, best_step=best_step)
    assert TrainState(**json.loads(json.dumps(state.as_dict()))) == state


@pytest.mark.parametrize(
    ("mode", "min_delta", "values", "better"),
    [
        ("max", 0.0, [0.5, 0.6, 0.6, 0.55, 0.7], [True, True, False, False, True]),
        ("min", 0.0, [0.5, 0.6, 0.5, 0.4, 0.3], [True, False, False, True, True]),
        ("max", 0.1, [0.5, 0.55, 0.61, 0.65, 0.72], [True, False, True, False, True]),
        ("min", 0.1, [0.5, 0.45, 0.39], [True, False, True]),
        ("max", 0.0, [-3.0, -4.0, -2.0], [True, False, True]),
        ("max", 0.0, [0.5, float("nan"), 0.6], [True, False, True]),
    ],
)
def test_the_best_metric(mode: str, min_delta: float, values: list[float], better: list[bool]) -> None:
    state = TrainState()
    waited = 0
    best: tuple[float | None, int | None] = (None, None)
    for step, (value, expected) in enumerate(zip(values, better, strict=True)):
        state.step = step
        assert state.note_metric(value, mode, min_delta) is expected
        waited = 0 if expected else waited + 1
        best = (value, step) if expected else best
        assert state.evals_without_gain == waited
        assert (state.best, state.best_step) == best


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in REQUESTS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)  # drops a signal that is still held back
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", REQUESTS)
def test_each_request_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    flag = StopFlag()
    flag.install(alone=True)
    assert not flag.requested
    signal.raise_signal(number)
    assert flag.requested
    assert flag.signal == number.name


@pytest.mark.usefixtures("handlers")
def test_the_first_request_is_the_one_that_is_told() -> None:
    flag = StopFlag()
    flag.install(alone=False)
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)
    assert flag.signal == "SIGUSR1"


@pytest.mark.usefixtures("handlers")
def test_a_request_held_back_during_the_start_is_let_in() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    # While blocked, it waits for this thread; the handler of before must not see it.
    signal.raise_signal(signal.SIGUSR1)
    flag = StopFlag()
    assert not flag.requested
    flag.install(alone=False)
    assert flag.signal == "SIGUSR1"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(REQUESTS)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("alone", [True, False])
def test_a_second_interrupt_ends_a_bare_run_at_once(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    flag = StopFlag()
    flag.install(alone=alone)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert ended == []
    signal.raise_signal(signal.SIGINT)
    assert ended == ([130] if alone else [])
