"""kill -9 of a random worker at a random moment, again and again in one run: it recovers, to the bit."""

from __future__ import annotations

import os
import random
import select
import signal
import statistics
import time
from pathlib import Path

import pytest

from distdl.record import read_lines
from distdl.testing import assert_same_bits
from tests.faults.support import Launched, events, tensors_of, wait_for_event, worker_pids, write_recipe
from tests.runs import train_here

pytestmark = pytest.mark.slow


def campaign(folder: Path, kills: int, steps: int, seed: int) -> list[float]:
    """Returns seconds from each kill to the first completed step after it.

    A kill that meets an attempt still starting is measured to the step that some later attempt reaches.
    """
    chance = random.Random(seed)
    # A kill every third of a second meets the same save or evaluation several times in a row now and then,
    # and then no step is gained between them: the budget of such failures is larger here than the default.
    recipe = write_recipe(
        folder,
        train={"max_steps": steps, "seed": 1},
        eval={"every_steps": 50},
        launch={"max_restarts": 15},
    )
    run = folder / "run"
    times: list[float] = []
    with Launched(["launch", str(recipe), "--procs", "2"]) as command:
        first_steps = 0
        for done in range(kills):
            if done and chance.random() < 0.2:  # now and then while the new attempt starts
                wait_for_event(run, "restart", done)
                moment = chance.uniform(0.0, 0.3)
            else:
                wait_for_event(run, "first_step", first_steps + 1)
                moment = chance.uniform(0.0, 0.6)
            select.select([], [], [], moment)
            victims = wait_for_workers(command)
            killed = time.time()
            os.kill(chance.choice(victims), signal.SIGKILL)
            wait_for_event(run, "restart", done + 1)
            first_steps = len([e for e in events(run, "first_step") if e["time"] < killed])
            times.append(killed)
        wait_for_event(run, "first_step", first_steps + 1)
        assert command.finish(timeout_s=200) == 0, command.output
        command.assert_nobody_left()
    steps_at = [e["time"] for e in events(run, "first_step")]
    return [min(t for t in steps_at if t > killed) - killed for killed in times]


def wait_for_workers(command: Launched) -> list[int]:
    end = time.monotonic() + 30
    while not (found := worker_pids(command)) and time.monotonic() < end:
        select.select([], [], [], 0.01)
    assert found, "no workers within 30 s"
    return found


def check(folder: Path, kills: int, steps: int, seed: int) -> None:
    undisturbed = write_recipe(
        folder / "calm", train={"max_steps": steps, "seed": 1}, eval={"every_steps": 50}
    )
    train_here(undisturbed)
    times = campaign(folder / "rough", kills, steps, seed)
    assert len(times) == kills
    times.sort()
    p95 = times[min(len(times) - 1, round(0.95 * len(times)) - 1)]
    print(
        f"\n{kills} of {kills} recovered; kill to next step: median {statistics.median(times):.2f} s, "
        f"p95 {p95:.2f} s, longest {times[-1]:.2f} s"
    )
    assert_same_bits(tensors_of(folder / "rough" / "run"), tensors_of(folder / "calm" / "run"))
    rows = read_lines(folder / "rough" / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows] == sorted({r["step"] for r in rows}), "a step stands twice"
    calm = read_lines(folder / "calm" / "run" / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in rows] == [(r["step"], r["loss"]) for r in calm]
    assert p95 < 4.0


@pytest.mark.timeout(420)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    check(tmp_path, kills=20, steps=1100, seed=20)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_a_hundred_kills_change_nothing(tmp_path: Path) -> None:
    check(tmp_path, kills=100, steps=8000, seed=100)


def test_a_bug_ends_the_run_when_the_budget_is_spent(tmp_path: Path) -> None:
    """The fault comes back in every attempt at the same step: no step is gained, so the budget runs out."""
    recipe = write_recipe(tmp_path, launch={"max_restarts": 2})
    with Launched(["launch", str(recipe), "--procs", "2"], fail_at="1:train.step@14:raise") as command:
        assert command.finish() == 70, command.output
        command.assert_nobody_left()
    assert "rank 1" in command.output
    assert "InjectedFault: injected at train.step" in command.output
    failed = events(tmp_path / "run", "rank_failed")
    # The first attempt gained steps and refilled the budget; the two after it did not.
    assert [f["restarts_left"] for f in failed] == [2, 1, 0]
    assert {f["rank"] for f in failed} == {1}


def test_a_killed_rank_is_named_and_not_its_consequences(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, launch={"max_restarts": 0})
    with Launched(["launch", str(recipe), "--procs", "2"], fail_at="1:train.step@14:kill") as command:
        assert command.finish() == 70, command.output
    assert "[rank 1] failed at step 14: ended by SIGKILL" in command.output
