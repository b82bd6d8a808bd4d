"""Neighbouring microbatches as one pass: the result of separate ones, or separate passes and the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.models.cnn5 import Cnn5
from distdl.plan import make_plan
from distdl.recipe import Recipe, parse_recipe
from distdl.record import read_lines
from distdl.samples import DataInfo, Field
from distdl.tasks import Batch
from distdl.tasks.image_classification import ImageClassification
from distdl.testing import run_world
from distdl.topology import Topology
from distdl.train.fusing import fitting
from distdl.train.joining import join, joinable, runs
from tests.multiprocess.test_parity import results
from tests.runs import train_rank

STEPS = 20
IMAGES: dict[str, Any] = {
    "task": {"name": "image_classification"},
    "model": {"name": "cnn5", "width": 8, "norm": "batch", "dropout": 0.3, "hidden": 16},
    "data": {"name": "fashion_mnist", "augment": {"flip": True}},
    "batch": {"global": 128, "micro": 16},
    # Larger steps amplify the rounding of ReLU's and max pooling's choices: two separate runs, at 1 and 2
    # ranks, are then 1e-3 apart after 20 steps as well.
    "optim": {"name": "sgd", "lr": 0.002, "momentum": 0.9, "clip_norm": 1.0},
}
TEXT: dict[str, Any] = {
    "task": {"name": "text_classification"},
    "model": {"name": "lstm", "embedding": 12, "hidden": 12, "layers": 2, "dropout": 0.5, "pooling": "mean"},
    "data": {"name": "sentiment"},
    "batch": {"global": 32, "micro": 4},
    "optim": {"name": "sgd", "lr": 0.3, "momentum": 0.9, "clip_norm": 1.0},
}


def recipe_for(folder: Path, case: dict[str, Any], steps: int = STEPS, **changes: dict[str, Any]) -> Recipe:
    sections: dict[str, Any] = {
        **case,
        "train": {"max_steps": steps, "seed": 3},
        "eval": {"every_epochs": None},
        "track": {"every_steps": 1},
        "run": {"dir": str(folder)},
    }
    for name, section in changes.items():
        sections[name] = {**sections.get(name, {}), **section}
    sections["hardware"] = {"threads": 1, "device": "cpu", **sections.get("hardware", {})}
    return parse_recipe(sections)


def train(
    folder: Path, case: dict[str, Any], size: int, fuse: Any, **changes: Any
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    recipe = recipe_for(folder, case, hardware={"fuse": fuse}, **changes)
    assert run_world(train_rank, size, recipe) == [0] * size
    return results(folder)


def apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Relative distance of all weights and buffers of two states, by the norm of the whole vector."""
    names = [n for n in a if n.startswith("model/") and a[n].is_floating_point()]
    squares = [
        (float((a[n] - b[n]).double().square().sum()), float(b[n].double().square().sum())) for n in names
    ]
    return math.sqrt(sum(d for d, _ in squares) / sum(n for _, n in squares))


def reasons(folder: Path) -> list[str]:
    return [e["reason"] for e in read_lines(folder / "events.jsonl") if e["event"] == "separate_passes"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [IMAGES, TEXT], ids=["cnn", "lstm"])
def test_fused_is_separate_within_rounding(case: dict[str, Any], tmp_path: Path) -> None:
    """BatchNorm and dropout, ragged sequences and dropout between layers; 8 microbatches, 1 and 2 ranks."""
    rows, expected = train(tmp_path / "separate", case, 1, 1)
    for size, fuse in ((1, 3), (2, 8)):
        folder = tmp_path / f"{size}-{fuse}"
        found, tensors = train(folder, case, size, fuse)
        assert reasons(folder) == []
        error = apart(tensors, expected)
        print(f"\nworld {size}, {fuse} a pass, against separate after {STEPS} steps: {error:.2e}")
        assert error < 1e-5
        assert [r["samples"] for r in found] == [r["samples"] for r in rows]
        for mine, theirs in zip(found, rows, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


HERE = "tests.multiprocess.test_fuse"


class FunctionalDropout(Cnn5):
    """Draws outside of any module."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(functional.dropout(images, 0.2))


class Coupled(Cnn5):
    """Normalises over the batch, by hand."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return (logits - logits.mean(0)) / (logits.std(0) + 1)


class MeanTask(ImageClassification):
    """Its loss is a mean, by mistake."""

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss_sum(model, batch) / self.count(batch)


class Unpadded(ImageClassification):
    """Microbatches of different widths, and not a word about padding."""

    def collate(self, rows: Any) -> Batch:
        batch = super().collate(rows)
        width = 20 + int(batch["labels"].sum()) % 9
        return {**batch, "images": batch["images"][..., :width]}


OWN: list[tuple[dict[str, Any], str]] = [
    ({"model": {"name": f"{HERE}:FunctionalDropout"}}, "random numbers outside of torch's dropout modules"),
    ({"model": {"name": f"{HERE}:Coupled"}}, "couples samples"),
    ({"task": {"name": f"{HERE}:MeanTask"}}, "the loss is no sum"),
    ({"task": {"name": f"{HERE}:Unpadded"}}, "nothing says how to fill them up"),
]


@pytest.mark.slow
def test_what_cannot_be_fused_is_run_one_by_one_to_the_bit(tmp_path: Path) -> None:
    """On both ranks alike, with one line that says why."""
    for i, (sections, reason) in enumerate(OWN):
        case = {
            **IMAGES,
            "model": {"name": "cnn5", "width": 2},
            **sections,
            "batch": {"global": 24, "micro": 4},
        }
        if ":" in case["model"]["name"]:
            case["model"] = {**case["model"], "width": 2}
        for fuse in (8, 1):
            recipe = recipe_for(tmp_path / f"{i}-{fuse}", case, 2, hardware={"fuse": fuse})
            assert run_world(train_rank, 2, recipe) == [0, 0]
        found = reasons(tmp_path / f"{i}-8")
        assert len(found) == 1
        assert reason in found[0]
        fused, separate = results(tmp_path / f"{i}-8")[1], results(tmp_path / f"{i}-1")[1]
        assert all(torch.equal(t, separate[name]) for name, t in fused.items())


# --- joining ---


def text(rows: int, width: int) -> Batch:
    tokens = torch.arange(rows * width).view(rows, width) + 1
    return {"tokens": tokens, "lengths": torch.full((rows,), width), "weights": torch.ones(rows, 3)}


def test_sequences_are_padded_to_the_longest() -> None:
    batches, padding = [text(2, 3), text(1, 5)], {"tokens": -7.0}
    assert joinable(batches, padding)
    joined, extents = join(batches, padding)
    assert extents == [3, 5]
    assert joined["tokens"].tolist() == [[1, 2, 3, -7, -7], [4, 5, 6, -7, -7], [1, 2, 3, 4, 5]]
    assert joined["lengths"].tolist() == [3, 3, 5]
    assert join([text(2, 3), text(1, 3)], padding)[1] == [None, None]


def test_what_differs_and_is_not_declared_is_not_joined() -> None:
    assert not joinable([text(2, 3), text(2, 4)], {})
    assert joinable([text(2, 3), text(1, 3)], {})
    base = text(2, 3)
    for other in (
        {**base, "weights": torch.ones(2, 4)},
        {**base, "weights": torch.ones(3, 3)},
        {**base, "weights": torch.ones(2, 3, dtype=torch.float64)},
        {**base, "scalar": torch.ones(())},
        {"tokens": base["tokens"]},
        {**base, "weights": torch.ones(2, 3).to_sparse()},
    ):
        assert not joinable([base, other], {"tokens": 0.0})
    # Two padded fields of different widths: which would be the length of an activation?
    assert not joinable([text(2, 3), text(2, 4)], {"tokens": 0.0, "weights": 0.0})


def test_runs_are_few_and_even() -> None:
    assert runs(8, 8) == [(0, 8)]
    assert runs(8, 3) == [(0, 3), (3, 6), (6, 8)]
    assert runs(7, 3) == [(0, 3), (3, 5), (5, 7)]
    assert runs(0, 4) == []


# --- how many ---


def test_memory_lowers_the_number() -> None:
    assert fitting(8, growth=100, free=10_000) == 8
    assert fitting(8, growth=100, free=500) == 4  # a tenth is kept
    assert fitting(8, growth=100, free=50) == 1
    assert fitting(8, growth=0, free=0) == 8


INFO = DataInfo(
    "x",
    {"train": 1000, "test": 100},
    {"image": Field("uint8", (28, 28)), "label": Field("int64", (), 10)},
    "f",
)


@pytest.mark.parametrize(
    ("changes", "size", "gpus", "fuse", "why"),
    [
        ({}, 2, 2, 4, None),
        ({}, 1, 0, 1, "on a CPU"),
        ({}, 3, 3, 3, None),
        ({"hardware": {"fuse": 3}}, 2, 0, 3, None),
        ({"hardware": {"fuse": 3}}, 8, 0, 1, None),
        ({"hardware": {"fuse": 1}}, 2, 0, 1, "fuse: 1"),
        ({"hardware": {"compile": True}}, 2, 0, 1, "compile"),
        ({"hardware": {"gradient_checkpointing": True}}, 2, 0, 1, "gradient_checkpointing"),
        ({"train": {"reduction": "exact"}}, 2, 0, 1, "exact"),
        ({"hardware": {"fuse": 4}}, 1, 0, 4, None),
    ],
)
def test_the_plan_says_how_many_and_why_no_more(
    changes: dict[str, Any], size: int, gpus: int, fuse: int, why: str | None
) -> None:
    hardware = {"device": "cuda" if gpus else "cpu", **changes.get("hardware", {})}
    recipe = recipe_for(Path("unused"), IMAGES, **{**changes, "hardware": hardware})
    plan = make_plan(recipe, Topology.of(1, size, gpus=gpus), INFO)
    assert plan.fuse == fuse
    assert (plan.separate is None) == (why is None)
    assert (why or "") in (plan.separate or "")
