"""Checkpoints in a real S3-compatible store: saved, killed in mid-save, listed, resumed from, pruned."""

from __future__ import annotations

import json
import random
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distdl import stores
from distdl.testing import assert_same_bits, run_world
from tests.commands import distdl
from tests.faults.savers import ENGINES, Group, Job, good_steps, layouts_of_engines
from tests.faults.support import Launched, events, tensors_at, tensors_of, write_recipe
from tests.runs import train_here
from tests.s3_server import BUCKET, S3Server, s3_server

pytestmark = pytest.mark.slow

KEEP = 2


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server(tmp_path / "s3") as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        # The address of the store is read when it is opened, and each test has another.
        monkeypatch.setattr(stores, "_stores", {})
        yield running


def kill_in_turn(folder: Path, server: S3Server, kinds: list[tuple[str, bool]], seed: int) -> int:
    """Groups that save into one place, killed at a random moment each; returns the newest step at the end."""
    url = f"s3://{BUCKET}/run/checkpoints"
    chance = random.Random(seed)
    layouts = run_world(layouts_of_engines, 2)
    newest = 0
    for number, (engine, asynchronous) in enumerate(kinds):
        cut = tuple(of_rank[engine] for of_rank in layouts)
        job = Job(folder, url, cut, asynchronous, KEEP, number, server.environment)
        with Group(job) as group:
            group.wait_until_saved(KEEP)
            assert {p.resumed for p in group.progress} == {newest}
            select.select([], [], [], chance.uniform(0, 0.5))
            group.kill(*chance.choice([(0,), (1,), (0, 1)]))
        steps = good_steps(url, job.names)
        committed = max(p.last_committed for p in group.progress)
        assert steps[0] in (committed, committed + 1)
        assert steps == list(range(steps[0], steps[0] - len(steps), -1))
        assert KEEP <= len(steps) <= KEEP + 1  # one more where the kill came between commit and removal
        newest = steps[0]
    return newest


def test_kills_in_mid_save_leave_whole_checkpoints_alone(tmp_path: Path, server: S3Server) -> None:
    kinds = [("fsdp", True)]
    assert kill_in_turn(tmp_path, server, kinds, seed=3) >= KEEP * len(kinds)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_many_kills_in_mid_save(tmp_path: Path, server: S3Server) -> None:
    kinds = [(e, a) for e in ENGINES for a in (True, False)]
    kill_in_turn(tmp_path, server, kinds * 2, seed=4)


def command(*arguments: str) -> dict[str, Any]:
    """What a `distdl ckpt` command answers with --json."""
    code, output = distdl("ckpt", *arguments, "--json")
    assert code == 0, output
    return dict(json.loads(output))


FAULTS = ("1:save.written@20:kill", "0:save.before_manifest@40:kill")


@pytest.mark.parametrize("faults", [FAULTS[1:], pytest.param(FAULTS, marks=pytest.mark.campaign)], ids=len)
def test_a_run_that_keeps_its_checkpoints_in_a_store(
    faults: tuple[str, ...], tmp_path: Path, server: S3Server
) -> None:
    """Killed in mid-save, it goes on from the store, to the bits of an undisturbed run on disk; then another
    engine takes over at another world size; then the checkpoints are listed, verified and pruned.
    """
    calm = write_recipe(tmp_path / "calm", train={"max_steps": 40, "seed": 1})
    train_here(calm)
    url = f"s3://{BUCKET}/far"
    rough = write_recipe(
        tmp_path / "rough", train={"max_steps": 40, "seed": 1}, checkpoint={"dir": url, "every_steps": 10}
    )
    run = tmp_path / "rough" / "run"
    for fault in faults:
        arguments = ["launch", str(rough), "--procs", "2", "launch.max_restarts=0"]
        with Launched(arguments, fail_at=fault) as started:
            assert started.finish(timeout_s=120) == 70, started.output
    train_here(rough)
    resumed = [e["resumed_from"] for e in events(run, "start")]
    assert resumed == [None, *(["step-00000010"] if faults == FAULTS else []), "step-00000030"]
    assert_same_bits(tensors_at(url), tensors_of(tmp_path / "calm" / "run"))
    assert not (run / "checkpoints").exists()

    train_here(rough, 1, "train.max_steps=50", "hardware.engine=fsdp", allow_changed=True)
    for place in (url, str(run)):
        assert [row["step"] for row in command("ls", place)["rows"]] == [50, 40, 30]
    assert command("verify", url)["valid"]
    command("prune", url, "--keep", "1")
    assert [row["step"] for row in command("ls", url)["rows"]] == [50]
