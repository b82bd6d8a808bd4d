"""A request to stop, to anyone, at any moment: all leave together, nothing is lost, nobody stays behind."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from distdl.checkpoint.read import find_latest
from distdl.testing import assert_same_bits
from tests.faults.support import (
    Launched,
    events,
    launched,
    parent_of,
    tensors_of,
    wait_for_event,
    worker_pids,
    write_recipe,
)
from tests.runs import train_here

pytestmark = pytest.mark.slow

SIGNALS = ("TERM", "USR1")
TARGETS = {"worker": "", "launcher": ">launcher", "all": ">all"}
MOMENTS = {
    "step": "train.step@14",
    "save": "save.written@20",
    "evaluation": "eval.batch",
    "start": "start.joined",
}
CASES = list(itertools.product(MOMENTS, TARGETS, SIGNALS))
EVERYDAY = [
    ("step", "worker", "TERM"),
    ("save", "all", "USR1"),
    ("evaluation", "launcher", "USR1"),
    ("start", "launcher", "TERM"),
]
"""Each moment, target and signal; the other combinations stand in the long run."""


def start(recipe: Path, fail_at: str = "") -> Launched:
    return Launched(["launch", str(recipe), "--procs", "2"], fail_at=fail_at)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = write_recipe(tmp_path_factory.mktemp("undisturbed"))
    train_here(recipe)
    return tensors_of(recipe.parent / "run")


def check(moment: str, target: str, name: str, tmp_path: Path, undisturbed: Any) -> None:
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    with start(recipe, f"1:{MOMENTS[moment]}:{name}{TARGETS[target]}") as command:
        code = command.finish()
        command.assert_nobody_left()
    if moment == "start":
        assert code == 143, command.output
        assert not list((run / "checkpoints").iterdir())
    else:
        assert code == 75, command.output
        stop = events(run, "stop")[-1]
        assert stop["saved"] == stop["step"] == find_latest(run / "checkpoints").manifest.step  # type: ignore[union-attr]
    assert not events(run, "rank_failed")
    train_here(recipe)
    assert_same_bits(tensors_of(run), undisturbed)


@pytest.mark.parametrize(("moment", "target", "name"), EVERYDAY)
def test_stop(moment: str, target: str, name: str, tmp_path: Path, undisturbed: Any) -> None:
    check(moment, target, name, tmp_path, undisturbed)


@pytest.mark.campaign
@pytest.mark.parametrize(("moment", "target", "name"), [c for c in CASES if c not in EVERYDAY])
def test_stop_other_signal(moment: str, target: str, name: str, tmp_path: Path, undisturbed: Any) -> None:
    check(moment, target, name, tmp_path, undisturbed)


def test_a_signal_while_workers_are_being_born_is_not_lost(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    with start(recipe) as command:
        wait_for_event(tmp_path / "run", "launch")
        os.killpg(command.process.pid, signal.SIGTERM)
        assert command.finish() == 143, command.output
        command.assert_nobody_left()


def test_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"max_steps": 100000})
    with start(recipe) as command:
        wait_for_event(tmp_path / "run", "first_step")
        for pid in worker_pids(command):
            os.kill(pid, signal.SIGSTOP)  # workers that will never reach a boundary
        os.kill(command.process.pid, signal.SIGINT)
        command.wait_for_line("SIGINT: stopping at the next step boundary")
        os.kill(command.process.pid, signal.SIGINT)
        assert command.finish(timeout_s=10) == 130, command.output
        command.assert_nobody_left()


def test_one_interrupt_saves(tmp_path: Path) -> None:
    """As a terminal does it: Ctrl-C reaches the whole foreground group at once."""
    recipe = write_recipe(tmp_path, train={"max_steps": 100000})
    with start(recipe) as command:
        wait_for_event(tmp_path / "run", "first_step")
        os.killpg(command.process.pid, signal.SIGINT)
        assert command.finish() == 75, command.output
        command.assert_nobody_left()


@pytest.mark.parametrize(
    "target", ["launcher", pytest.param("forkserver", marks=pytest.mark.campaign), "worker"]
)
def test_no_orphan_under_a_single_kill(target: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"max_steps": 400}, launch={"max_restarts": 0})
    with start(recipe) as command:
        wait_for_event(tmp_path / "run", "first_step")
        workers = worker_pids(command)
        assert len(workers) == 2
        victims = {
            "launcher": command.process.pid,
            "forkserver": parent_of(workers[0]),
            "worker": workers[1],
        }
        os.kill(victims[target], signal.SIGKILL)
        code = command.finish()
        assert code == (-9 if target == "launcher" else 70), command.output
        command.assert_nobody_left()


def test_bare_train_saves_and_leaves_75(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"max_steps": 100000})
    with launched("train", str(recipe)) as command:
        wait_for_event(tmp_path / "run", "first_step")
        os.kill(command.process.pid, signal.SIGUSR1)
        assert command.finish() == 75, command.output
        stop = events(tmp_path / "run", "stop")[-1]
    assert stop["signal"] == "SIGUSR1"
    assert stop["saved"] == stop["step"] > 0
