"""Copies in memory: a save, a lost node, a resume; and everything that may be wrong with a copy.

A node is a folder in memory: rank r lives on node NODES[r], and a node is lost when its folder is removed.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from distdl.checkpoint.find import find_and_verify
from distdl.checkpoint.folders import child
from distdl.checkpoint.manifest import MANIFEST, own_hash, step_name
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.replicas import room
from distdl.checkpoint.replicas.home import VARIABLE
from distdl.checkpoint.replicas.keeper import Replicas, open_replicas
from distdl.checkpoint.replicas.search import Search
from distdl.checkpoint.retention import Keep
from distdl.checkpoint.store import store_at
from distdl.checkpoint.write import Saver
from distdl.comm import World
from distdl.testing import assert_same_bits, run_world
from distdl.testing.faults import fail_at
from distdl.train.resume import _newest
from tests.faults.savers import Layout, facts, held, require_state, whole_layout
from tests.faults.support import Launched, events, tensors_of, write_recipe
from tests.runs import train_here

pytestmark = pytest.mark.slow

LAYOUT: Layout = whole_layout({f"model/{i}": (5, 10 + i) for i in range(6)})
TWO, FOUR = ("a", "b"), ("a", "a", "b", "c")


def open_here(world: World, run: Path, nodes: tuple[str, ...]) -> tuple[Replicas, list[str]]:
    os.environ[VARIABLE] = str(memory_of(run, nodes[world.rank]))
    said: list[str] = []
    replicas = open_replicas(run, world, said.append, 30.0)
    assert replicas is not None, said
    return replicas, said


def memory_of(run: Path, node: str) -> Path:
    return run / f"memory-of-{node}"


def copies(run: Path, node: str) -> list[Path]:
    """Those that are checkpoints; beside them lies the memory of the save before, for the next one."""
    return sorted(manifest.parent for manifest in memory_of(run, node).glob(f"*/step-*/{MANIFEST}"))


def save(world: World, run: Path, nodes: tuple[str, ...], steps: list[int], asynchronous: bool) -> list[str]:
    """Save these steps; what was said about copies."""
    replicas, said = open_here(world, run, nodes)
    store = store_at(run / "checkpoints")
    saver = Saver(store, world, Keep(9), asynchronous=asynchronous, replicas=replicas)
    for step in steps:
        pieces = held(LAYOUT, step)
        saver.save(pieces, facts(step))
        for piece in pieces.values():
            piece.data.zero_()  # training goes on
        if step % 2:
            saver.commit()
    saver.settle()
    saver.close()
    return said


def resume(
    world: World, run: Path, nodes: tuple[str, ...], at_least: int = 0, recipe: str = "abc"
) -> tuple[int | None, list[str]]:
    """The step that memory has, read whole on every rank; None where it has none; and the notes."""
    replicas, _ = open_here(world, run, nodes)
    search = Search(replicas, recipe, "f00d")
    found = search.newest(at_least, dict.fromkeys(search.steps))
    step = None
    if found is not None:
        step = found[1].step
        require_state(open_checkpoint(found[0]), step, LAYOUT)
    search.close(used=found is not None)
    return step, search.notes


def save_and_resume(world: World, run: Path) -> None:
    """One process after another: what was kept of a resume is enough to save on, and to resume again."""
    save(world, run, TWO, [1], True)
    assert resume(world, run, TWO)[0] == 1
    assert resume(world, run, TWO)[0] == 1
    save(world, run, TWO, [2, 3], True)
    assert resume(world, run, TWO)[0] == 3


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_lost_node_loses_nothing(run: Path, asynchronous: bool) -> None:
    run_world(save, 4, run, FOUR, [1, 2, 3], asynchronous)
    for node in "abc":
        assert [p.name[: len("step-00000003")] for p in copies(run, node)] == ["step-00000003"], (
            "the last snapshot alone is kept"
        )
    disk = json.loads((run / "checkpoints" / step_name(3) / MANIFEST).read_text())
    assert json.loads((copies(run, "a")[0] / MANIFEST).read_text()) == disk
    for lost in "abc":
        aside = run / "aside"
        memory_of(run, lost).rename(aside)
        assert [step for step, _ in run_world(resume, 4, run, FOUR, 3)] == [3] * 4
        shutil.rmtree(memory_of(run, lost))
        aside.rename(memory_of(run, lost))


def test_another_world_reads_it(run: Path) -> None:
    """The node that was lost does not come back: two ranks go on with what three wrote, then one alone."""
    run_world(save, 3, run, ("a", "b", "c"), [1, 2], True)
    shutil.rmtree(memory_of(run, "c"))
    assert run_world(resume, 2, run, TWO) == [(2, [])] * 2
    assert run_world(resume, 1, run, ("b",)) == [(2, [])]


def test_two_neighbours_lost_is_too_much(run: Path) -> None:
    run_world(save, 3, run, ("a", "b", "c"), [1], True)
    for lost in "bc":
        shutil.rmtree(memory_of(run, lost))
    found = run_world(resume, 3, run, ("a", "b", "c"))
    assert [step for step, _ in found] == [None] * 3
    assert "in no node's memory" in found[0][1][0]


def test_what_a_resume_leaves_is_enough_to_go_on(run: Path) -> None:
    run_world(save_and_resume, 2, run)


@pytest.mark.parametrize("where", ["own", "kept"])
def test_a_damaged_copy_is_found_and_the_other_one_used(run: Path, where: str) -> None:
    run_world(save, 2, run, TWO, [1], True)
    file = copies(run, "a")[0] / f"rank-0000{0 if where == 'own' else 1}-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for step, notes in run_world(resume, 2, run, TWO):
        assert step == 1
        assert file.name in notes[0]
        assert "memory of node 0" in notes[0]


def test_damaged_everywhere_is_as_good_as_none(run: Path) -> None:
    run_world(save, 2, run, TWO, [1], True)
    for node in "ab":
        file = copies(run, node)[0] / "rank-00000-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
        (copies(run, node)[0] / "rank-00001-of-00002.safetensors").unlink()
    assert [step for step, _ in run_world(resume, 2, run, TWO)] == [None] * 2


def test_of_another_recipe_or_older_than_the_disk_is_not_used(run: Path) -> None:
    run_world(save, 2, run, TWO, [1], True)
    assert [step for step, _ in run_world(resume, 2, run, TWO, 2)] == [None] * 2
    run_world(save, 2, run, TWO, [2], True)
    assert [step for step, _ in run_world(resume, 2, run, TWO, 0, "another")] == [None] * 2


def little_memory(world: World, run: Path) -> list[str]:
    if world.rank == 1:
        room.free_memory.__globals__["_machine"] = lambda: iter([10])
    return save(world, run, TWO, [1, 2], True)


def test_too_little_memory_on_one_node_is_said_once_and_fails_nobody(run: Path) -> None:
    for said in run_world(little_memory, 2, run):
        assert len(said) == 1
        assert "[rank 1/2 on " in said[0]
        assert "10 can be taken" in said[0]
    assert find_and_verify(store_at(run / "checkpoints"), World()).path == child(
        run / "checkpoints", step_name(2)
    )
    assert copies(run, "a") == copies(run, "b") == []


POINTS = ("replica.sent", "replica.received", "replica.manifest_written")


def killed(world: World, run: Path, point: str) -> Any:
    save(world, run, TWO, [1], True)
    with fail_at(None, point, "kill", my_rank=world.rank):
        save(world, run, TWO, [2], True)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_every_point(run: Path, point: str) -> None:
    """Everybody dies there. What memory has is whole; the disk is never behind it."""
    with pytest.raises(AssertionError, match="died without a word"):
        run_world(killed, 2, run, point)
    newest = find_and_verify(store_at(run / "checkpoints"), World()).manifest
    assert newest is not None
    step, _ = run_world(resume, 2, run, TWO)[0]
    assert step in ((1,) if point == "replica.sent" else (1, 2))
    assert newest.step >= (step or 0)
    assert newest.step == (1 if point == "replica.sent" else 2)


def forgotten(world: World, run: Path) -> None:
    replicas, _ = open_here(world, run, TWO)
    world.barrier()
    replicas.forget()


def test_a_run_that_has_ended_leaves_no_memory_behind(run: Path) -> None:
    run_world(save, 2, run, TWO, [1], True)
    run_world(forgotten, 2, run)
    assert not [p for node in "ab" for p in memory_of(run, node).iterdir() if p.is_dir()]


def others_on_one_node(world: World, run: Path) -> list[str]:
    return save(world, run, ("a", "a"), [1], True)


def test_one_node_says_what_its_copy_is_worth(run: Path) -> None:
    for said in run_world(others_on_one_node, 2, run):
        assert "not the node" in said[0]
    assert [step for step, _ in run_world(resume, 2, run, ("a", "a"))] == [1, 1]


# --- the disk says which checkpoint, memory has the bytes ---


def start(world: World, run: Path) -> tuple[int | None, bool]:
    """What a start would load: its step, and whether from memory."""
    replicas, _ = open_here(world, run, TWO)
    search = Search(replicas, "abc", "f00d")
    found, here = _newest(store_at(run / "checkpoints"), world, search)
    search.close(used=here is not None)
    if found.manifest is None:
        return None, False
    require_state(open_checkpoint(here or found.path or ""), found.manifest.step, LAYOUT)
    return found.manifest.step, here is not None


def test_a_step_that_was_removed_from_the_disk_is_not_brought_back(run: Path) -> None:
    run_world(save, 2, run, TWO, [1, 2, 3], True)
    assert run_world(start, 2, run) == [(3, True)] * 2
    shutil.rmtree(run / "checkpoints" / step_name(3))
    assert run_world(start, 2, run) == [(2, False)] * 2


def test_another_checkpoint_of_the_same_step_is_not_taken_for_it(run: Path) -> None:
    run_world(save, 2, run, TWO, [1], True)
    shutil.rmtree(run / "checkpoints")
    saver = Saver(store_at(run / "checkpoints"), World(), Keep(9))
    saver.save(held(LAYOUT, 1), facts(1))
    saver.close()
    assert run_world(start, 2, run) == [(1, False)] * 2


def test_a_fresh_start_leaves_no_old_copies(run: Path) -> None:
    run_world(save, 2, run, TWO, [1], True)
    shutil.rmtree(run / "checkpoints")
    assert run_world(start, 2, run) == [(None, False)] * 2
    assert copies(run, "a") == copies(run, "b") == []


def test_a_damaged_checkpoint_on_disk_is_taken_from_memory(run: Path) -> None:
    run_world(save, 2, run, TWO, [1, 2], True)
    (run / "checkpoints" / step_name(2) / MANIFEST).write_text("{}")
    assert run_world(start, 2, run) == [(2, True)] * 2


def test_one_that_a_newer_distdl_wrote_is_not_passed_over(run: Path) -> None:
    """Memory has step 1, which is on disk as well; the disk's newest is not for this distdl to judge."""
    run_world(save, 2, run, TWO, [1], True)
    shutil.copytree(run / "checkpoints" / step_name(1), run / "checkpoints" / step_name(2))
    path = run / "checkpoints" / step_name(2) / MANIFEST
    raw = json.loads(path.read_text()) | {"format_version": 99, "step": 2}
    path.write_text(json.dumps({**raw, "self_hash": own_hash(raw)}))
    with pytest.raises(AssertionError, match="Incompatible"):
        run_world(start, 2, run)


def test_a_damaged_manifest_in_one_memory_is_replaced(run: Path) -> None:
    run_world(save, 2, run, TWO, [1], True)
    (copies(run, "b")[0] / MANIFEST).write_text("{}")
    assert run_world(start, 2, run) == [(1, True)] * 2
    assert (copies(run, "b")[0] / MANIFEST).read_bytes() == (copies(run, "a")[0] / MANIFEST).read_bytes()


def start_without_a_peer(world: World, run: Path) -> tuple[int | None, bool]:
    with fail_at(1, "replica.fetching", "raise", my_rank=world.rank):
        return start(world, run)


def test_what_cannot_be_fetched_is_read_from_disk(run: Path) -> None:
    run_world(save, 2, run, TWO, [1], True)
    shutil.rmtree(memory_of(run, "b"))
    assert run_world(start_without_a_peer, 2, run) == [(1, False)] * 2


def send_fails(world: World, run: Path) -> list[str]:
    with fail_at(1, "replica.sent", "raise", my_rank=world.rank):
        return save(world, run, TWO, [1, 2], True)


def test_copies_that_fail_on_one_rank_fail_no_save(run: Path) -> None:
    for said in run_world(send_fails, 2, run):
        assert len(said) == 1
        assert "[rank 1/2 on " in said[0]
        assert "injected at replica.sent" in said[0]
    assert find_and_verify(store_at(run / "checkpoints"), World()).path == run / "checkpoints" / step_name(2)
    assert copies(run, "a") == copies(run, "b") == []


@pytest.mark.slow
def test_a_run_goes_on_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank is killed and the run ends; what is on disk is damaged; the next start has it in memory."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "memory"))
    calm = write_recipe(tmp_path / "calm")
    recipe = write_recipe(
        tmp_path, checkpoint={"every_steps": 10, "replicas": "node"}, launch={"max_restarts": 0}
    )
    train_here(calm)
    with Launched(["launch", str(recipe), "--procs", "2"], fail_at="1:train.step@29:kill") as command:
        assert command.finish() == 70, command.output
        assert "not the node" in command.output
    newest = events(tmp_path / "run", "save")[-1]["path"]
    for file in (tmp_path / "run" / "checkpoints" / newest).glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    train_here(recipe)
    started = events(tmp_path / "run", "start")[-1]
    assert (started["resumed_from"], started["in_memory"]) == (newest, True)
    assert_same_bits(tensors_of(tmp_path / "run"), tensors_of(tmp_path / "calm" / "run"))
    assert not [p for p in (tmp_path / "memory").iterdir() if p.is_dir()], "a finished run leaves no memory"
