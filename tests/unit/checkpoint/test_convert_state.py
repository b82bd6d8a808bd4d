"""What is in a checkpoint, what differs, means of several, and weights for others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distdl.checkpoint.convert import compare as c
from distdl.checkpoint.convert.build import average, write_checkpoint
from distdl.checkpoint.convert.export import appearing, weights_of, write_safetensors
from distdl.checkpoint.convert.locate import find_checkpoint, place_of_new
from distdl.checkpoint.convert.overview import overview, removable
from distdl.checkpoint.manifest import Facts
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import verify
from distdl.errors import CheckpointError, Incompatible
from distdl.pieces import InMemory


def saved(**tensors: Tensor) -> InMemory:
    return InMemory({name.replace("__", "/"): t for name, t in tensors.items()})


def facts(step: int = 0) -> Facts:
    return Facts(step, "ab" * 8, {"optim": {"lr": 0.1}}, "f00d", {"step": step}, "import")


def test_norms_are_of_the_whole_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c, "CHUNK", 3)
    held = saved(a=torch.full((5, 2), -2.0), n=torch.tensor(7), b=torch.tensor([True]), e=torch.empty(0))
    found = {d.name: d for d in c.describe(held)}
    assert found["a"].norm == pytest.approx(math.sqrt(40))
    assert (found["n"].norm, found["b"].norm, found["e"].norm) == (7.0, None, 0.0)
    assert (found["a"].dtype, found["a"].shape, found["a"].bytes) == ("float32", [5, 2], 40)


def test_differences_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c, "CHUNK", 2)
    nan, inf = float("nan"), float("inf")
    a = saved(
        same=torch.tensor([1.0, nan, inf]), moved=torch.tensor([0.0, 1.0, 2.0, -3.0]), gone=torch.ones(1),
        shape=torch.ones(2), kind=torch.ones(2), broke=torch.tensor([1.0, 1.0]), count=torch.tensor(3),
    )  # fmt: skip
    b = saved(
        same=torch.tensor([1.0, nan, inf]), moved=torch.tensor([0.5, 1.0, 2.0, -1.0]), new=torch.ones(1),
        shape=torch.ones(3), kind=torch.ones(2).half(), broke=torch.tensor([nan, 1.0]), count=torch.tensor(5),
    )  # fmt: skip
    found = c.compare(a, b, ["optim.lr: 0.1 -> 0.2"])
    changed = {x.name: x for x in found.changed}
    assert (found.added, found.removed, found.same) == (["new"], ["gone"], 1)
    assert set(changed) == {"moved", "shape", "kind", "broke", "count"}
    assert (changed["moved"].largest, changed["count"].largest) == (2.0, 2.0)
    assert changed["broke"].largest is not None
    assert math.isnan(changed["broke"].largest)
    assert (changed["shape"].largest, changed["shape"].what) == (None, "shape [2] -> [3]")
    assert (changed["kind"].largest, changed["kind"].what) == (0.0, "float32 -> float16")
    assert found.recipe == ["optim.lr: 0.1 -> 0.2"]


def test_means_are_summed_in_fp64() -> None:
    values = [torch.tensor([1e8, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([-1e8, 6.0])]
    several = [
        saved(model__w=v, model__n=torch.tensor(i), optim__m__w=v, ema__w=v) for i, v in enumerate(values)
    ]
    found = average(several)
    assert set(found) == {"model/w", "model/n", "ema/w"}
    # In fp32, 1e8 + 1 - 1e8 is 0.
    assert torch.equal(found["model/w"], torch.tensor([1 / 3, 3.0]))
    assert (found["model/w"].dtype, found["model/n"].item()) == (torch.float32, 2)
    one_without = [saved(model__w=values[0], model__n=torch.tensor(0)), several[0]]
    assert set(average(one_without)) == {"model/w", "model/n"}
    with pytest.raises(Incompatible, match=r"other tensors: model/n: absent, int64 \[\]"):
        average([saved(model__w=values[0]), several[0]])
    with pytest.raises(Incompatible, match=r"model/w: float32 \[3\], float32 \[2\]"):
        average([saved(model__w=torch.ones(3), model__n=torch.tensor(0)), several[0]])


def test_averaged_weights_take_the_place_of_parameters_alone() -> None:
    held = saved(
        model__w=torch.ones(2), model__n=torch.tensor(3), ema__w=torch.zeros(2), optim__m__w=torch.ones(2)
    )
    assert {n: t.tolist() for n, t in weights_of(held).items()} == {"w": [1.0, 1.0], "n": 3}
    assert {n: t.tolist() for n, t in weights_of(held, ema=True).items()} == {"w": [0.0, 0.0], "n": 3}
    with pytest.raises(Incompatible, match="no averaged weights"):
        weights_of(saved(model__w=torch.ones(2)), ema=True)


def test_a_new_checkpoint_touches_nothing_else(tmp_path: Path) -> None:
    tensors = {"model/w": torch.arange(6.0).reshape(2, 3)}
    for step in range(5):
        write_checkpoint(str(tmp_path), tensors, facts(step))
    place = write_checkpoint(str(tmp_path / "step-00000007"), tensors, facts(7))
    assert place == tmp_path / "step-00000007"
    assert len(list(tmp_path.iterdir())) == 6
    assert verify(place).world_size == 1
    assert torch.equal(open_checkpoint(place).whole("model/w"), tensors["model/w"])
    with pytest.raises(CheckpointError, match="exists already"):
        write_checkpoint(str(tmp_path), tensors, facts(7))
    with pytest.raises(CheckpointError, match="expected step-00000002"):
        place_of_new(str(tmp_path / "step-00000003"), 2)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert place_of_new(str(tmp_path / "run"), 2)[1] == tmp_path / "run" / "checkpoints" / "step-00000002"


def test_what_a_name_means(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint in it"):
        find_checkpoint(str(run))
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(str(tmp_path / "nothing"))
    for step in (1, 2):
        write_checkpoint(str(run), {"model/w": torch.ones(1)}, facts(step))
    newest = run / "checkpoints" / "step-00000002"
    assert find_checkpoint(str(run)) == find_checkpoint(str(run / "checkpoints")) == newest
    file = next(newest.glob("*.safetensors"))
    file.write_bytes(b"x" + file.read_bytes()[1:])
    assert find_checkpoint(str(run)) == run / "checkpoints" / "step-00000001"
    assert find_checkpoint(f"{newest}/") == newest  # named: taken at its word
    renamed = newest.rename(tmp_path / "copy")
    assert find_checkpoint(str(renamed)) == renamed


def test_urls_are_places_too() -> None:
    url = "memory://distdl-convert/run"
    for step in (1, 2):
        write_checkpoint(url, {"model/w": torch.full((3,), float(step))}, facts(step))
    assert [row.step for row in overview(url)] == [2, 1]
    newest = find_checkpoint(url)
    assert newest == f"{url}/step-00000002"
    assert open_checkpoint(newest).whole("model/w").tolist() == [2.0, 2.0, 2.0]
    assert removable(url, {"last": 1}, remove=False) == [f"{url}/step-00000001"]
    removable(url, {"last": 1}, remove=True)
    assert [row.step for row in overview(url)] == [2]
    with pytest.raises(CheckpointError, match="exists already"):
        write_checkpoint(url, {"model/w": torch.ones(1)}, facts(2))


def test_exports_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "sub" / "w.safetensors"
    write_safetensors({"w": torch.ones(2)}, out, {"distdl.step": "3"})
    assert torch.equal(safetensors.torch.load_file(out)["w"], torch.ones(2))
    with safetensors.safe_open(out, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "distdl.step": "3"}
    before = out.read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        write_safetensors({"w": torch.zeros(2)}, out, {})
    assert out.read_bytes() == before
    with pytest.raises(ZeroDivisionError), appearing(tmp_path / "sub" / "other") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert list(out.parent.iterdir()) == [out]
