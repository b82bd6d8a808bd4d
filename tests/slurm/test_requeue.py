"""Jobs that start themselves again where a user may not requeue, and those that had better not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distdl import errors
from tests.faults.support import events, tensors_of, wait_for_event
from tests.runs import train_here
from tests.slurm.conftest import TestCluster, wait_until
from tests.slurm.test_slurm_faults import assert_no_step_lost_at_a_stop, check_finished, recipe_of, restarts

pytestmark = [pytest.mark.slow, pytest.mark.campaign]


@pytest.fixture(autouse=True)
def _nothing_left_on_the_nodes(cluster: TestCluster) -> Iterator[None]:
    yield
    for job in cluster.say("squeue", "--noheader", "--format=%i")[1].split():
        cluster.say("scancel", job)
    cluster.assert_nobody_left(30)


@pytest.fixture
def _no_scontrol(cluster: TestCluster) -> Iterator[None]:
    """On every machine `scontrol` is a file that cannot be executed."""
    program = shutil.which("scontrol")
    assert program is not None
    machines = ["ctl", *cluster.cluster.nodes]
    for name in machines:
        code, said = cluster.say("mount", "--bind", "/dev/null", program, on=name)
        assert code == 0, said
    yield
    for name in machines:
        cluster.say("umount", program, on=name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = recipe_of(tmp_path_factory.mktemp("undisturbed"))
    train_here(recipe, 1)
    return tensors_of(recipe.parent / "run")


@pytest.mark.usefixtures("_no_scontrol")
def test_without_scontrol_a_job_follows_the_one_that_was_stopped(
    cluster: TestCluster, tmp_path: Path, undisturbed: Any
) -> None:
    run = cluster.submit(recipe_of(tmp_path))
    wait_for_event(run, "save")
    (first,) = cluster.say("squeue", "--noheader", "--format=%i")[1].split()
    cluster.say("scancel", "--batch", "--signal=USR1", first)  # as Slurm does before the time limit
    wait_for_event(run, "job_start", 2)
    (follows,) = events(run, "followed_by")
    assert follows["job"] != first
    check_finished(cluster, run, undisturbed, 90)
    assert [e["job"] for e in events(run, "job_start")] == [first, follows["job"]]
    assert_no_step_lost_at_a_stop(run)
    assert "step 300, saved 300" in cluster.distdl("slurm", "status", str(run))


@pytest.mark.usefixtures("_no_scontrol")
def test_without_scontrol_a_cancelled_job_is_followed_by_none(cluster: TestCluster, tmp_path: Path) -> None:
    run = cluster.submit(recipe_of(tmp_path, 1_000_000))
    wait_for_event(run, "save")
    cluster.distdl("slurm", "cancel", str(run))
    cluster.assert_nobody_left(20)
    assert events(run, "stop")[-1]["saved"] > 0
    assert not events(run, "followed_by")
    assert events(run, "job_end")[-1]["verdict"] == "cancelled, not started again"


def test_a_job_that_makes_no_progress_is_not_started_for_ever(cluster: TestCluster, tmp_path: Path) -> None:
    """Each attempt is asked to stop before its first step, and so has nothing to save."""
    fault = "launch.slurm.env.DISTDL_FAIL_AT='0:start.joined:USR1'"
    run = cluster.submit(recipe_of(tmp_path), fault, "launch.slurm.idle_attempts=3")
    wait_until(lambda: not cluster.queue(), 120, "the job ends")
    assert restarts(run) == [0, 1, 2]
    end = events(run, "job_end")[-1]
    assert end["exit_code"] == errors.RANK_FAILED
    assert end["verdict"].startswith("not started again: 3 attempts in a row saved no step")
    assert not events(run, "save")
