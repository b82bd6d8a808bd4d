"""benchmarks/results.py: a figure is kept as long as its recipe is the same; what the page shows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with its recipes and figures in a folder of the test."""
    spec = importlib.util.spec_from_file_location("results_script", ROOT / "benchmarks" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
    row = module.Row("lines", (">=", 0.5), (("mine.yaml", "train.seed=1"),), note="the first of its kind")
    monkeypatch.setattr(module, "ROWS", {"mine": row})
    (tmp_path / "configs").mkdir()
    return module


RECIPE = {
    "task": {"name": "text_classification"},
    "model": {"name": "lstm", "hidden": 4},
    "data": {"name": "sentiment"},
    "batch": {"global": 8, "micro": 4},
    "optim": {"name": "sgd", "lr": 0.1},
    "train": {"epochs": 1},
}


def write(results: Any, **changes: Any) -> str:
    """The recipe; returns what `recipe_of` says of it."""
    (results.ROOT / "configs" / "mine.yaml").write_text(json.dumps(RECIPE | changes))
    row = results.ROWS["mine"]
    return str(results.recipe_of(row, row.runs[0]))


def test_a_figure_is_of_its_recipe(results: Any) -> None:
    recipe = write(results)
    said = {"given": "a | b <unk>", "said": "c", "wanted": "d"}
    one = results.Result(["mine.yaml", "train.seed=1"], 0.75, 3.2, "abc", "cpu", {}, recipe, [said])
    results.KEPT.mkdir()
    (results.KEPT / "mine.json").write_text(json.dumps([vars(one)]))
    assert results.state("mine") == ("0.75", "reached")
    page = results.page()
    assert (
        "| `mine` | lines | accuracy | >= 0.5 | 0.75 | 3 | [mine.yaml](../configs/mine.yaml) | `abc` | - |"
        in page
    )
    assert "\n`mine`: the first of its kind\n" in page
    assert "| given | a &#124; b &lt;unk&gt; |" in page
    write(results, run={"dir": "elsewhere"}, checkpoint={"keep": 7}, hardware={"threads": 1})
    assert results.state("mine") == ("0.75", "reached")
    write(results, optim={"name": "sgd", "lr": 0.2})
    assert results.state("mine") == ("-", "0 of 1 runs")
    assert "(../configs/mine.yaml) | - |" in results.page()


def test_a_row_begins_with_the_run_of_another(results: Any) -> None:
    write(results)
    for name in ("first", "last"):
        (results.ROOT / "configs" / f"{name}.yaml").write_text(json.dumps(RECIPE))
    results.ROWS["last"] = results.Row("last", (">", 0.0), (("last.yaml",),), first=("first.yaml",))
    assert results.first_of("last").name.startswith("last-first-")
    results.ROWS["first"] = results.Row("first", (">", 0.0), (("first.yaml",),))
    assert results.first_of("last") == results.folder_of("first", 0)
    before = results.folder_of("first", 0)
    (results.ROOT / "configs" / "first.yaml").write_text(json.dumps(RECIPE | {"train": {"epochs": 2}}))
    assert results.folder_of("first", 0) != before
