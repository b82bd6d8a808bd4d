"""Bad input ends in one clear message and the right exit code, and loses nothing."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest

from distdl import errors
from distdl.record import RunDirectory
from tests.commands import distdl
from tests.faults.support import Launched, write_recipe

OWN_MODEL = """
import torch
from torch import nn

class Nan(nn.Module):
    def __init__(self, num_outputs, **unused):
        super().__init__()
        self.head = nn.Linear(784, num_outputs)
    def forward(self, x):
        return self.head(x.flatten(1)) * float("nan")

def build(num_outputs):
    return Nan(num_outputs)

def not_a_model():
    return 3
"""


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["optim.momentun=0.9"], errors.USAGE, ["optim.momentun", "did you mean 'momentum'"]),
        (["optim.lr=fast"], errors.USAGE, ["optim.lr", "fast", "number"]),
        (["model.dropout=1.5"], errors.USAGE, ["model.dropout", "1.5"]),
        (["model.name=cnn6"], errors.USAGE, ["cnn6", "cnn5", "package.module:"]),
        (["batch.global=30"], errors.USAGE, ["batch.global = 30", "24 or 32", "batch.micro ="]),
        (["data.name=fashion_minst"], errors.DATA, ["fashion_minst", "fashion_mnist"]),
        (["data.name=", "data.path=/nowhere/at/all"], errors.DATA, ["/nowhere/at/all"]),
        (["data.train_split=trian"], errors.DATA, ["trian", "train"]),
    ],
)
def test_plan_refuses(overrides: list[str], code: int, words: list[str], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    got, output = distdl("plan", str(recipe), *overrides)
    assert got == code, output
    for word in words:
        assert word in output, output
    assert "Traceback" not in output


def test_more_ranks_than_microbatches(tmp_path: Path) -> None:
    code, output = distdl("launch", str(write_recipe(tmp_path)), "--procs", "5")
    assert code == errors.USAGE, output
    assert "5 processes for 4 microbatches" in output
    assert "at most 4 processes, or batch.micro = 4 (8 microbatches)" in output
    assert not (tmp_path / "run").exists()


def test_unreadable_data(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train.parquet").write_bytes(b"PAR1 this is not")
    (tmp_path / "images" / "test.parquet").write_bytes(b"")
    code, output = distdl(
        "launch", str(write_recipe(tmp_path)), f"data.path={tmp_path / 'images'}", "data.name="
    )
    assert code == errors.DATA, output
    assert "train.parquet" in output or "test.parquet" in output


def test_missing_recipe(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    code, output = distdl("launch", str(tmp_path / "recipes.yaml"))
    assert code == errors.USAGE, output
    assert "recipe.yaml" in output


def test_usage(tmp_path: Path) -> None:
    code, output = distdl("lunch")
    assert code == errors.USAGE
    assert "lunch" in output


def test_unwritable_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, output = distdl("launch", str(write_recipe(tmp_path)), f"run.dir={tmp_path / 'file' / 'run'}")
    assert code == errors.ENVIRONMENT, output
    assert "cannot be written" in output
    assert "run.dir=" in output


@pytest.mark.parametrize("command", ["launch", "train"])
def test_run_directory_in_use(command: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = RunDirectory(tmp_path / "run")
    run.create()
    with run.lock():
        code, output = distdl(command, str(recipe))
    assert code == errors.ENVIRONMENT, output
    assert "is in use by process" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:build", ["no_such_module", "ModuleNotFoundError"]),
        ("own:biuld", ["no attribute 'biuld'", "did you mean 'build'"]),
        ("own:not_a_model", ["returned a int", "torch.nn.Module"]),
    ],
)
def test_model_factory_that_does_not_work(name: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_MODEL)
    recipe = write_recipe(tmp_path)
    text = recipe.read_text().replace("name: cnn5", f"name: {name}")
    recipe.write_text("\n".join(line for line in text.splitlines() if not _cnn5_key(line)))
    code, output = distdl("train", str(recipe), cwd=tmp_path)
    assert code == errors.USAGE, output
    for word in words:
        assert word in output, output


def _cnn5_key(line: str) -> bool:
    return line.strip().split(":")[0] in ("width", "norm", "dropout", "hidden")


@pytest.mark.slow
def test_nan_from_the_first_step_on(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_MODEL)
    recipe = write_recipe(tmp_path, train={"max_nonfinite_steps": 3})
    text = recipe.read_text().replace("name: cnn5", "name: own:build")
    recipe.write_text("\n".join(line for line in text.splitlines() if not _cnn5_key(line)))
    with Launched(["launch", str(recipe), "--procs", "2"], cwd=tmp_path) as command:
        code = command.finish()
        command.assert_nobody_left()
    assert code == errors.DIVERGED, command.output
    assert "not finite in 3 steps in a row, 1 to 3 (from the first step on)" in command.output
    assert "optim.lr" in command.output
    assert not (tmp_path / "run" / "attempts" / "0002").exists(), "a diverged run is not restarted"


@pytest.mark.slow
def test_another_recipe_damage_and_nothing_valid(tmp_path: Path) -> None:
    """One run, seen through everything that can be wrong with its checkpoints."""
    recipe = write_recipe(tmp_path, train={"max_steps": 4}, checkpoint={"every_steps": 2})
    assert distdl("train", str(recipe))[0] == 0
    run = tmp_path / "run"

    code, output = distdl("train", str(recipe), "optim.lr=0.5", "model.dropout=0.0")
    assert code == errors.CHECKPOINT, output
    assert "optim.lr: 0.02 -> 0.5" in output
    assert "model.dropout: 0.2 -> 0.0" in output
    assert "--allow-changed" in output
    code, output = distdl("train", str(recipe), "optim.lr=0.5", "train.max_steps=6", "--allow-changed")
    assert code == 0, output

    code, output = distdl("train", str(recipe), "model.width=8", "--allow-changed")
    assert code == errors.CHECKPOINT, output
    assert "does not fit the model" in output

    newest = run / "checkpoints" / "step-00000006"
    tensors = next(newest.glob("*.safetensors"))
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 1
    tensors.write_bytes(bytes(data))
    code, output = distdl("train", str(recipe), "--allow-changed")
    assert code == 0, output
    assert f"damaged checkpoint passed over: step-00000006: {tensors.name}: xxh3-128" in output.replace(
        "\n", ""
    )

    for path in (run / "checkpoints").iterdir():
        shutil.rmtree(path)
        path.mkdir()
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    code, output = distdl("train", str(recipe), "--allow-changed")
    assert code == errors.CHECKPOINT, output
    assert "no usable checkpoint among" in output
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before


@pytest.mark.slow
def test_disk_full_in_a_real_run(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.decode().strip()}")
    try:
        recipe = write_recipe(tmp_path, model={"width": 8, "hidden": 64}, checkpoint={"every_steps": 2})
        code, output = distdl("train", str(recipe), f"run.dir={small / 'run'}")
        assert code == errors.CHECKPOINT, output
        assert "no space left" in output
        assert not list((small / "run" / "checkpoints").glob("*.tmp-*"))
    finally:
        with contextlib.suppress(OSError):
            subprocess.run(["umount", str(small)], check=True)
