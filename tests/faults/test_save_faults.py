"""Saving, with processes killed, failing and out of space at every boundary.

After each fault the newest good checkpoint is either the previous one or the new one, whole, never a mixture;
and the next attempt can save that step.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distdl.checkpoint import write
from distdl.checkpoint.manifest import Facts
from distdl.checkpoint.read import find_latest, load_tensors
from distdl.checkpoint.retention import clean_temporary
from distdl.checkpoint.write import SAVE_POINTS, save
from distdl.comm.world import World, join, leave
from distdl.errors import CheckpointError
from distdl.testing.faults import fail_at

# Forked from a server that has torch already, a process starts in a tenth of a second instead of three.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "distdl.checkpoint.write", "pytest"])

DEADLINE_S = 60
KILLED = -9
MAIN_ALONE = SAVE_POINTS[SAVE_POINTS.index("save.before_manifest") :]
AFTER_RENAME = SAVE_POINTS[SAVE_POINTS.index("save.renamed") :]


def tensors(step: int, count: int = 6, length: int = 50) -> dict[str, torch.Tensor]:
    """Every element of every tensor is the step, so that a mixture of two steps shows."""
    return {f"model/{i}": torch.full((length + i,), float(step)) for i in range(count)}


def facts(step: int) -> Facts:
    return Facts(step, "abc", {"seed": 7}, "f00d", {"step": step}, "ddp")


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def good_step(directory: Path) -> int:
    """The step of the newest good checkpoint, after looking at each of its tensors."""
    found = find_latest(directory)
    assert found.path is not None
    assert found.manifest is not None
    assert found.damaged == []
    step = found.manifest.step
    for name, tensor in load_tensors(found.path, found.manifest).items():
        assert torch.equal(tensor, tensors(step)[name]), f"{name} is not of step {step}"
    assert found.manifest.train_state == {"step": step}
    return step


def _child(base: Path, rank: int, size: int, step: int, fault: tuple[str, str] | None) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(base / f"store-{step}"), size) if size > 1 else None
    world = join(rank, size, "cpu", DEADLINE_S / 2, store)
    said = "saved"
    with fail_at(rank, *fault, my_rank=rank) if fault else nullcontext():
        try:
            save(base / "checkpoints", tensors(step), facts(step), world, keep=1)
        except CheckpointError as error:
            said = str(error)
    (base / f"said-{rank}").write_text(said)
    leave()


def run_save(base: Path, size: int, step: int, faults: dict[int, tuple[str, str]]) -> list[int | None]:
    """Save `step` with `size` processes; `faults` maps a rank to (point, action). Returns exit codes."""
    processes: list[BaseProcess] = [
        _context.Process(target=_child, args=(base, rank, size, step, faults.get(rank)))
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
    save(tmp_path / "checkpoints", tensors(100), facts(100), World(), keep=1)
    return tmp_path


def test_every_point_of_a_save_is_listed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []
    monkeypatch.setattr(write, "point", lambda name, step: passed.append(name))
    save(base / "checkpoints", tensors(200), facts(200), World(), keep=1)
    assert tuple(passed) == SAVE_POINTS


def test_two_ranks_share_the_writing(base: Path) -> None:
    checkpoints = base / "checkpoints"
    assert run_save(base, 2, 200, {}) == [0, 0]
    assert [said(base, 0), said(base, 1)] == ["saved", "saved"]
    assert good_step(checkpoints) == 200
    assert names(checkpoints) == ["step-00000200"]
    manifest = find_latest(checkpoints).manifest
    assert manifest is not None
    assert sorted(manifest.files) == ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    assert list(manifest.tensors) == list(tensors(200))
    bytes_each = [f.size for f in manifest.files.values()]
    assert max(bytes_each) < 1.5 * min(bytes_each)


@pytest.mark.parametrize("point", SAVE_POINTS)
def test_kill_at_every_point(base: Path, point: str) -> None:
    checkpoints = base / "checkpoints"
    assert run_save(base, 1, 200, {0: (point, "kill")}) == [KILLED]
    assert good_step(checkpoints) == (200 if point in AFTER_RENAME else 100)
    clean_temporary(checkpoints)
    save(checkpoints, tensors(200), facts(200), World(), keep=1)
    assert good_step(checkpoints) == 200
    assert not [n for n in names(checkpoints) if "." in n]


@pytest.mark.parametrize("point", ["save.begin", "save.written"])
def test_kill_of_another_rank(base: Path, point: str) -> None:
    checkpoints = base / "checkpoints"
    codes = run_save(base, 2, 200, {1: (point, "kill")})
    assert codes[1] == KILLED
    assert codes[0] not in (0, None), "rank 0 has to fail, and not wait for ever"
    assert good_step(checkpoints) == 100
    clean_temporary(checkpoints)
    assert names(checkpoints) == ["step-00000100"]


def test_kill_of_rank_0_when_all_files_are_written(base: Path) -> None:
    codes = run_save(base, 2, 200, {0: ("save.manifest_written", "kill")})
    assert codes[0] == KILLED
    assert codes[1] not in (0, None)
    assert good_step(base / "checkpoints") == 100


@pytest.mark.parametrize(
    ("rank", "point", "action", "cause"),
    [
        (1, "save.written", "enospc", "no space left"),
        (1, "save.begin", "raise", "InjectedFault: injected at save.begin"),
        (0, "save.made_directory", "enospc", "no space left"),
        (0, "save.manifest_written", "raise", "InjectedFault: injected at save.manifest_written"),
    ],
)
def test_one_rank_that_fails_fails_all(base: Path, rank: int, point: str, action: str, cause: str) -> None:
    assert run_save(base, 2, 200, {rank: (point, action)}) == [0, 0]
    assert said(base, 0) == said(base, 1)
    assert said(base, 0).startswith(f"[rank {rank}/2 on ")
    assert cause in said(base, 0)
    assert names(base / "checkpoints") == ["step-00000100"]
    assert good_step(base / "checkpoints") == 100


@pytest.mark.parametrize("point", SAVE_POINTS)
@pytest.mark.parametrize("action", ["enospc", "raise"])
def test_failing_at_every_point(base: Path, point: str, action: str) -> None:
    checkpoints = base / "checkpoints"
    with fail_at(0, point, action):
        if point == "save.pruned":
            save(checkpoints, tensors(200), facts(200), World(), keep=1)
        else:
            with pytest.raises(CheckpointError, match="no space left" if action == "enospc" else point):
                save(checkpoints, tensors(200), facts(200), World(), keep=1)
    after = point in AFTER_RENAME
    assert good_step(checkpoints) == (200 if after else 100)
    assert not [n for n in names(checkpoints) if "." in n]


def test_ranks_that_hold_different_tensors(base: Path) -> None:
    processes = [
        _context.Process(target=_differing_child, args=(base, rank), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE_S)
    assert [p.exitcode for p in processes] == [0, 0]
    for rank in range(2):
        assert said(base, rank).startswith("rank 1 saves step 200 with 4 tensors")
    assert names(base / "checkpoints") == ["step-00000100"]


def _differing_child(base: Path, rank: int) -> None:
    world = join(rank, 2, "cpu", DEADLINE_S / 2, dist.FileStore(str(base / "store"), 2))
    try:
        save(base / "checkpoints", tensors(200, count=3 + rank), facts(200), world, keep=1)
    except CheckpointError as error:
        (base / f"said-{rank}").write_text(str(error))
    leave()


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` at `place` while the block runs; skips the test where mounting is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("looks_first", [True, False])
def test_a_disk_that_is_really_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks_first: bool
) -> None:
    """4 MiB hold one checkpoint of 2.4 MB, not two. Without a look beforehand, the write itself fails."""
    big: dict[str, Any] = {"count": 6, "length": 100_000}
    with small_disk(tmp_path / "disk", "4m") as disk:
        save(disk, tensors(100, **big), facts(100), World(), keep=3)
        if not looks_first:
            monkeypatch.setattr(write, "require_room", lambda directory, needed: None)
        said = "needs" if looks_first else "while writing"
        with pytest.raises(CheckpointError, match=f"no space left:? {said}"):
            save(disk, tensors(200, **big), facts(200), World(), keep=3)
        assert names(disk) == ["step-00000100"]
        found = find_latest(disk)
        assert found.path == disk / "step-00000100"
        assert found.manifest is not None
        assert load_tensors(found.path, found.manifest)["model/5"][-1] == 100
