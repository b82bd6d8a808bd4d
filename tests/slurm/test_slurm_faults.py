"""What a cluster does to its jobs costs time and nothing else: the bits are those of the undisturbed run."""

from __future__ import annotations

import itertools
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distdl.checkpoint.read import find_latest
from distdl.record import read_lines
from distdl.testing import assert_same_bits
from tests.faults.support import events, tensors_of, wait_for_event, write_recipe
from tests.runs import train_here
from tests.slurm.conftest import ROOT, TestCluster, wait_until

pytestmark = pytest.mark.slow


def recipe_of(folder: Path, steps: int = 300, seed: int | None = None) -> Path:
    return write_recipe(
        folder,
        batch={"global": 16, "micro": 8},
        train={"max_steps": steps, "reduction": "exact"} | ({} if seed is None else {"seed": seed}),
        eval={"every_steps": 1_000_000},
        launch={"timeout_s": 60.0},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = recipe_of(tmp_path_factory.mktemp("undisturbed"))
    train_here(recipe, 1)
    return tensors_of(recipe.parent / "run")


@pytest.fixture(autouse=True)
def _nothing_left_on_the_nodes(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    cluster: TestCluster = request.getfixturevalue("cluster")
    for job in cluster.say("squeue", "--noheader", "--format=%i")[1].split():
        cluster.say("scancel", job)
    cluster.assert_nobody_left(30)


def restarts(run: Path) -> list[int]:
    return [e["restarts"] for e in events(run, "job_start")]


def check_finished(cluster: TestCluster, run: Path, undisturbed: Any, limit_s: float) -> None:
    wait_until(lambda: not cluster.queue(), limit_s, "the job ends")
    log = "".join(path.read_text() for path in sorted((run / "slurm").glob("*.log")))
    assert events(run, "job_end")[-1]["exit_code"] == 0, log
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl")]
    assert steps == sorted(set(steps)), log
    assert {*range(10, steps[-1] + 1, 10)} <= {*steps}, log  # track.every_steps, and none of them lost
    assert_same_bits(tensors_of(run), undisturbed)


def test_a_worker_that_is_killed_on_one_node_restarts_them_all(
    cluster: TestCluster, tmp_path: Path, undisturbed: Any
) -> None:
    recipe, run = recipe_of(tmp_path), tmp_path / "run"
    launch = [sys.executable, "-m", "distdl", "launch", str(recipe), "--procs=1"]
    command = cluster.cluster.inside("ctl", ["srun", "--nodes=2", "--ntasks-per-node=1", *launch])
    with subprocess.Popen(
        command,
        env=cluster.environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        wait_for_event(run, "save")
        (worker,) = cluster.workers("node2")
        cluster.say("kill", "-KILL", worker, on="node2")
        said = job.communicate(timeout=90)[0]
    assert job.returncode == 0, said
    assert "[rank 1 on node 1 (node2)] ended by SIGKILL" in said
    assert {e["rank"] for e in events(run, "rank_failed")} >= {1}
    first, second = events(run, "start")
    assert (first["resumed_from"], second["world_size"]) == (None, 2)
    assert second["resumed_from"].startswith("step-")
    assert_same_bits(tensors_of(run), undisturbed)


def test_a_cancelled_job_saves_and_leaves_no_process(cluster: TestCluster, tmp_path: Path) -> None:
    run = cluster.submit(recipe_of(tmp_path, 1_000_000))
    wait_for_event(run, "save")
    assert cluster.workers("node1")
    cluster.distdl("slurm", "cancel", str(run))
    cluster.assert_nobody_left(20)
    stop = events(run, "stop")[-1]
    assert find_latest(run / "checkpoints").manifest.step == stop["saved"] > 0  # type: ignore[union-attr]
    assert restarts(run) == [0]


def test_a_requeued_job_goes_on(cluster: TestCluster, tmp_path: Path, undisturbed: Any) -> None:
    run = cluster.submit(recipe_of(tmp_path))
    wait_for_event(run, "save")
    facts = json.loads(cluster.distdl("slurm", "status", str(run), "--json"))
    assert [row["state"] for row in facts["tasks"]] == ["RUNNING"]
    cluster.distdl("slurm", "requeue", str(run))
    wait_for_event(run, "job_start", 2)
    check_finished(cluster, run, undisturbed, 90)
    assert restarts(run) == [0, 1]
    (log,) = (run / "slurm").glob("*.log")  # one, over all attempts
    assert [f"restart {n}:" in log.read_text() for n in (0, 1, 2)] == [True, True, False]
    assert_no_step_lost_at_a_stop(run)
    assert "restarts 1, step 300, saved 300" in cluster.distdl("slurm", "status", str(run))


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_a_run_that_meets_its_time_limit_again_and_again_finishes(
    cluster: TestCluster, tmp_path: Path
) -> None:
    """A minute is the shortest limit there is, and Slurm warns up to half a minute early."""
    calm = recipe_of(tmp_path / "calm", STEPS)
    run = cluster.submit(recipe_of(tmp_path, STEPS), "launch.slurm.time='00:01:00'", "launch.slurm.warn_s=25")
    wait_until(lambda: events(run, "done"), 800, "the run is done")
    train_here(calm, 1)
    check_finished(cluster, run, tensors_of(calm.parent / "run"), 60)
    again = restarts(run)
    assert again == list(range(len(again)))
    assert len(again) > 3
    assert_no_step_lost_at_a_stop(run)


STEPS = 10_000
"""So many that three limits of a minute, less the warning and the start, are not enough for them."""


def assert_no_step_lost_at_a_stop(run: Path) -> None:
    """What was stopped was saved at that step, and each start goes on from the newest save before it."""
    saved = 0
    for event in read_lines(run / "events.jsonl"):
        if event["event"] == "stop" and "step" in event:
            assert event["saved"] == event["step"], event
        if event["event"] in ("save", "stop"):
            saved = max(saved, event.get("step", 0))
        if event["event"] == "start":
            assert event["resumed_from"] == (f"step-{saved:08d}" if saved else None), event


@pytest.mark.campaign
def test_a_preempted_job_gives_way_and_goes_on(
    cluster: TestCluster, tmp_path: Path, undisturbed: Any
) -> None:
    run = cluster.submit(recipe_of(tmp_path))
    wait_for_event(run, "save")
    code, said = cluster.say(
        "srun", "--partition=high", "--nodes=2", "--ntasks-per-node=1", "--exclusive", "hostname"
    )
    assert code == 0, said
    wait_for_event(run, "job_start", 2)
    check_finished(cluster, run, undisturbed, 90)
    assert restarts(run) == [0, 1]
    assert_no_step_lost_at_a_stop(run)


@pytest.mark.campaign
def test_a_node_without_power_costs_time_only(cluster: TestCluster, tmp_path: Path, undisturbed: Any) -> None:
    run = cluster.submit(recipe_of(tmp_path))
    wait_for_event(run, "save")
    cluster.control("off", "node2")
    wait_until(lambda: cluster.queue() == ["PENDING"], 90, "Slurm notices")
    cluster.control("boot", "node2")
    wait_for_event(run, "job_start", 2, timeout_s=90)
    check_finished(cluster, run, undisturbed, 90)


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_a_job_of_a_range_of_nodes_goes_on_with_what_is_left(
    cluster: TestCluster, tmp_path: Path, undisturbed: Any
) -> None:
    """A node of two loses its power: the job goes on with the other, and is not started again. A job that
    comes while the node is away starts with the one there is.
    """
    calm = recipe_of(tmp_path / "calm", 3000)
    run = cluster.submit(recipe_of(tmp_path, 3000), nodes="1:2")
    wait_for_event(run, "save")
    cluster.control("off", "node2")
    wait_until(lambda: "down" in cluster.say("sinfo", "-hn", "node2", "-o%t")[1], 90, "Slurm notices")
    noticed = time.time()
    first = wait_for_event(run, "first_step", 2, timeout_s=90)["time"]
    print(f"\nfrom Slurm's notice to the next step: {first - noticed:.0f} s")  # less than none: it was sooner
    assert first - noticed < 60
    try:
        train_here(calm, 1)
        check_finished(cluster, run, tensors_of(calm.parent / "run"), 240)
        assert restarts(run) == [0]
        assert [e["nodes"] for e in events(run, "nodes")] == [[0, 1], [0]]
        assert [e["world_size"] for e in events(run, "start")] == [2, 1]
        alone = cluster.submit(recipe_of(tmp_path / "alone"), nodes="1:2")
        check_finished(cluster, alone, undisturbed, 120)
        assert [e["world_size"] for e in events(alone, "start")] == [1]
    finally:
        cluster.control("boot", "node2")


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_a_job_of_a_range_that_loses_its_first_node_starts_again_with_the_other(
    cluster: TestCluster, tmp_path: Path
) -> None:
    """The job's own program is there, so Slurm starts the job again; it begins with the node that is left."""
    calm = recipe_of(tmp_path / "calm", 3000)
    run = cluster.submit(recipe_of(tmp_path, 3000), nodes="1:2")
    wait_for_event(run, "save")
    cluster.control("off", "node1")
    try:
        wait_until(lambda: "down" in cluster.say("sinfo", "-hn", "node1", "-o%t")[1], 90, "Slurm notices")
        noticed = time.time()
        again = wait_for_event(run, "first_step", 2, timeout_s=150)["time"]
        print(f"\nfrom Slurm's notice to the next step: {again - noticed:.0f} s")
        assert again - noticed < 60
        train_here(calm, 1)
        check_finished(cluster, run, tensors_of(calm.parent / "run"), 240)
        assert restarts(run) == [0, 1]
        assert [e["world_size"] for e in events(run, "start")] == [2, 1]
        assert_no_step_lost_at_a_stop(run)
    finally:
        cluster.control("boot", "node1")


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_of_an_array_of_seeds_only_the_tasks_that_were_preempted_restart(
    cluster: TestCluster, tmp_path: Path
) -> None:
    options = ["--on", "slurm", "--nodes", "1", "--procs", "1"]
    keys = ["launch.slurm.cpus=1", "launch.slurm.array=1-6"]
    cluster.distdl("launch", str(recipe_of(tmp_path, 600)), *options, *keys)
    runs = {task: tmp_path / "run" / f"task-{task}" for task in range(1, 7)}
    for run in runs.values():
        wait_for_event(run, "save", timeout_s=120)
    said = cluster.say("squeue", "--noheader", "--array", "--format=%K %N")[1]
    places = {int(task): node for task, node in (line.split() for line in said.splitlines())}
    preempted = {task for task, node in places.items() if node == "node2"}
    assert len(preempted) == 2, said  # Slurm fills node1 first, with four
    code, said = cluster.say("srun", "--partition=high", "--nodelist=node2", "--exclusive", "hostname")
    assert code == 0, said
    for task, run in runs.items():
        wait_until(lambda run=run: events(run, "done"), 240, f"task {task} is done")  # type: ignore[misc]
        assert restarts(run) == ([0, 1] if task in preempted else [0])
        calm = recipe_of(tmp_path / f"calm{task}", 600, seed=task)
        train_here(calm, 1)
        check_finished(cluster, run, tensors_of(calm.parent / "run"), 60)


@pytest.mark.campaign
def test_a_link_cut_for_five_seconds_costs_five_seconds(
    cluster: TestCluster, tmp_path: Path, undisturbed: Any
) -> None:
    run = cluster.submit(recipe_of(tmp_path))
    wait_for_event(run, "save")
    cluster.control("link", "node2", "down")
    select.select([], [], [], 5)
    cluster.control("link", "node2", "up")
    check_finished(cluster, run, undisturbed, 90)
    assert restarts(run) == [0]
    assert len(events(run, "start")) == 1
    times = [event["time"] for event in events(run, "save")]
    assert max(b - a for a, b in itertools.pairwise(times)) > 4, "the cut has met no training"


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_a_link_that_stays_cut_is_named_and_the_run_goes_on_once_it_is_mended(
    cluster: TestCluster, tmp_path: Path, undisturbed: Any
) -> None:
    run = cluster.submit(recipe_of(tmp_path), "launch.timeout_s=5")
    wait_for_event(run, "save")
    cluster.control("link", "node2", "down")
    wait_until(lambda: cluster.queue() == ["PENDING"], 120, "the run ends and waits for the node")
    log = "".join(path.read_text() for path in sorted((run / "slurm").glob("*.log")))
    cluster.control("link", "node2", "up")
    wait_for_event(run, "job_start", 2, timeout_s=120)
    check_finished(cluster, run, undisturbed, 120)
    assert "node 1 (node2) with rank 1 is lost" in log
