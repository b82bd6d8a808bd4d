from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import read_all

from distdl.checkpoint import disk, local, write
from distdl.checkpoint.manifest import MANIFEST, Facts
from distdl.checkpoint.read import find_latest, verify
from distdl.checkpoint.retention import Keep
from distdl.checkpoint.store import LocalStore
from distdl.checkpoint.write import Saver
from distdl.comm.world import World
from distdl.errors import CheckpointError, Incompatible

SaveStep = Callable[..., Path]


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def step_of_values(path: Path) -> float:
    verify(path)
    return float(read_all(path)["model/w"][0, 0])


def test_the_same_step_is_not_written_twice(save_step: SaveStep, tmp_path: Path) -> None:
    path = save_step(100)
    before = (path / MANIFEST).stat()
    assert save_step(100, {"model/w": torch.zeros(5, 3)}) == path
    assert (path / MANIFEST).stat() == before
    assert names(tmp_path) == ["step-00000100"]


def test_a_damaged_one_in_the_way_is_moved_aside(save_step: SaveStep, tmp_path: Path) -> None:
    path = save_step(100)
    (path / "rank-00000-of-00001.safetensors").write_bytes(b"x")
    assert save_step(100) == path
    assert step_of_values(path) == 100
    [aside] = [n for n in names(tmp_path) if n != path.name]
    assert aside.startswith("step-00000100.bad-")
    assert (tmp_path / aside / "rank-00000-of-00001.safetensors").read_bytes() == b"x"


def test_one_of_another_recipe_in_the_way_is_moved_aside(save_step: SaveStep, tmp_path: Path) -> None:
    save_step(100)
    path = save_step(100, {"model/w": torch.zeros(5, 3)}, recipe_hash="other")
    assert verify(path).recipe_hash == "other"
    [aside] = [n for n in names(tmp_path) if n != path.name]
    assert aside.startswith("step-00000100.old-")


def test_room_is_looked_for_before_anything_is_written(
    save_step: SaveStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(100)
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"no space left: needs [\d,]+ bytes, has 5,000, in "):
        save_step(200)
    assert names(tmp_path) == ["step-00000100"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_writing(
    save_step: SaveStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    save_step(100)

    def full(descriptor: int) -> None:
        raise OSError(number, "full")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"\[rank 0/1 on .*\] no space left"):
        save_step(200)
    assert names(tmp_path) == ["step-00000100"]


@pytest.mark.parametrize("state", [{"x": torch.zeros(1)}, {"x": {1, 2}}])
def test_a_state_that_json_cannot_hold(tmp_path: Path, state: dict[str, Any]) -> None:
    facts = Facts(1, "a", {}, "b", state, "ddp")
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        Saver(LocalStore(tmp_path), World(), Keep(1)).save({}, facts)
    assert names(tmp_path) == []


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/checkpoints"):
        saver = Saver(LocalStore(tmp_path / "file" / "checkpoints"), World(), Keep(1))
        saver.save({}, Facts(1, "a", {}, "b", {}, "ddp"))


def test_a_failure_after_the_rename_is_told_and_leaves_a_whole_checkpoint(
    save_step: SaveStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = disk.sync_directory

    def fail_for_parent(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        sync(path)

    monkeypatch.setattr(local, "sync_directory", fail_for_parent)
    with pytest.raises(CheckpointError, match="was written, but may not outlast a power failure"):
        save_step(100)
    assert find_latest(tmp_path).path == tmp_path / "step-00000100"


def test_a_removal_that_fails_does_not_fail_the_save(
    save_step: SaveStep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stuck(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "step-00000001")

    monkeypatch.setattr(write, "prune", stuck)
    verify(save_step(100))
    assert "step-00000001" in caplog.text


def test_one_of_a_newer_distdl_in_the_way_is_not_touched(
    save_step: SaveStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distdl.checkpoint.manifest.FORMAT_VERSION", 3)
    monkeypatch.setattr("distdl.checkpoint.manifest.READABLE", (3,))
    save_step(100)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format_version is '3'"):
        save_step(100)
    with pytest.raises(Incompatible):
        find_latest(tmp_path)
    save_step(50, keep=1)
    assert names(tmp_path) == ["step-00000050", "step-00000100"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_a_gpu(save_step: SaveStep) -> None:
    tensor = torch.randn(4, 6, device="cuda").t()
    path = save_step(1, {"model/w": tensor})
    assert torch.equal(read_all(path)["model/w"], tensor.cpu())
