"""The examples that need data of their own: made or fetched, prepared, trained for a few steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from distdl.data.catalogue import locate
from examples.image_folder.make_folder import make
from tests.commands import distdl
from tests.hub_server import hub_of
from tests.runs import train_here

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = 24


def trained(example: str, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Train the recipe of an example for 24 steps, two processes; the lines of its metrics."""
    recipe = folder / "recipe.yaml"
    end = {
        "train": {"epochs": None, "max_steps": STEPS, "precision": "fp32"},
        "optim": {"name": "adamw", "lr": 0.01},
        "schedule": {"name": "constant"},
        "track": {"every_steps": 1},
        "eval": {"every_epochs": None},
        "checkpoint": {"every_epochs": None},
        "hardware": {"threads": 1},
        "run": {"dir": str(folder / "run")},
    }
    recipe.write_text(json.dumps({"extends": str(EXAMPLES / example / "recipe.yaml"), **end, **changes}))
    train_here(recipe)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def check_learned(lines: list[dict[str, Any]]) -> None:
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert math.isfinite(lines[-1]["eval_loss"])


@pytest.mark.slow
def test_a_resnet50_on_a_folder_of_images(tmp_path: Path) -> None:
    make(tmp_path / "images", 40)
    code, said = distdl(
        "data", "prepare", str(tmp_path / "images"), "--image-size", "32", "--out", str(tmp_path / "data")
    )
    assert code == 0, said
    assert "image: uint8 [32 x 32 x 3]" in said
    lines = trained(
        "image_folder",
        tmp_path,
        model={"width": 8},
        data={"path": str(tmp_path / "data"), "augment": {"crop_padding": 2}},
        batch={"global": 16, "micro": 8},
    )
    check_learned(lines)


@pytest.mark.slow
def test_a_dataset_of_the_hub_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub is asked by the first command alone; what it made stays when the hub is gone."""
    repository = tmp_path / "hub" / "someone" / "reviews"
    (repository / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        source = "train" if split == "train" else "test"
        rows = pq.read_table(locate("sentiment", None) / "text" / f"{source}.parquet").slice(0, 400)
        pq.write_table(rows, repository / "data" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    with hub_of(tmp_path / "hub") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        out = ("--tokenize", "text", "--out", str(tmp_path / "data"))
        code, said = distdl("data", "prepare", "someone/reviews", *out)
        assert code == 0, said
        assert "split train: 400 rows" in said
        code, said = distdl("data", "prepare", "someone/nothing", "--out", str(tmp_path / "no"))
        assert code == 5, said
        assert "someone/nothing" in said
    lines = trained(
        "hub_dataset",
        tmp_path,
        data={"path": str(tmp_path / "data")},
        model={"embedding": 8, "hidden": 8},
        batch={"global": 32, "micro": 16},
    )
    check_learned(lines)
