"""Several nodes, each with a launcher of its own: one run, to the bit, whatever happens to one of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distdl.testing import assert_same_bits
from tests.faults.support import Launched, events, tensors_of, wait_for_event, worker_pids, write_recipe
from tests.runs import train_here

pytestmark = pytest.mark.slow

EXACT = {"max_steps": 120, "seed": 1, "reduction": "exact"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def nodes(recipe: Path, *procs: int, fail_at: str = "") -> Iterator[list[Launched]]:
    """A launcher for each node, with so many processes."""
    with contextlib.ExitStack() as stack:
        port, started = free_port(), []
        for node, count in enumerate(procs):
            place = ["--nodes", str(len(procs)), "--node-rank", str(node), "--procs", str(count)]
            meeting = ["--rendezvous", f"127.0.0.1:{port}"]
            started.append(
                stack.enter_context(Launched(["launch", str(recipe), *place, *meeting], fail_at=fail_at))
            )
        yield started


def finish(launchers: list[Launched]) -> list[int]:
    codes = [launcher.finish() for launcher in launchers]
    for launcher in launchers:
        launcher.assert_nobody_left()
    return codes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = write_recipe(tmp_path_factory.mktemp("undisturbed"), train=EXACT)
    train_here(recipe, 1)
    return tensors_of(recipe.parent / "run")


def test_a_worker_killed_on_one_node_restarts_all(tmp_path: Path, undisturbed: Any) -> None:
    """Two processes on node 0, one on node 1: the same bits as one process on one machine."""
    recipe, run = write_recipe(tmp_path, train=EXACT), tmp_path / "run"
    with nodes(recipe, 2, 1) as launchers:
        wait_for_event(run, "save")
        (victim,) = worker_pids(launchers[1])
        os.kill(victim, signal.SIGKILL)
        assert finish(launchers) == [0, 0], [each.output for each in launchers]
    (failed,) = events(run, "rank_failed")
    assert (failed["rank"], failed["node"]) == (2, 1)
    said = f"[rank 2 on node 1 ({socket.gethostname()})] ended by SIGKILL"
    assert said in launchers[0].output
    assert "restarting" not in launchers[1].output
    assert [e["world_size"] for e in events(run, "start")] == [3, 3]
    assert events(run, "start")[1]["resumed_from"] is not None
    assert_same_bits(tensors_of(run), undisturbed)


def test_a_stop_asked_of_one_node_stops_all_at_one_step(tmp_path: Path, undisturbed: Any) -> None:
    recipe, run = write_recipe(tmp_path, train=EXACT), tmp_path / "run"
    with nodes(recipe, 1, 1) as launchers:
        wait_for_event(run, "save")
        os.kill(launchers[1].process.pid, signal.SIGTERM)
        assert finish(launchers) == [75, 75], [each.output for each in launchers]
    (stop,) = events(run, "stop")
    assert stop["saved"] == stop["step"]
    train_here(recipe, 1)
    assert_same_bits(tensors_of(run), undisturbed)


@pytest.mark.parametrize("node", [0, 1])
def test_a_launcher_killed_ends_the_others_and_is_named(node: int, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, train={"max_steps": 100000}), tmp_path / "run"
    with nodes(recipe, 1, 1) as launchers:
        wait_for_event(run, "save")
        os.kill(launchers[node].process.pid, signal.SIGKILL)
        codes = finish(launchers)
    assert codes[node] == -signal.SIGKILL
    assert codes[1 - node] == 70
    output = launchers[1 - node].output
    assert f"error: node {node} " in output
    assert f"with rank {node} is lost" in output
    assert "goes on from the last checkpoint" in output
    if node == 1:
        failure = json.loads((run / "attempts" / "0001" / "failure.json").read_text())
        assert (failure["node"], failure["host"]) == (1, socket.gethostname())
        assert events(run, "node_lost")[0]["node"] == 1


@pytest.mark.campaign
def test_a_spent_budget_names_the_rank_and_its_node_on_every_node(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, launch={"max_restarts": 1})
    with nodes(recipe, 1, 1, fail_at="1:train.step@14:kill") as launchers:
        assert finish(launchers) == [70, 70]
    named = f"[rank 1 on node 1 ({socket.gethostname()})] failed at step 14: ended by SIGKILL"
    assert all(named in launcher.output for launcher in launchers)
    assert len(events(tmp_path / "run", "restart")) == 1


def test_nodes_that_would_train_different_things_never_start(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    port = free_port()
    place = ["--nodes", "2", "--procs", "1", "--rendezvous", f"127.0.0.1:{port}"]
    with (
        Launched(["launch", str(recipe), *place, "--node-rank", "0", "launch.timeout_s=30"]) as first,
        Launched(["launch", str(recipe), *place, "--node-rank", "1", "optim.lr=0.5"]) as second,
    ):
        assert second.finish() == 3
        assert "node 0 has recipe" in second.output
        os.kill(first.process.pid, signal.SIGTERM)
        assert first.finish() == 143
        first.assert_nobody_left()


# --- elastic ---


def elastic(recipe: Path, port: int, node: int, nodes: str, procs: int = 1) -> Launched:
    place = ["--nodes", nodes, "--node-rank", str(node), "--procs", str(procs)]
    return Launched(["launch", str(recipe), *place, "--rendezvous", f"127.0.0.1:{port}"])


def test_an_elastic_run_begins_with_who_is_there_and_grows_and_shrinks(tmp_path: Path) -> None:
    """Node 0 of 1:3 begins alone; node 2 comes, and is killed: node 0 goes on; node 2 comes back, and both go
    on. The bits of a calm run.
    """
    changes = {"train": {**EXACT, "max_steps": 1200}, "eval": {"every_steps": 600}}
    calm = write_recipe(tmp_path / "calm", **changes)
    train_here(calm, 1)
    recipe = write_recipe(tmp_path, **changes, launch={"gather_s": 0.2})
    run, port = tmp_path / "run", free_port()
    with elastic(recipe, port, 0, "1:3") as first:
        wait_for_event(run, "first_step")
        with elastic(recipe, port, 2, "1:3") as third:
            wait_for_event(run, "first_step", 2)
            os.kill(third.process.pid, signal.SIGKILL)
            assert third.finish() == -signal.SIGKILL
            third.assert_nobody_left()
        wait_for_event(run, "first_step", 3)
        with elastic(recipe, port, 2, "1:3") as again:
            assert finish([first, again]) == [0, 0], first.output + again.output
    assert [e["nodes"] for e in events(run, "nodes")] == [[0], [0, 2], [0], [0, 2]]
    starts = events(run, "start")
    assert [e["world_size"] for e in starts] == [1, 2, 1, 2]
    stops = [f"step-{e['step']:08d}" for e in events(run, "stop")]
    assert [starts[1]["resumed_from"], starts[3]["resumed_from"]] == stops
    (failed,) = events(run, "rank_failed")
    assert (failed.get("rank"), failed["node"]) == (None, 2)
    assert f"[node 2] node 2 ({socket.gethostname()}) with rank 1 is lost" in first.output
    assert "node 2 came: saving at the next step boundary" in first.output
    assert_same_bits(tensors_of(run), tensors_of(tmp_path / "calm" / "run"))


@pytest.mark.campaign
def test_fewer_than_the_fewest_end_the_run(tmp_path: Path) -> None:
    changes = {"train": {"max_steps": 100000}, "launch": {"gather_s": 0.5, "timeout_s": 12.0}}
    recipe, run, port = write_recipe(tmp_path, **changes), tmp_path / "run", free_port()
    with elastic(recipe, port, 0, "2:3") as first, elastic(recipe, port, 1, "2:3") as second:
        wait_for_event(run, "save")
        os.kill(second.process.pid, signal.SIGKILL)
        assert first.finish() == 70
        first.assert_nobody_left()
    assert "1 of at least 2 nodes are left" in first.output
