"""`Saver` with several ranks, in pieces, in the background; and reading all ranks together."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import facts, read_all, save_at, some_tensors, whole
from torch import Tensor

from distdl.checkpoint.find import find_and_verify
from distdl.checkpoint.folders import Place
from distdl.checkpoint.manifest import MANIFEST
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import Found, find_latest, step_directories, verify
from distdl.checkpoint.retention import Keep
from distdl.checkpoint.store import LocalStore, ObjectStore, store_at
from distdl.checkpoint.write import COPIED, SAVE_POINTS, Saver
from distdl.comm.world import World
from distdl.errors import CheckpointError, Incompatible
from distdl.pieces import Piece
from distdl.testing import faults, run_world
from distdl.testing.faults import fail_at


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def cut(tensor: Tensor, rank: int, size: int) -> Piece:
    """This rank's run of a tensor, of uneven length."""
    flat = tensor.reshape(-1)
    ends = [flat.numel() * r * r // (size * size) for r in range(size + 1)]
    return Piece(flat[ends[rank] : ends[rank + 1]].contiguous(), tuple(tensor.shape), ends[rank])


def state(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model/a": torch.randn(7, 5, generator=generator),
        "model/b": torch.randn(3, generator=generator).bfloat16(),
        "model/count": torch.tensor(step),
        "optim/m/a": torch.randn(7, 5, generator=generator),
        "optim/m/b": torch.randn(1, generator=generator),
    }


def held(step: int, world: World) -> dict[str, Piece]:
    """Weights are whole on every rank, what the optimiser keeps is cut."""
    return {
        name: cut(t, world.rank, world.size) if name.startswith("optim") else Piece(t, tuple(t.shape))
        for name, t in state(step).items()
    }


def same(place: Place, step: int) -> bool:
    found = read_all(place)
    return found.keys() == state(step).keys() and all(
        torch.equal(found[n], t) for n, t in state(step).items()
    )


def _many_saves(world: World, folder: Path) -> list[str]:
    told = []
    for asynchronous in (False, True):
        store = LocalStore(folder / str(asynchronous))
        saver = Saver(store, world, Keep(2), asynchronous=asynchronous)
        for step in (1, 2, 3):
            saver.save(held(step, world), facts(step))
        assert saver.in_flight == (3 if asynchronous else None)
        saver.settle()
        assert saver.in_flight is None
        assert not saver.written()
        found = find_and_verify(store, world)
        assert found.path is not None
        assert same(found.path, 3)
        told.append(str(found.path))
        with fail_at(1, "save.data_written", "enospc", my_rank=world.rank):
            try:
                saver.save(held(4, world), facts(4))
                saver.settle()
            except CheckpointError as error:
                told.append(str(error))
        saver.save(held(4, world), facts(4))
        saver.settle()
        if world.is_main:  # one that only rank 0 can see the damage of
            (folder / str(asynchronous) / "step-00000004" / MANIFEST).write_text("{}")
        world.barrier()
        again = find_and_verify(store, world)
        assert again.path == found.path
        told += [reason for _, reason in again.damaged]
        saver.close()
    return told


def test_two_ranks_in_pieces_at_once_and_in_the_background(tmp_path: Path) -> None:
    first, second = run_world(_many_saves, 2, tmp_path)
    assert first == second
    for path, failure, damage in (first[:3], first[3:]):
        assert names(Path(path).parent) == ["step-00000003", "step-00000004"]
        assert failure.startswith("[rank 1/2 on ")
        assert "no space left" in failure
        assert "step-00000004 was not written; earlier checkpoints are as they were" in failure
        assert damage.startswith("manifest.json: its own hash is")
        manifest = verify(Path(path))
        assert len(manifest.tensors["optim/m/a"].pieces) == 2
        assert sorted(manifest.files) == [f"rank-0000{r}-of-00002.safetensors" for r in range(2)]
        saved = open_checkpoint(path)
        assert torch.equal(saved.run("optim/m/a", 5, 33), state(3)["optim/m/a"].reshape(-1)[5:33])


def _bad_pieces(world: World, folder: Path) -> list[str]:
    def told(pieces: dict[str, Piece], step: int = 1) -> str:
        try:
            Saver(LocalStore(folder), world, Keep(1)).save(pieces, facts(step))
        except CheckpointError as error:
            return str(error)
        return "saved"

    run = torch.arange(4.0)
    return [
        told({"a": Piece(run, (8,), 4 * world.rank)}),
        told({"a": Piece(run, (8,), 0)}, 2),  # twice the same
        told({"a": Piece(run, (9,), 5 * world.rank)}, 2),  # a gap
        told({"a": Piece(run, (8,), 4)} if world.rank else {}, 2),  # half is missing
        told({"a": Piece(run, (8 + world.rank,), 4 * world.rank)}, 2),  # two shapes
        told({"a": Piece(run, (4,))} | ({"b": Piece(run, (4,))} if world.rank else {}), 2),
        told({"a": Piece(run, (4,))}, 2 + world.rank),
    ]


def test_pieces_that_make_no_whole_are_refused_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_world(_bad_pieces, 2, tmp_path)
    assert first == second
    assert first[0] == "saved"
    for said, expected in zip(
        first[1:],
        [
            r"the piece in rank-00001-of-00002.safetensors is [0, 4), expected one from 4 on",
            "is [5, 9), expected one from 4 on",
            "is [4, 8), expected one from 0 on",
            "a is float32 [9] in rank-00001-of-00002.safetensors, float32 [8] elsewhere",
            "rank 1 saves step 2 with 2 tensors that all ranks hold",
            "rank 1 saves step 3 with 1 tensors",
        ],
        strict=True,
    ):
        assert expected in said
    assert names(tmp_path) == ["step-00000001"]


def test_the_state_may_change_once_save_has_returned(tmp_path: Path) -> None:
    tensor = torch.full((1000,), 1.0)
    saver = Saver(LocalStore(tmp_path), World(), Keep(5), asynchronous=True)
    gate = threading.Event()
    saver._background.submit(gate.wait)  # the disk is slow
    assert saver.save(whole({"model/w": tensor}), facts(1)) is None
    tensor.fill_(2.0)
    assert not saver.written()
    assert saver.in_flight == 1
    assert find_latest(tmp_path) == Found()
    gate.set()
    # The second waits for the first, and uses its memory again.
    assert saver.save(whole({"model/w": tensor}), facts(2)) is None
    assert step_directories(tmp_path) == [tmp_path / "step-00000001"]
    buffer = saver._image._buffer.data_ptr()
    tensor.fill_(3.0)
    assert saver.settle() == tmp_path / "step-00000002"
    saver.save(whole({"model/w": tensor}), facts(3))
    saver.settle()
    assert saver._image._buffer.data_ptr() == buffer
    assert [float(read_all(p)["model/w"][-1]) for p in step_directories(tmp_path)] == [3.0, 2.0, 1.0]
    assert saver.last is not None
    assert saver.last.step == 3
    saver.close()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_point_is_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    passed: list[str] = []
    monkeypatch.setattr(faults, "point", lambda name, step: passed.append(name))
    save_at(tmp_path, 1, asynchronous=asynchronous)
    assert [name for name in passed if name != COPIED] == list(SAVE_POINTS)
    assert (COPIED in passed) == asynchronous


@pytest.mark.parametrize("point", [COPIED, *SAVE_POINTS])
def test_a_failure_in_the_background_shows_at_the_commit(tmp_path: Path, point: str) -> None:
    saver = Saver(LocalStore(tmp_path), World(), Keep(3), asynchronous=True)
    saver.save(whole(some_tensors(1)), facts(1))
    saver.settle()

    def second() -> None:
        saver.save(whole(some_tensors(2)), facts(2))
        saver.settle()

    with fail_at(0, point, "enospc"):
        if point == "save.pruned":
            second()
        else:
            with pytest.raises(CheckpointError, match="no space left"):
                second()
    assert saver.in_flight is None
    committed = point in ("save.renamed", "save.pruned")
    assert names(tmp_path) == ["step-00000001", "step-00000002"][: 1 + committed]
    second()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    saver.close()


def test_a_run_in_the_metric_is_kept(tmp_path: Path) -> None:
    from dataclasses import replace

    saver = Saver(LocalStore(tmp_path), World(), Keep(1, best=1), metric=("accuracy", "max"))
    for step, value in enumerate([0.5, 0.9, 0.7, 0.8], 1):
        metric = {"name": "accuracy", "value": value, "mode": "max"}
        saver.save(whole(some_tensors(step)), replace(facts(step), metric=metric))
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


# --- an object store ---

URL = "memory://bucket/run/checkpoints"


@pytest.fixture
def memory() -> Any:
    import fsspec

    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def files(memory: Any) -> list[str]:
    return sorted(name.removeprefix("/bucket/run/checkpoints/") for name in memory.store)


def test_an_object_store_holds_the_same(memory: Any) -> None:
    for step in (1, 2, 3):
        place = save_at(URL, step, keep=2, asynchronous=step == 2)
        assert place == f"{URL}/step-{step:08d}"
        assert torch.equal(read_all(place)["model/w"], some_tensors(step)["model/w"])
    assert step_directories(URL) == [f"{URL}/step-00000003", f"{URL}/step-00000002"]
    assert find_and_verify(store_at(URL), World()).path == f"{URL}/step-00000003"
    assert len(files(memory)) == 4
    before = files(memory)
    save_at(URL, 3)  # is there already
    assert files(memory) == before


def test_what_a_killed_save_left_is_no_checkpoint_and_is_swept(memory: Any) -> None:
    save_at(URL, 1)
    sound = files(memory)
    with fail_at(0, "save.before_manifest", "raise"), pytest.raises(CheckpointError, match="was not written"):
        save_at(URL, 2)
    assert files(memory) == sound
    memory.pipe_file("/bucket/run/checkpoints/step-00000002/rank-00000-of-00001-aaaaaaaa.safetensors", b"x")
    memory.pipe_file("/bucket/run/checkpoints/step-00000001/rank-00000-of-00001-bbbbbbbb.safetensors", b"x")
    assert step_directories(URL) == [f"{URL}/step-00000001"]
    assert find_latest(URL).damaged == []
    assert len(ObjectStore(URL).sweep()) == 2
    assert files(memory) == sound


def test_what_is_in_the_way_in_an_object_store_is_kept(memory: Any) -> None:
    save_at(URL, 1)
    save_at(URL, 1, recipe_hash="other")
    assert verify(f"{URL}/step-00000001").recipe_hash == "other"
    left = files(memory)
    assert len(left) == 4
    assert [name for name in left if "manifest.old-" in name]
    assert ObjectStore(URL).sweep() == []
    ObjectStore(URL).remove(1)
    assert files(memory) == []


def test_damage_in_an_object_store_is_found(memory: Any) -> None:
    save_at(URL, 1)
    save_at(URL, 2)
    [file] = [n for n in memory.store if "step-00000002" in n and n.endswith("safetensors")]
    data = bytearray(memory.cat_file(file))
    data[-1] ^= 1
    memory.pipe_file(file, bytes(data))
    found = find_and_verify(store_at(URL), World())
    assert found.path == f"{URL}/step-00000001"
    assert "xxh3-128 is" in found.damaged[0][1]
    memory.pipe_file(file, bytes(data[:-1]))
    with pytest.raises(CheckpointError, match="size"):
        verify(f"{URL}/step-00000002")
    memory.pipe_file("/bucket/run/checkpoints/step-00000002/manifest.json", b"{}")
    before = files(memory)
    ObjectStore(URL).sweep()
    assert files(memory) == before, "a person may want to look at it"


def test_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    path = save_at(tmp_path, 5)
    assert isinstance(path, Path)
    from distdl.checkpoint.manifest import own_hash

    raw = {**json.loads((path / MANIFEST).read_bytes()), "format_version": 3}
    (path / MANIFEST).write_text(json.dumps({**raw, "self_hash": own_hash(raw)}))
    with pytest.raises(Incompatible):
        find_and_verify(LocalStore(tmp_path), World())
