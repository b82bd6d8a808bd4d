"""`distdl ckpt ...` as a person types it, on checkpoints of a small model; and `init.from`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from distdl import errors
from distdl.checkpoint.convert.build import write_checkpoint
from distdl.checkpoint.manifest import Facts
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import verify
from distdl.cli import commands
from distdl.models.cnn5 import Cnn5
from distdl.recipe import load_recipe, mathematics, recipe_hash, to_yaml
from distdl.record import RunDirectory, read_lines
from tests.commands import distdl
from tests.faults.support import write_recipe

Cli = Callable[..., tuple[int, str]]
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra distdl[onnx] is not installed",
)


def network(seed: int = 0) -> Cnn5:
    torch.manual_seed(seed)
    model = Cnn5(1, 10, width=4, hidden=16)
    for norm in model.norms:
        norm.running_var.uniform_(0.5, 2)  # not what a fresh one has
    return model


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Run a command in this process; its exit code and all that it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["distdl", *map(str, words)])
        code = commands.run()
        out, err = capsys.readouterr()
        return code, out + err

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with checkpoints of steps 10, 20 and 30, and its resolved recipe."""
    recipe = load_recipe(write_recipe(tmp_path, checkpoint={"keep": 2}))
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    (path / "recipe.yaml").write_text(to_yaml(recipe))
    for step in (10, 20, 30):
        tensors = {f"model/{n}": t for n, t in network(step).state_dict().items()}
        tensors |= {f"ema/{n}": torch.zeros_like(p) for n, p in network().named_parameters()}
        facts = Facts(
            step, recipe_hash(recipe), mathematics(recipe), "f00d", {"step": step, "samples": 8}, "zero2"
        )
        write_checkpoint(str(path), tensors, facts)
    return path


def flip(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def test_ls(cli: Cli, run: Path) -> None:
    (run / "checkpoints" / "step-00000020" / "manifest.json").write_text("{")
    for place in (run, run / "checkpoints"):
        code, output = cli("ckpt", "ls", place)
        assert code == errors.DONE
        head, first, second, third = (line.split() for line in output.splitlines())
        assert head == ["step", "saved", "size", "engine", "world", "valid"]
        assert (first[0], first[-3:]) == ("30", ["zero2", "1", "yes"])
        assert (second[0], "manifest.json: not JSON" in " ".join(second)) == ("20", True)
        assert third[0] == "10"
    code, output = cli("ckpt", "ls", run, "--json")
    rows = json.loads(output)["rows"]
    assert [(row["step"], row["valid"]) for row in rows] == [(30, True), (20, False), (10, True)]
    assert 0 <= rows[0]["age_s"] < 600
    assert (rows[0]["engine"], rows[0]["world_size"]) == ("zero2", 1)
    assert cli("ckpt", "ls", run / "nothing")[0] == errors.CHECKPOINT


def test_ls_imports_no_torch(run: Path) -> None:
    code = f"""
import sys
sys.argv = ["distdl", "ckpt", "ls", {str(run)!r}]
from distdl.cli.commands import run
assert run() == 0
assert not {{"torch", "onnx", "datasets"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_show(cli: Cli, run: Path) -> None:
    code, output = cli("ckpt", "show", run, "--json")
    assert code == errors.DONE
    said = json.loads(output)
    assert (said["step"], said["engine"], said["train_state"]["samples"]) == (30, "zero2", 8)
    shown = {t["name"]: t for t in said["tensors"]}
    weight = network(30).head.weight
    assert shown["model/head.weight"]["shape"] == [10, 16]
    assert shown["model/head.weight"]["norm"] == pytest.approx(float(weight.detach().double().norm()))
    assert (shown["model/norms.0.num_batches_tracked"]["dtype"]) == "int64"
    code, output = cli("ckpt", "show", run / "checkpoints" / "step-00000010", "--no-norms")
    assert code == errors.DONE
    assert "step: 10" in output
    assert any(line.split()[:3] == ["model/head.weight", "float32", "[10,"] for line in output.splitlines())


def test_verify(cli: Cli, run: Path) -> None:
    steps = run / "checkpoints"
    code, output = cli("ckpt", "verify", run)
    assert (code, output.count(": whole")) == (errors.DONE, 3)
    flip(steps / "step-00000020")
    code, output = cli("ckpt", "verify", run)
    assert (code, output.count(": whole")) == (errors.CHECKPOINT, 2)
    assert f"{steps / 'step-00000020'}: rank-00000-of-00001.safetensors: xxh3-128 is" in output
    assert cli("ckpt", "verify", steps / "step-00000010")[0] == errors.DONE
    code, output = cli("ckpt", "verify", steps / "step-00000010", steps / "step-00000020", "--json")
    said = json.loads(output)
    assert (code, said["valid"]) == (errors.CHECKPOINT, False)
    assert [v is None for v in said["checkpoints"].values()] == [True, False]
    assert cli("ckpt", "verify", steps / "step-00000099")[0] == errors.CHECKPOINT


def test_diff(cli: Cli, run: Path) -> None:
    first, last = run / "checkpoints" / "step-00000010", run / "checkpoints" / "step-00000030"
    code, output = cli("ckpt", "diff", first, last, "--json")
    assert code == errors.DONE
    said = json.loads(output)
    changed = {c["name"]: c["largest"] for c in said["changed"]}
    gap = (network(10).head.weight - network(30).head.weight).detach().abs().max()
    assert changed["model/head.weight"] == pytest.approx(float(gap))
    assert (said["recipe"], said["added"], said["removed"]) == ([], [], [])
    assert not any(name.startswith("ema/") for name in changed)
    assert cli("ckpt", "diff", last, run)[1].splitlines()[-1].endswith("tensors are the same")
    assert len(cli("ckpt", "diff", last, run)[1].splitlines()) == 2


def test_prune(cli: Cli, run: Path) -> None:
    steps = run / "checkpoints"
    code, output = cli("ckpt", "prune", run, "--dry-run")  # the recipe says 2
    assert (code, output) == (errors.DONE, f"would remove {steps / 'step-00000010'}\n")
    assert len(list(steps.iterdir())) == 3
    assert "nothing" in cli("ckpt", "prune", run, "--keep-every-steps", 10)[1]
    with RunDirectory(run).lock():
        code, output = cli("ckpt", "prune", run)
        assert code == errors.ENVIRONMENT
        assert "in use by process" in output
    code, output = cli("ckpt", "prune", run, "--keep", 1, "--json")
    assert json.loads(output)["removed"] == [str(steps / "step-00000010"), str(steps / "step-00000020")]
    assert [p.name for p in steps.iterdir()] == ["step-00000030"]


def test_average(cli: Cli, run: Path, tmp_path: Path) -> None:
    steps = [run / "checkpoints" / f"step-000000{n}" for n in (10, 20, 30)]
    code, output = cli("ckpt", "average", *steps, "--out", tmp_path / "mean")
    assert code == errors.DONE, output
    made = open_checkpoint(tmp_path / "mean" / "step-00000030")
    parts = torch.stack([network(n).head.weight.detach().double() for n in (10, 20, 30)])
    assert torch.equal(made.whole("model/head.weight"), parts.mean(0).float())
    assert made.manifest.recipe_hash == verify(steps[2]).recipe_hash
    assert cli("ckpt", "average", *steps, "--out", run)[0] == errors.CHECKPOINT  # step 30 is there
    assert cli("ckpt", "average", steps[0], "--out", tmp_path / "one")[0] == errors.CHECKPOINT
    flip(steps[1])
    assert "xxh3-128" in cli("ckpt", "average", *steps, "--out", tmp_path / "bad")[1]


def test_export_of_weights(cli: Cli, run: Path, tmp_path: Path) -> None:
    code, output = cli("ckpt", "export", run, "--to", "safetensors")
    assert (code, output.split(":")[0]) == (errors.DONE, "step-00000030.safetensors")
    assert network().load_state_dict(safetensors.torch.load_file(tmp_path / "step-00000030.safetensors"))
    assert cli("ckpt", "export", run, "--to", "safetensors")[0] == errors.CHECKPOINT  # it exists
    assert cli("ckpt", "export", run, "--to", "torch", "--ema", "--out", "ema.pt")[0] == errors.DONE
    averaged = torch.load("ema.pt", weights_only=True)
    assert not averaged["head.weight"].any()
    assert torch.equal(averaged["norms.0.running_var"], network(30).norms[0].running_var)
    code, output = cli("ckpt", "export", run, "--to", "hf_dataset_card", "--out", "hub", "--json")
    assert (code, json.loads(output)["tensors"]) == (errors.DONE, len(averaged))
    assert {p.name for p in (tmp_path / "hub").iterdir()} == {"README.md", "model.safetensors", "recipe.yaml"}
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: pytorch\n")
    assert 'datasets: ["fashion_mnist"]' in card
    flip(run / "checkpoints" / "step-00000010")
    code, output = cli("ckpt", "export", run / "checkpoints" / "step-00000010", "--to", "torch")
    assert code == errors.CHECKPOINT
    assert not (tmp_path / "step-00000010.pt").exists()


@pytest.mark.slow
@needs_onnx
def test_export_of_onnx(cli: Cli, run: Path, tmp_path: Path) -> None:
    code, output = cli("ckpt", "export", run, "--to", "onnx", "--json")
    assert code == errors.DONE, output
    said = json.loads(output)
    assert 0 <= said["largest_difference"] < 1e-5
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / said["out"]), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((7, 1, 28, 28), dtype=np.float32)
    (found,) = session.run(None, {session.get_inputs()[0].name: images})
    with torch.no_grad():
        want = network(30).eval()(torch.from_numpy(images))
    assert torch.allclose(torch.from_numpy(found), want, atol=1e-5)


@pytest.mark.slow
def test_export_of_a_program(cli: Cli, run: Path, tmp_path: Path) -> None:
    code, output = cli("ckpt", "export", run, "--to", "torch_export", "--out", "m.pt2")
    assert code == errors.DONE, output
    images = torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        want = network(30).eval()(images)
        assert torch.allclose(torch.export.load(tmp_path / "m.pt2").module()(images), want, atol=1e-6)
    moved = (run / "checkpoints" / "step-00000030").rename(tmp_path / "step-00000030")
    code, output = cli("ckpt", "export", moved, "--to", "torch_export", "--out", "n.pt2")
    assert (code, "--recipe" in output) == (errors.CHECKPOINT, True)


def test_import(cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    model = network(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 1, 28, 28)).sum().backward()
    optimizer.step()
    state = {f"net.{n}": t for n, t in model.state_dict().items()}
    torch.save({"state_dict": state, "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    words = ["ckpt", "import", tmp_path / "x.pt", "--recipe", recipe, "--out", tmp_path / "run"]
    code, output = cli(*words)
    assert (code, "--trust-pickle" in output) == (errors.CHECKPOINT, True)
    code, output = cli(*words, "--trust-pickle")
    assert (code, "did you mean 'net.convolutions.0.weight'" in output) == (errors.CHECKPOINT, True)
    assert not (tmp_path / "run").exists()
    code, output = cli(*words, "--trust-pickle", "--map", "net.*=*", "--json")
    assert code == errors.DONE, output
    said = json.loads(output)
    made = open_checkpoint(Path(said["checkpoint"]))
    verify(made.path)
    assert (made.manifest.step, made.manifest.recipe_hash) == (0, recipe_hash(load_recipe(recipe)))
    assert torch.equal(made.whole("model/head.weight"), model.head.weight)
    momentum = optimizer.state[model.head.weight]["momentum_buffer"]
    assert torch.equal(made.whole("optim/momentum_buffer/head.weight"), momentum)
    assert said["slots"] == len(list(model.parameters()))
    assert cli(*words, "--trust-pickle", "--map", "net")[0] == errors.USAGE


@pytest.mark.slow
def test_a_run_begins_with_other_weights_and_a_resume_does_not(run: Path, tmp_path: Path) -> None:
    head = {"init": {"from": str(run), "ignore": ["head.*"]}, "run": {"dir": str(tmp_path / "second")}}
    recipe = write_recipe(tmp_path / "b", train={"max_steps": 2}, optim={"lr": 1e-9, "momentum": 0.0}, **head)
    code, output = distdl("train", str(recipe))
    assert code == errors.DONE, output
    assert f"weights from {run / 'checkpoints' / 'step-00000030'}: " in output
    assert "ignored: head.bias, head.weight" in output
    made = open_checkpoint(tmp_path / "second" / "checkpoints" / "step-00000002")
    # The learning rate is next to nothing: these are the weights that it began with.
    assert torch.allclose(made.whole("model/hidden.weight"), network(30).hidden.weight, atol=1e-6)
    assert not torch.allclose(made.whole("model/head.weight"), network(30).head.weight, atol=1e-3)
    (event,) = (e for e in read_lines(tmp_path / "second" / "events.jsonl") if e["event"] == "warm_start")
    assert event["ignored"] == ["head.bias", "head.weight"]
    assert (event["missing"], event["unexpected"]) == ([], [])
    for step in run.glob("checkpoints/*"):
        flip(step)
    code, output = distdl("train", str(recipe), "train.max_steps=3", "--allow-changed")
    assert code == errors.DONE, output  # what it once began with is not looked at again
    assert "weights from" not in output


PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"


@pytest.mark.campaign
@needs_onnx
def test_the_commands_of_the_page(cli: Cli, tmp_path: Path) -> None:
    """In their order, in a folder with the run that the page speaks of, and a file of another library."""
    config = PAGE.parents[1] / "configs" / "fashion_cnn.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "fashion_cnn.yaml").write_text(config.read_text())
    recipe = load_recipe(config)
    model = Cnn5(1, 10)
    run = tmp_path / "runs" / "fashion_cnn"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(to_yaml(recipe))
    for step in (400, 800):
        tensors = {f"model/{n}": t for n, t in model.state_dict().items()}
        facts = Facts(step, recipe_hash(recipe), mathematics(recipe), "f00d", {"step": step}, "ddp")
        write_checkpoint(str(run), tensors, facts)
    torch.save({f"net.{n}": t for n, t in model.state_dict().items()}, tmp_path / "theirs.pt")
    commands = re.findall(r"^\$ distdl (ckpt .*)$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) >= 12
    for command in commands:
        code, output = cli(*shlex.split(command))
        assert code == errors.DONE, f"{command}: {output}"
