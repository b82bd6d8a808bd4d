"""The folder in a node's memory: whose it is, what is left in it, and how much room there is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distdl.checkpoint.replicas import room
from distdl.checkpoint.replicas.home import VARIABLE, Home, mark_of, sweep
from distdl.checkpoint.replicas.mapped import Mapped
from distdl.errors import CheckpointError


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "memory"))
    return tmp_path / "memory"


def test_processes_of_a_node_meet_in_one_place_and_runs_do_not(memory: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    mark = mark_of(run)
    assert mark_of(run) == mark
    one, same, other = Home(str(run), mark), Home(str(run), mark), Home(str(run), "another")
    assert one.path == same.path != other.path
    assert one.node == same.node == other.node
    assert memory.stat().st_mode & 0o777 == 0o700
    for home in (one, same, other):
        home.close()


@pytest.mark.parametrize("kind", ["open to others", "a link"])
def test_a_place_that_others_could_change_is_refused(memory: Path, tmp_path: Path, kind: str) -> None:
    if kind == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        memory.symlink_to(tmp_path / "elsewhere")
    else:
        memory.mkdir()
        memory.chmod(0o755)
    with pytest.raises(CheckpointError, match="mode 0700"):
        Home("run", "mark")


def test_what_a_run_that_is_gone_has_left_is_removed(memory: Path, tmp_path: Path) -> None:
    for name in ("gone", "there", "anew", "in use"):
        (tmp_path / name).mkdir()
    homes = {name: Home(str(tmp_path / name), mark_of(tmp_path / name)) for name in ("gone", "there", "anew")}
    held = Home(str(tmp_path / "in use"), mark_of(tmp_path / "in use"))
    for home in homes.values():
        home.close()
    for name in ("gone", "anew", "in use"):
        (tmp_path / name / ".memory-id").unlink()
    (tmp_path / "gone").rmdir()
    mark_of(tmp_path / "anew")  # another run at the same path
    assert sorted(sweep(memory)) == [str(tmp_path / "anew"), str(tmp_path / "gone")]
    assert homes["there"].path.is_dir()
    assert held.path.is_dir()
    held.close()


def test_a_mapped_file_is_for_this_user_and_is_never_one_that_stands(tmp_path: Path) -> None:
    made = Mapped.create(tmp_path / "a", 10)
    made.tensor.copy_(made.tensor.new_tensor(range(10)))
    assert (tmp_path / "a").read_bytes() == bytes(range(10))
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        Mapped.create(tmp_path / "a", 10)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(OSError):
        Mapped.attach(tmp_path / "link", 10)
    with pytest.raises(ValueError):
        Mapped.attach(tmp_path / "a", 11)


def test_room_is_the_least_of_disk_machine_and_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (groups / "job/step").mkdir(parents=True)
    monkeypatch.setattr(room, "PROC", proc)
    monkeypatch.setattr(room, "CGROUP", groups)
    found = os.statvfs(tmp_path)
    disk = found.f_bavail * found.f_frsize
    assert abs(room.free_memory(tmp_path) - disk) < 1 << 26, "nothing else known"
    (proc / "meminfo").write_text("MemTotal:  1000 kB\nMemAvailable:  700 kB\n")
    assert room.free_memory(tmp_path) == 600 * 1024
    (proc / "self/cgroup").write_text("0::/job/step\n")
    (groups / "job/step/memory.max").write_text("max\n")
    (groups / "job/memory.max").write_text("100000\n")
    (groups / "job/memory.current").write_text("60000\n")
    (groups / "job/memory.stat").write_text("anon 5\ninactive_file 20000\n")
    assert room.free_memory(tmp_path) == 100000 - 60000 + 20000 - 10000
    (groups / "job/memory.current").write_text("130000\n")
    assert room.free_memory(tmp_path) == 0, "never negative"
