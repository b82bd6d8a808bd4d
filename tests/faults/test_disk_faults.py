"""Disks that fill up, lose bytes, flip bits and fail to read: noticed every time, named, and nothing lost.

The full disk is a real one: a tmpfs that leaves room for one page more each time, until a save fits, so that
each write fails in turn, some of them half way; then the same with the number of files.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distdl.checkpoint import local
from distdl.checkpoint.manifest import MANIFEST
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import find_latest, verify
from distdl.comm import World
from distdl.errors import CheckpointError
from distdl.testing import run_world
from tests.faults.mounts import SmallDisk, own_mounts
from tests.faults.savers import Layout, facts, good_steps, held, saver_for, whole_layout

BIG: Layout = whole_layout({f"model/{i}": (40, 50 + i) for i in range(4)})
SMALL: Layout = whole_layout({f"model/{i}": (3, 5 + i) for i in range(4)})
OLDER, NEWER = 100, 200


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- a disk that is full ---


def fill_in_turn(world: World, base: Path, asynchronous: bool, what: str) -> dict[str, Any]:
    """Save with room for 0, 1, 2, ... pages (or files) more, until it succeeds. Returns what was said.

    What is wrong raises here: in this process alone the disk can be seen.
    """
    try:
        own_mounts()
        disk = SmallDisk(base / "disk")
    except OSError as error:
        return {"refused": str(error)}
    local.require_room = lambda directory, needed: None  # type: ignore[attr-defined]
    checkpoints = disk.place / "checkpoints"
    saver = saver_for(str(checkpoints), world, asynchronous)
    saver.save(held(BIG, OLDER), facts(OLDER))
    saver.settle()
    before = contents(checkpoints)
    said: list[str] = []
    while True:
        disk.leave(**{what: len(said)})
        try:
            saver.save(held(BIG, NEWER), facts(NEWER))
            saver.settle()
            break
        except CheckpointError as error:
            said.append(str(error))
        assert contents(checkpoints) == before
        assert names(checkpoints) == [f"step-{OLDER:08d}"], "the unfinished save was not cleaned up"
        assert good_steps(str(checkpoints), BIG) == [OLDER]
        assert len(said) < 100
    assert good_steps(str(checkpoints), BIG) == [NEWER, OLDER]
    return {"said": said, "written": len(contents(checkpoints)) - len(before)}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("what", ["pages", "inodes"])
@pytest.mark.slow
def test_a_disk_that_is_full_at_every_write_in_turn(tmp_path: Path, asynchronous: bool, what: str) -> None:
    found = run_world(fill_in_turn, 1, tmp_path, asynchronous, what)[0]
    if "refused" in found:
        pytest.skip(f"a small tmpfs cannot be mounted here: {found['refused']}")
    # The file of the tensors has 8 pages and more, the manifest one; a directory and two files are made.
    assert len(found["said"]) >= (9 if what == "pages" else 3)
    for text in found["said"]:
        assert "no space left" in text


def too_small(world: World, base: Path, asynchronous: bool) -> str:
    """What is said where the room is looked at before anything is written."""
    try:
        own_mounts()
        disk = SmallDisk(base / "disk")
    except OSError as error:
        return f"refused: {error}"
    checkpoints = disk.place / "checkpoints"
    saver = saver_for(str(checkpoints), world, asynchronous)
    saver.save(held(BIG, OLDER), facts(OLDER))
    saver.settle()
    disk.leave(pages=30)
    with pytest.raises(CheckpointError) as caught:
        saver.save(held(BIG, NEWER), facts(NEWER))
    assert good_steps(str(checkpoints), BIG) == [OLDER]
    assert names(checkpoints) == [f"step-{OLDER:08d}"]
    return str(caught.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_is_too_small_is_not_begun_on(tmp_path: Path, asynchronous: bool) -> None:
    said = run_world(too_small, 1, tmp_path, asynchronous)[0]
    if said.startswith("refused"):
        pytest.skip(f"a small tmpfs cannot be mounted here: {said}")
    assert "no space left: needs 1," in said
    assert "has 122,880" in said


# --- a disk that damages what it holds ---


@pytest.fixture(scope="module", params=[False, True], ids=["synchronous", "asynchronous"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of two steps, of two ranks each."""
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    run_world(save_two, 2, folder, request.param)
    return folder


@pytest.fixture
def two(written: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(written, tmp_path / "checkpoints")


def save_two(world: World, folder: Path, asynchronous: bool) -> None:
    saver = saver_for(str(folder), world, asynchronous)
    for step in (OLDER, NEWER):
        saver.save(held(SMALL, step), facts(step))
        saver.settle()


def files_of(folder: Path) -> list[Path]:
    """The files of the newer checkpoint."""
    files = sorted((folder / f"step-{NEWER:08d}").iterdir())
    assert (files[0].name, len(files)) == (MANIFEST, 3)
    return files


def require_noticed(folder: Path, file: Path) -> None:
    """The damage to `file` is found and named, the older checkpoint is used, and nothing was written."""
    before = contents(folder)
    found = find_latest(folder)
    assert found.manifest is not None
    assert found.manifest.step == OLDER, f"{file.name}: the damage was not noticed"
    ((path, reason),) = found.damaged
    assert Path(path) == file.parent
    assert file.name in reason
    assert contents(folder) == before


def flips(size: int, count: int, chance: random.Random) -> Iterator[tuple[int, int]]:
    """(byte, bit) all over a file: each bit of a few at its ends, and `count` at random."""
    ends = [*range(9), size - 3]
    yield from ((byte, bit) for byte in ends for bit in range(8))
    for _ in range(count):
        yield chance.randrange(size), chance.randrange(8)


def flip_everywhere(folder: Path, count: int) -> int:
    chance = random.Random(count)
    flipped = 0
    for file in files_of(folder):
        for byte, bit in flips(file.stat().st_size, count, chance):
            flip(file, byte, bit)
            require_noticed(folder, file)
            flip(file, byte, bit)
            flipped += 1
    assert good_steps(str(folder), SMALL) == [NEWER, OLDER]
    return flipped


def flip(file: Path, byte: int, bit: int) -> None:
    with file.open("r+b", buffering=0) as opened:
        old = os.pread(opened.fileno(), 1, byte)[0]
        os.pwrite(opened.fileno(), bytes([old ^ (1 << bit)]), byte)


@pytest.mark.slow
def test_a_flipped_bit_is_noticed_in_every_file(two: Path) -> None:
    assert flip_everywhere(two, 20) == 3 * 100


@pytest.mark.campaign
def test_thousands_of_flipped_bits_are_noticed(two: Path) -> None:
    print(f"\n{flip_everywhere(two, 3000)} flipped bits, all noticed and named")


def cut(to: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, to(file.stat().st_size))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": cut(lambda size: 0),
    "cut in the first word": cut(lambda size: 5),
    "cut in half": cut(lambda size: size // 2),
    "without its last two bytes": cut(lambda size: size - 2),  # a manifest's last one only ends its line
    "with a byte too many": cut(lambda size: size + 1),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_damaged_in_turn(two: Path, damage: str) -> None:
    for file in files_of(two):
        data = file.read_bytes()
        DAMAGES[damage](file)
        require_noticed(two, file)
        file.write_bytes(data)
    assert good_steps(str(two), SMALL) == [NEWER, OLDER]


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files put in this list cannot be read any more, as from a disk with a bad sector."""
    bad: list[Path] = []
    preadv = os.preadv

    def read(descriptor: int, buffers: Any, offset: int) -> int:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")) in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    return bad


def test_a_file_that_cannot_be_read(two: Path, unreadable: list[Path]) -> None:
    newer = two / f"step-{NEWER:08d}"
    saved = open_checkpoint(newer)
    for file in files_of(two):
        unreadable[:] = [file]
        with pytest.raises(CheckpointError, match=f"{file.name}: cannot be read"):
            verify(newer)
        found = find_latest(two)
        ((path, reason),) = found.damaged
        assert (found.path, path) == (two / f"step-{OLDER:08d}", newer)
        assert file.name in reason
        if file.name != MANIFEST:
            with pytest.raises(CheckpointError, match=f"{file.name}: cannot be read"):
                [saved.whole(name) for name in saved.metas]
    unreadable.clear()
    assert good_steps(str(two), SMALL) == [NEWER, OLDER]
