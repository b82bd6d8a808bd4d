"""Saving, with processes killed and failing at every boundary, in the foreground and in the background.

After each fault the newest good checkpoint is either the previous one or the new one, whole, never a mixture;
and the next attempt can save that step.
"""

from __future__ import annotations

import multiprocessing
from contextlib import nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import FileStore

from distdl.checkpoint.find import find_and_verify
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import find_latest
from distdl.checkpoint.store import store_at
from distdl.checkpoint.write import COPIED, SAVE_POINTS
from distdl.comm.world import World, join, leave
from distdl.errors import CheckpointError
from distdl.testing import faults
from distdl.testing.faults import fail_at
from distdl.testing.worlds import PRELOAD
from tests.faults.savers import KILLED, Layout, facts, held, require_state, saver_for, whole_layout

# Forked from a server that has torch already, a process starts in a tenth of a second instead of three.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)

DEADLINE_S = 60
AFTER_RENAME = SAVE_POINTS[SAVE_POINTS.index("save.renamed") :]
POINTS = [(point, False) for point in SAVE_POINTS] + [(point, True) for point in (*SAVE_POINTS, COPIED)]
"""Every point, and whether the save is asynchronous."""


def tensors(count: int = 6) -> Layout:
    return whole_layout({f"model/{i}": (5, 10 + i) for i in range(count)})


def save(directory: Path, step: int, world: World, asynchronous: bool, count: int = 6) -> None:
    """Save one step, keeping the newest checkpoint alone, and wait until it is committed."""
    saver = saver_for(str(directory), world, asynchronous, keep=1)
    try:
        saver.save(held(tensors(count), step), facts(step))
        saver.settle()
    finally:
        saver.close()


def sweep(directory: Path) -> None:
    store_at(directory).sweep()


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def good_step(directory: Path) -> int:
    """The step of the newest good checkpoint, after looking at each of its tensors."""
    found = find_latest(directory)
    assert found.path is not None
    assert found.manifest is not None
    assert found.damaged == []
    step = found.manifest.step
    require_state(open_checkpoint(found.path), step, tensors())
    assert found.manifest.train_state == {"step": step}
    assert find_and_verify(store_at(directory), World()) == found
    return step


def _child(
    base: Path, rank: int, size: int, step: int, fault: tuple[str, str] | None, asynchronous: bool, count: int
) -> None:
    torch.set_num_threads(1)
    store = FileStore(str(base / f"store-{step}"), size) if size > 1 else None
    world = join(rank, size, "cpu", DEADLINE_S / 2, store)
    said = "saved"
    with fail_at(rank, *fault, my_rank=rank) if fault else nullcontext():
        try:
            save(base / "checkpoints", step, world, asynchronous, count)
        except CheckpointError as error:
            said = str(error)
    (base / f"said-{rank}").write_text(said)
    leave()


def run_save(
    base: Path,
    size: int,
    step: int,
    armed: dict[int, tuple[str, str]],
    asynchronous: bool,
    counts: tuple[int, ...] = (6, 6),
) -> list[int | None]:
    """Save `step` with `size` processes; `armed` maps a rank to (point, action). Returns exit codes."""
    processes: list[BaseProcess] = [
        _context.Process(
            target=_child, args=(base, rank, size, step, armed.get(rank), asynchronous, counts[rank])
        )
        for rank in range(size)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(DEADLINE_S)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def said(base: Path, rank: int) -> str:
    return (base / f"said-{rank}").read_text()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A directory whose `checkpoints/` holds step 100."""
    save(tmp_path / "checkpoints", 100, World(), False)
    return tmp_path


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_point_of_a_save_is_listed(
    base: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    passed: list[str] = []
    monkeypatch.setattr(faults, "point", lambda name, step: passed.append(name))
    save(base / "checkpoints", 200, World(), asynchronous)
    assert [name for name in passed if name != COPIED] == list(SAVE_POINTS)
    assert (COPIED in passed) == asynchronous


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_ranks_share_the_writing(base: Path, asynchronous: bool) -> None:
    checkpoints = base / "checkpoints"
    assert run_save(base, 2, 200, {}, asynchronous) == [0, 0]
    assert [said(base, 0), said(base, 1)] == ["saved", "saved"]
    assert good_step(checkpoints) == 200
    assert names(checkpoints) == ["step-00000200"]
    manifest = find_latest(checkpoints).manifest
    assert manifest is not None
    assert sorted(manifest.files) == ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    assert list(manifest.tensors) == list(tensors())
    bytes_each = [f.size for f in manifest.files.values()]
    assert max(bytes_each) < 1.5 * min(bytes_each)


@pytest.mark.parametrize(("point", "asynchronous"), POINTS)
def test_kill_at_every_point(base: Path, point: str, asynchronous: bool) -> None:
    checkpoints = base / "checkpoints"
    assert run_save(base, 1, 200, {0: (point, "kill")}, asynchronous) == [KILLED]
    assert good_step(checkpoints) == (200 if point in AFTER_RENAME else 100)
    sweep(checkpoints)
    save(checkpoints, 200, World(), asynchronous)
    assert good_step(checkpoints) == 200
    assert not [n for n in names(checkpoints) if "." in n]


@pytest.mark.parametrize(
    ("point", "asynchronous"),
    [("save.begin", False), ("save.written", False), ("save.data_written", True), (COPIED, True)],
)
def test_kill_of_another_rank(base: Path, point: str, asynchronous: bool) -> None:
    checkpoints = base / "checkpoints"
    codes = run_save(base, 2, 200, {1: (point, "kill")}, asynchronous)
    assert codes[1] == KILLED
    assert codes[0] not in (0, None), "rank 0 has to fail, and not wait for ever"
    assert good_step(checkpoints) == 100
    sweep(checkpoints)
    assert names(checkpoints) == ["step-00000100"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_kill_of_rank_0_when_all_files_are_written(base: Path, asynchronous: bool) -> None:
    codes = run_save(base, 2, 200, {0: ("save.manifest_written", "kill")}, asynchronous)
    assert codes[0] == KILLED
    assert codes[1] not in (0, None)
    assert good_step(base / "checkpoints") == 100


@pytest.mark.parametrize(
    ("rank", "point", "action", "asynchronous", "cause"),
    [
        (1, "save.written", "enospc", False, "no space left"),
        (1, "save.begin", "raise", False, "InjectedFault: injected at save.begin"),
        (0, "save.made_directory", "enospc", False, "no space left"),
        (0, "save.manifest_written", "raise", False, "InjectedFault: injected at save.manifest_written"),
        (1, "save.data_written", "enospc", True, "no space left"),
        (1, COPIED, "raise", True, "InjectedFault: injected at save.copied"),
        (0, "save.written", "raise", True, "InjectedFault: injected at save.written"),
    ],
)
def test_one_rank_that_fails_fails_all(
    base: Path, rank: int, point: str, action: str, asynchronous: bool, cause: str
) -> None:
    assert run_save(base, 2, 200, {rank: (point, action)}, asynchronous) == [0, 0]
    assert said(base, 0) == said(base, 1)
    assert said(base, 0).startswith(f"[rank {rank}/2 on ")
    assert cause in said(base, 0)
    assert names(base / "checkpoints") == ["step-00000100"]
    assert good_step(base / "checkpoints") == 100


@pytest.mark.parametrize(("point", "asynchronous"), POINTS)
@pytest.mark.parametrize("action", ["enospc", "raise"])
def test_failing_at_every_point(base: Path, point: str, action: str, asynchronous: bool) -> None:
    checkpoints = base / "checkpoints"
    with fail_at(0, point, action):
        if point == "save.pruned":
            save(checkpoints, 200, World(), asynchronous)
        else:
            with pytest.raises(CheckpointError, match="no space left" if action == "enospc" else point):
                save(checkpoints, 200, World(), asynchronous)
    after = point in AFTER_RENAME
    assert good_step(checkpoints) == (200 if after else 100)
    assert not [n for n in names(checkpoints) if "." in n]


def test_ranks_that_hold_different_tensors(base: Path) -> None:
    assert run_save(base, 2, 200, {}, False, counts=(3, 4)) == [0, 0]
    for rank in range(2):
        assert said(base, rank).startswith("rank 1 saves step 200 with 4 tensors")
    assert names(base / "checkpoints") == ["step-00000100"]
