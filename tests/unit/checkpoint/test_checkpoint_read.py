from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_support import read_all
from safetensors.torch import load_file

from distdl.checkpoint.manifest import MANIFEST
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import Found, find_latest, read_manifest, verify
from distdl.errors import CheckpointError, Corrupt, Incomplete

SaveStep = Callable[..., Path]
FILE = "rank-00000-of-00001.safetensors"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def remove_file(path: Path) -> None:
    (path / FILE).unlink()


def remove_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def truncate(path: Path) -> None:
    data = (path / FILE).read_bytes()
    (path / FILE).write_bytes(data[:-1])


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def file_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def other_step(path: Path) -> None:
    shutil.copy(path.with_name("step-00000100") / MANIFEST, path / MANIFEST)


DAMAGE = [
    (remove_file, Incomplete, f"{FILE}: missing"),
    (remove_manifest, Incomplete, "no manifest.json: the save was not finished"),
    (empty, Incomplete, "no manifest.json: the save was not finished"),
    (file_instead, Incomplete, "not a directory"),
    (truncate, Corrupt, f"{FILE}: size "),
    (lambda p: flip(p / FILE, 3), Corrupt, f"{FILE}: xxh3-128 is "),
    (lambda p: flip(p / FILE, 20), Corrupt, f"{FILE}: xxh3-128 is "),
    (lambda p: flip(p / FILE, -1), Corrupt, f"{FILE}: xxh3-128 is "),
    (lambda p: flip(p / MANIFEST, 30), Corrupt, "manifest.json: "),
    (lambda p: flip(p / MANIFEST, -10), Corrupt, "manifest.json: "),
    (other_step, Corrupt, "manifest.json: it is of step 100"),
]


def test_every_kind_of_tensor_comes_back_the_same(save_step: SaveStep) -> None:
    base = torch.arange(24.0)
    tensors = {
        "model/plain": torch.randn(3, 4),
        "model/scalar": torch.tensor(3.5, dtype=torch.float64),
        "model/half": torch.randn(7).bfloat16(),
        "model/count": torch.tensor(9),
        "model/mask": torch.tensor([True, False]),
        "model/empty": torch.empty(0, 3),
        "model/empty_too": torch.empty(0),
        "model/tied": base,
        "optim/momentum/tied": base,
        "model/view": base.view(4, 6)[1:3, 2:],
        "model/transposed": base.view(4, 6).t(),
        "model/parameter": torch.nn.Parameter(torch.randn(2)),
    }
    path = save_step(7, tensors)
    manifest = verify(path)
    loaded = read_all(path)
    assert sorted(loaded) == sorted(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert not loaded[name].requires_grad
        assert torch.equal(loaded[name], tensor), name
    assert manifest.tensors["model/half"].dtype == "bfloat16"
    assert manifest.train_state == {"step": 7, "best": float("-inf")}
    assert manifest.versions["torch"] == torch.__version__
    assert read_manifest(path) == manifest


def test_what_was_read_outlives_its_file(save_step: SaveStep) -> None:
    path = save_step(7)
    tensor = open_checkpoint(path).whole("model/w")
    (path / FILE).write_bytes(b"")
    assert torch.equal(tensor, torch.full((5, 3), 7.0))


def test_runs_of_a_tensor(save_step: SaveStep) -> None:
    saved = open_checkpoint(save_step(7, {"model/w": torch.arange(12.0).reshape(3, 4)}))
    assert saved.run("model/w", 3, 7).tolist() == [3, 4, 5, 6]
    assert saved.run("model/w", 5, 5).tolist() == []
    for begin, end in ((-1, 2), (3, 2), (0, 13)):
        with pytest.raises(ValueError, match="which has 12 elements"):
            saved.run("model/w", begin, end)


def test_other_tools_read_the_files(save_step: SaveStep) -> None:
    path = save_step(7)
    assert torch.equal(load_file(path / FILE)["model/w"], torch.full((5, 3), 7.0))


@pytest.mark.parametrize("update", [{"shape": [3, 5]}, {"dtype": "float64"}])
def test_a_tensor_that_is_not_as_the_manifest_says(save_step: SaveStep, update: dict[str, object]) -> None:
    path = save_step(7)
    saved = open_checkpoint(path)
    saved.manifest.tensors["model/w"] = saved.manifest.tensors["model/w"].model_copy(update=update)
    with pytest.raises(Corrupt, match=r"model/w is float32 \[5, 3\], manifest says"):
        saved.whole("model/w")


def test_no_checkpoints_at_all(tmp_path: Path) -> None:
    (tmp_path / "step-00000100.tmp-ab").mkdir()
    (tmp_path / "step-00000100.bad-ab").mkdir()
    assert find_latest(tmp_path) == Found(None, None, [])
    assert find_latest(tmp_path / "never") == Found(None, None, [])


def test_the_highest_step_is_the_latest(save_step: SaveStep, tmp_path: Path) -> None:
    for step in (100_000_000, 99_999_999, 0):
        save_step(step)
    found = find_latest(tmp_path)
    assert found.manifest is not None
    assert (found.path, found.manifest.step) == (tmp_path / "step-100000000", 100_000_000)


@pytest.mark.parametrize(("damage", "kind", "said"), DAMAGE)
def test_a_damaged_one_is_named_and_passed_over(
    save_step: SaveStep,
    tmp_path: Path,
    damage: Callable[[Path], None],
    kind: type[CheckpointError],
    said: str,
) -> None:
    older = save_step(100)
    newer = save_step(200)
    damage(newer)
    found = find_latest(tmp_path)
    assert found.path == older
    [(path, reason)] = found.damaged
    assert path == newer
    assert reason.startswith(said)
    with pytest.raises(kind, match="step-00000200: "):
        verify(newer)


def test_every_byte_of_a_file_is_covered(save_step: SaveStep) -> None:
    path = save_step(100)
    for offset in range((path / FILE).stat().st_size):
        flip(path / FILE, offset)
        with pytest.raises(Corrupt, match=FILE):
            verify(path)
        flip(path / FILE, offset)
    verify(path)


def test_without_verify_only_sizes_are_looked_at(save_step: SaveStep, tmp_path: Path) -> None:
    save_step(100)
    path = save_step(200)
    flip(path / FILE, -1)
    assert find_latest(tmp_path, verify=False).path == path
    truncate(path)
    assert find_latest(tmp_path, verify=False).path == tmp_path / "step-00000100"


def test_none_whole_is_an_error_and_never_a_fresh_start(save_step: SaveStep, tmp_path: Path) -> None:
    truncate(save_step(100))
    remove_manifest(save_step(200))
    with pytest.raises(CheckpointError) as caught:
        find_latest(tmp_path)
    text = str(caught.value)
    assert "step-00000200: no manifest.json" in text
    assert f"step-00000100: {FILE}: size" in text
    assert f"move {tmp_path} away" in text
    assert caught.value.exit_code == 4
