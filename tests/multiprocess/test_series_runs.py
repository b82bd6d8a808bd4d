"""Series from files to predictions: trained in exact mode at one and two processes, then asked."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import find_latest
from distdl.testing import assert_same_bits
from tests.commands import distdl
from tests.runs import train_here

pytestmark = pytest.mark.slow

CASES = {
    "lstm": {"name": "lstm", "hidden": 6, "embedding": 4, "bidirectional": True, "dropout": 0.2},
    "gru": {
        "name": "gru",
        "hidden": 6,
        "embedding": 4,
        "layers": 2,
        "weight_drop": 0.2,
        "pooling": "attention",
    },
    "rnn": {"name": "rnn", "hidden": 6, "embedding": 4, "layer_norm": True, "pooling": "mean"},
    "fcn1d": {"name": "fcn1d", "width": 4},
    "conv1d_resnet": {"name": "conv1d_resnet", "width": 4},
}


def write_ts(file: Path, rows: int, seed: int, *, fixed: bool) -> None:
    """Slow and fast waves in two channels, with class labels."""
    rng = np.random.default_rng(seed)
    lines = ["@problemName Waves", "@timestamps false", "@classLabel true slow fast", "@data"]
    for i in range(rows):
        steps = np.arange(12 if fixed else rng.integers(6, 13))
        wave = np.sin(steps * (2.0 if i % 2 else 0.5) + rng.uniform(0, 6))
        channels = [",".join(f"{v:.4f}" for v in c) for c in (wave, wave**2)]
        lines.append(":".join([*channels, "fast" if i % 2 else "slow"]))
    file.write_text("\n".join(lines) + "\n")


def tensors(run: Path) -> dict[str, Tensor]:
    found = find_latest(run / "checkpoints").path
    assert found is not None
    saved = open_checkpoint(found)
    return {name: saved.whole(name) for name in saved.metas}


def recipe(folder: Path, task: dict[str, Any], model: dict[str, Any], **more: Any) -> Path:
    sections = {
        "task": task,
        "model": model,
        "data": {"path": str(folder / "data"), "eval_split": "test"},
        "batch": {"global": 16, "micro": 4},
        "optim": {"name": "adamw", "lr": 0.02},
        "train": {"epochs": 4, "seed": 3, "reduction": "exact"},
        "hardware": {"threads": 1},
        "run": {"dir": str(folder / "run")},
        **more,
    }
    file = folder / f"recipe-{sections['run']['dir'].rpartition('/')[2]}.yaml"
    file.write_text(json.dumps(sections))  # JSON is YAML
    return file


@pytest.fixture(scope="module", params=list(CASES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose run is done, its data, and unlabelled input."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "ts").mkdir()
    for split, rows, seed in (("TRAIN", 40, 0), ("TEST", 10, 1)):
        write_ts(folder / "ts" / f"W_{split}.ts", rows, seed, fixed="1d" in request.param)
    assert distdl("data", "prepare", str(folder / "ts"), "--out", str(folder / "data"))[0] == 0
    for size in (1, 2):
        file = recipe(
            folder,
            {"name": "series_classification"},
            CASES[request.param],
            run={"dir": str(folder / f"w{size}")},
        )
        train_here(file, size)
    return folder


def test_the_same_bits_at_one_and_two_processes(trained: Path) -> None:
    assert_same_bits(tensors(trained / "w2"), tensors(trained / "w1"))
    metrics = [(trained / f"w{n}" / "metrics.jsonl").read_text().splitlines() for n in (1, 2)]
    losses = [[json.loads(line).get("loss") for line in lines] for lines in metrics]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_predictions_are_those_that_evaluation_counts(trained: Path) -> None:
    config, out = str(trained / "recipe-w2.yaml"), trained / "out" / "p.jsonl"
    code, said = distdl(
        "predict", config, "--input", str(trained / "data"), "--split", "test", "--out", str(out)
    )
    assert code == 0, said
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [p["row"] for p in found] == list(range(10))
    assert all(0.5 <= p["probability"] <= 1 for p in found)
    plot = trained / "plot.png"
    again = ["--split", "test", "--out", str(trained / "again.csv"), "--plot", str(plot)]
    code, said = distdl("predict", config, "--input", str(trained / "data"), *again)
    assert code == 0, said
    assert plot.stat().st_size > 10_000
    right = np.mean([p["class"] == ("fast" if i % 2 else "slow") for i, p in enumerate(found)])
    code, said = distdl("eval", config, "--json")
    assert code == 0, said
    assert json.loads(said.splitlines()[-1])["accuracy"] == pytest.approx(right)
    same = trained / "same.csv"  # from the file itself, as CSV
    code, said = distdl("predict", config, "--input", str(trained / "ts" / "W_TEST.ts"), "--out", str(same))
    assert code == 0, said
    with same.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [r["class"] for r in rows] == [p["class"] for p in found]
    assert [float(r["probability"]) for r in rows] == pytest.approx([p["probability"] for p in found])


def test_a_series_of_ones_own_as_csv(trained: Path) -> None:
    config = str(trained / "recipe-w2.yaml")
    folder = trained / "csv"
    folder.mkdir()
    for name, speed in (("a", 0.5), ("b", 2.0)):
        wave = np.sin(np.arange(12) * speed)
        lines = ["x,y", *(f"{v},{v * v}" for v in wave)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    code, said = distdl("predict", config, "--input", str(folder), "--out", str(trained / "own.jsonl"))
    assert code == 0, said
    found = [json.loads(line) for line in (trained / "own.jsonl").read_text().splitlines()]
    assert [Path(p["file"]).name for p in found] == ["a.csv", "b.csv"]
    (folder / "b.csv").write_text("x\n" + "1\n" * 12)
    code, said = distdl("predict", config, "--input", str(folder), "--out", str(trained / "no.jsonl"))
    assert code == 5
    assert "b.csv has 1 columns of numbers, and " in said
    (folder / "a.csv").write_text("x,y,z\n" + "1,2,3\n" * 12)
    code, said = distdl(
        "predict", config, "--input", str(folder / "a.csv"), "--out", str(trained / "no.jsonl")
    )
    assert code == 5
    assert "column 'series' of the input has rows of shape" in said
    assert not (trained / "no.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--input", "absent", "--out", "o.jsonl"], 5, "--input absent does not exist"),
        (["--input", "data", "--out", "o.txt"], 5, "one of .jsonl, .csv"),
        (["--input", "data", "--out", "o.csv"], 5, "has splits test, train: choose one"),
        (["--input", "data", "--out", "o.csv", "--checkpoint", "none"], 4, "none"),
        (["--input", "data", "--split", "test", "--out", "o.csv", "--plot", "p.doc"], 5, ".png, "),
    ],
)
def test_what_is_wrong_is_said(trained: Path, options: list[str], code: int, says: str) -> None:
    found = distdl("predict", str(trained / "recipe-w2.yaml"), *options, cwd=trained)
    assert found[0] == code, found[1]
    assert says in found[1]


def test_a_forecast_of_the_last_steps_of_a_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wave = np.sin(np.arange(60) * 2 * np.pi / 12).astype(np.float32)
    (tmp_path / "data").mkdir()
    for split, starts in (("train", range(8, 40)), ("test", range(40, 57))):
        columns = {
            "history": pa.array([wave[i - 8 : i].tolist() for i in starts], pa.list_(pa.float32(), 8)),
            "future": pa.array([wave[i : i + 3].tolist() for i in starts], pa.list_(pa.float32(), 3)),
            "scale": pa.array([0.3] * len(starts), pa.float32()),
        }
        pq.write_table(pa.table(columns), tmp_path / "data" / f"{split}.parquet")
    for size in (1, 2):
        file = recipe(
            tmp_path,
            {"name": "forecasting", "period": 6, "lags": [2]},
            {"name": "gru", "hidden": 8, "embedding": 4},
            eval={"metric": "mase", "mode": "min"},
            run={"dir": str(tmp_path / f"run{size}")},
        )
        train_here(file, size)
    assert_same_bits(tensors(tmp_path / "run2"), tensors(tmp_path / "run1"))
    last = json.loads((tmp_path / "run2" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"eval_mase", "eval_naive_mase", "eval_seasonal_smape", "eval_lag2_mase"} <= set(last)
    (tmp_path / "mine.csv").write_text("value\n" + "".join(f"{v}\n" for v in wave))
    out = tmp_path / "f.csv"
    plot = ["--plot", str(tmp_path / "f.png")]
    code, said = distdl("predict", str(file), "--input", str(tmp_path / "mine.csv"), "--out", str(out), *plot)
    assert code == 0, said
    with out.open() as lines:
        (row,) = csv.DictReader(lines)
    assert list(row) == ["row", "file", "forecast_1", "forecast_2", "forecast_3"]
    assert (tmp_path / "f.png").stat().st_size > 10_000
