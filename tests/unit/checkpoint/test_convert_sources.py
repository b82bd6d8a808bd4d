"""Imports from files that the real libraries wrote here."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distdl.checkpoint.convert.sources import open_source
from distdl.errors import CheckpointError, Corrupt, Incompatible, Incomplete
from distdl.testing import assert_same_bits, run_world, worst
from tests.unit.checkpoint.convert_support import (
    brought_in,
    fresh,
    images,
    read_error,
    read_others,
    state_of,
    trained,
    write_with_others,
)


def test_a_state_dict_alone_and_in_a_dict(tmp_path: Path) -> None:
    model, optimizer = trained()
    want = state_of(model, optimizer)
    weights = {n: t for n, t in want.items() if n.startswith("model/")}
    torch.save(model.state_dict(), tmp_path / "alone.pt")
    assert_same_bits(brought_in(tmp_path / "alone.pt").tensors, weights)
    for model_key, optimizer_key in (("model", "optimizer"), ("model_state_dict", "optimizer_state_dict")):
        both = {"epoch": 3, model_key: model.state_dict(), optimizer_key: optimizer.state_dict()}
        torch.save(both, tmp_path / "both.pt")
        assert_same_bits(brought_in(tmp_path / "both.pt").tensors, want)
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same_bits(brought_in(tmp_path / "old.pt").tensors, weights)


def test_safetensors_need_no_trust_and_names_may_be_mapped(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = {f"module.{n}".replace("head", "fc"): t for n, t in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(Incompatible, match=r"missing from the source: .*did you mean 'module\.") as caught:
        brought_in(tmp_path / "w.safetensors", trust=False)
    assert "Rename with map" in str(caught.value)
    renamings = {"module.fc.*": "head.*", "module.*": "*"}
    found = brought_in(tmp_path / "w.safetensors", trust=False, renamings=renamings)
    weights = {n: t for n, t in state_of(model, optimizer).items() if n.startswith("model/")}
    assert_same_bits(found.tensors, weights)


def test_half_precision_becomes_the_models_own(tmp_path: Path) -> None:
    model, _ = trained()
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    safetensors.torch.save_file(half, tmp_path / "w.safetensors")
    found = brought_in(tmp_path / "w.safetensors").tensors
    assert found["model/head.weight"].dtype == torch.float32
    assert torch.equal(found["model/head.weight"], half["head.weight"].float())
    assert found["model/norms.0.num_batches_tracked"].dtype == torch.int64


def test_what_is_ignored_is_as_the_model_has_it(tmp_path: Path) -> None:
    model, _ = trained()
    state = {n: t for n, t in model.state_dict().items() if n != "head.bias"}
    state["head.weight"] = torch.zeros(3, 6)
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    found = brought_in(tmp_path / "w.safetensors", ignore=["head.*"])
    assert torch.equal(found.tensors["model/head.weight"], fresh(seed=9).head.weight)
    assert torch.equal(found.tensors["model/hidden.weight"], model.hidden.weight)
    assert "ignored: head.bias, head.weight" in found.notes


def test_optimiser_state_that_cannot_be_told_apart_is_left_out_and_said(tmp_path: Path) -> None:
    model, _ = trained()
    decayed, plain = ([p for p in model.parameters() if (p.ndim > 1) == yes] for yes in (True, False))
    two = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=0.01)
    two.step()
    partial = torch.optim.AdamW(plain, lr=0.01)
    partial.step()
    turned = torch.optim.AdamW(list(model.parameters())[::-1], lr=0.01)
    turned.step()
    for optimizer, says in (
        (two, "numbered over 2 groups"),
        (partial, "it is of"),
        (turned, "exp_avg of"),
    ):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
        found = brought_in(tmp_path / "x.pt")
        assert not any(name.startswith("optim/") for name in found.tensors)
        assert any(note.startswith("optimiser state left out") and says in note for note in found.notes)


def test_an_optimiser_that_says_its_names_may_have_groups(tmp_path: Path) -> None:
    model, _ = trained()
    named = list(model.named_parameters())
    groups = [{"params": [(n, p) for n, p in named if (p.ndim > 1) == yes]} for yes in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    assert_same_bits(brought_in(tmp_path / "x.pt").tensors, state_of(model, optimizer))


class Surprise:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("surprise",))


def test_pickles_need_trust_and_run_nothing_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Surprise()}, tmp_path / "evil.pt")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Surprise()))
    (tmp_path / "zero").mkdir()
    torch.save(Surprise(), tmp_path / "zero" / "mp_rank_00_model_states.pt")
    for name in ("evil.pt", "dcp", "zero"):
        with pytest.raises(CheckpointError, match=r"is a Python pickle .*--trust-pickle"):
            open_source(tmp_path / name, trust_pickle=False)
    assert not (tmp_path / "surprise").exists()
    # weights_only comes first: what it can read is not read in any other way.
    torch.save({"a": torch.ones(1)}, tmp_path / "good.pt")
    with monkeypatch.context() as patched:
        patched.setattr("distdl.checkpoint.convert.pickles._load", only_weights)
        assert set(open_source(tmp_path / "good.pt", trust_pickle=True).weights) == {"a"}


def only_weights(path: Path, *, weights_only: bool) -> Any:
    assert weights_only
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b"", Corrupt, "cannot be read"),
        (b"PK\x03\x04 cut short", Corrupt, "cannot be read"),
        (b"nonsense", Corrupt, "cannot be read"),
        ((200).to_bytes(8, "little") + b'{"a": 1' + b" " * 200, Corrupt, r"x\.pt: "),
    ],
)
def test_files_that_are_nothing(tmp_path: Path, content: bytes, kind: type[Exception], says: str) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(kind, match=says):
        open_source(tmp_path / "x.pt", trust_pickle=True)


def test_places_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(Incomplete, match="no such file"):
        open_source(tmp_path / "absent", trust_pickle=True)
    with pytest.raises(CheckpointError, match=r"none of the folders that can be imported"):
        open_source(tmp_path, trust_pickle=True)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        open_source(tmp_path / "list.pt", trust_pickle=True)
    torch.save({"loss": 1.0}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="no state_dict: its keys are loss"):
        open_source(tmp_path / "none.pt", trust_pickle=True)
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Corrupt, match="outside its folder"):
        open_source(tmp_path, trust_pickle=True)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("accelerate") is None, reason="Accelerate is not installed")
def test_accelerate(tmp_path: Path) -> None:
    """In a process of its own: Accelerate keeps state for the life of one."""
    code = f"""
import torch
from accelerate import Accelerator
from tests.unit.checkpoint.convert_support import images, fresh, state_of
accelerator = Accelerator(cpu=True)
model = fresh()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
model, optimizer = accelerator.prepare(model, optimizer)
accelerator.backward(model(images()).square().mean())
optimizer.step()
accelerator.save_state({str(tmp_path / "safe")!r})
accelerator.save_state({str(tmp_path / "pickled")!r}, safe_serialization=False)
torch.save(state_of(accelerator.unwrap_model(model), optimizer.optimizer), {str(tmp_path / "want.pt")!r})
"""
    in_a_process(code)
    want = torch.load(tmp_path / "want.pt", weights_only=True)
    for name in ("safe", "pickled"):
        assert_same_bits(brought_in(tmp_path / name).tensors, want)
    without = brought_in(tmp_path / "safe", trust=False)
    assert_same_bits(without.tensors, {n: t for n, t in want.items() if n.startswith("model/")})
    assert "optimizer.bin is a pickle and was left out" in without.notes[0]
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        brought_in(tmp_path / "pickled", trust=False)


def in_a_process(code: str) -> None:
    root = Path(__file__).resolve().parents[3]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


LIGHTNING = """
import pytorch_lightning as lightning, torch
from tests.unit.checkpoint.convert_support import images, fresh, state_of

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = fresh()
    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=0.01)

module = Module()
trainer = lightning.Trainer(max_steps=2, accelerator="cpu", devices=1, default_root_dir={folder!r},
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
data = torch.utils.data.TensorDataset(images())
trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
trainer.save_checkpoint({file!r})
torch.save(state_of(module.net, trainer.optimizers[0]), {want!r})
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pytorch_lightning") is None, reason="Lightning is not installed")
def test_lightning_itself(tmp_path: Path) -> None:
    names = {"folder": str(tmp_path), "file": str(tmp_path / "x.ckpt"), "want": str(tmp_path / "want.pt")}
    in_a_process(LIGHTNING.format(**names))
    want = torch.load(tmp_path / "want.pt", weights_only=True)
    found = brought_in(tmp_path / "x.ckpt", renamings={"net.*": "*"})
    assert_same_bits(found.tensors, want)
    assert re.match(r"a Lightning checkpoint \(\d", open_source(tmp_path / "x.ckpt", trust_pickle=True).kind)


def test_the_layout_of_lightning(tmp_path: Path) -> None:
    """What its documentation says a file holds, for where the library is not installed."""
    model, optimizer = trained()
    content = {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"net.{n}": t for n, t in model.state_dict().items()},
        "loops": {},
        "callbacks": {},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
    }
    torch.save(content, tmp_path / "x.ckpt")
    found = brought_in(tmp_path / "x.ckpt", renamings={"net.*": "*"})
    assert_same_bits(found.tensors, state_of(model, optimizer))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_dcp_and_deepspeed_at_two_ranks(tmp_path: Path) -> None:
    told = run_world(write_with_others, 2, str(tmp_path), deadline_s=200)[0]
    (found,) = run_world(read_others, 1, str(tmp_path), deadline_s=200)
    model = fresh()
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(images()).square().mean().backward()
    plain.step()
    expected = state_of(model, plain)
    assert found.keys() == told.keys() == {"dcp", "zero1", "zero2", "zero3"}
    for name, want in told.items():
        tensors, notes = found[name]
        assert_same_bits({n: t for n, t in tensors.items() if n in want}, want)
        assert notes == []
        assert worst(tensors, expected)[1] < 1e-5, name
    (lost,) = (tmp_path / "zero2").glob("*/*zero_pp_rank_1_*optim*")
    lost.unlink()
    (said,) = run_world(read_error, 1, str(tmp_path / "zero2"))
    assert said.startswith("Incomplete")
    assert "2 ranks wrote it, and files of 1 are there" in said
