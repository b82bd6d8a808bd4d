"""The ratios that tasks measure are those of torchmetrics, whose code has nothing in common with ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassJaccardIndex
from torchmetrics.regression import SymmetricMeanAbsolutePercentageError
from torchmetrics.text import CharErrorRate, Perplexity

from distdl.data import Ragged
from distdl.samples import DataInfo, Field
from distdl.tasks import build_task

RNG = np.random.default_rng(3)


def task_of(name: str, fields: dict[str, Field], **keys: Any) -> Any:
    return build_task(name, keys, lambda **_: None, DataInfo("d", {"train": 1}, fields, "f"))


def ratios(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items()}


def test_accuracy() -> None:
    fields = {"image": Field("uint8", (8, 8)), "label": Field("int64", (), 5)}
    logits, labels = torch.randn(40, 5), torch.randint(0, 5, (40,))
    mine = task_of("image_classification", fields)
    found = ratios(mine.metric_sums(lambda _: logits, {"images": torch.zeros(40), "labels": labels}))
    theirs = MulticlassAccuracy(5, average="micro")(logits, labels)
    assert found["accuracy"] == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("ignore", [255, 0, 3])
def test_intersection_over_union_and_dice(ignore: int) -> None:
    """Also where what is not counted is one of the classes, the background say."""
    fields = {"image": Field("uint8", (8, 8)), "mask": Field("uint8", (8, 8))}
    mine = task_of("segmentation", fields, num_classes=4, ignore=ignore)
    iou = MulticlassJaccardIndex(4, average="macro", ignore_index=ignore)
    dice = MulticlassF1Score(4, average="none", ignore_index=ignore)  # its mean has the ignored class in it
    found = []
    for _ in range(3):
        logits, masks = torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 8, 8))
        masks[:, 0, :3] = ignore
        found.append(mine.measure(lambda _, logits=logits: logits, {"images": None, "masks": masks}))
        iou.update(logits, masks)
        dice.update(logits, masks)
    metrics = mine.metrics(found)
    assert metrics["miou"] == pytest.approx(float(iou.compute()), rel=1e-6)
    of_class = [float(value) for label, value in enumerate(dice.compute()) if label != ignore]
    assert metrics["dice"] == pytest.approx(sum(of_class) / len(of_class), rel=1e-6)


def test_perplexity() -> None:
    fields = {"text": Field("int32", (None,), None, 9)}
    mine, theirs = task_of("language_modelling", fields), Perplexity(ignore_index=-100)
    found = []
    for _ in range(3):
        logits, targets = torch.randn(2, 7, 9), torch.randint(0, 9, (2, 7))
        targets[1, 4:] = -100
        batch = {"inputs": torch.zeros(2, 7), "targets": targets}
        found.append(mine.measure(lambda _, *state, logits=logits: (logits, {}), batch))
        theirs.update(logits, targets)
    assert mine.metrics(found)["perplexity"] == pytest.approx(float(theirs.compute()), rel=1e-5)
    assert math.isfinite(float(theirs.compute()))


def test_edits_for_each_wanted_symbol() -> None:
    fields = {"image": Field("uint8", (8, 24)), "text": Field("int32", (None,), None, 6)}
    mine = task_of("transcription", fields)
    wanted = [RNG.integers(0, 6, n).tolist() for n in (5, 3, 7, 1)]
    best = torch.from_numpy(RNG.integers(0, 7, (4, 12)))
    values = np.array([symbol for row in wanted for symbol in row], np.int32)
    symbols = Ragged(values, np.array([len(row) for row in wanted]))
    batch: dict[str, Tensor] = mine.collate({"image": np.zeros((4, 8, 24), np.uint8), "text": symbols})
    logits = functional.one_hot(best, 7).float()
    found = [one["symbols"] for one in mine.predict(lambda _: logits, batch)]
    letters = [["".join(map(str, row)) for row in rows] for rows in (found, wanted)]
    theirs = float(CharErrorRate()(*letters))
    sums = mine.metric_sums(lambda _: logits, batch)
    assert ratios(sums)["error_rate"] == pytest.approx(theirs, rel=1e-6)


def test_smape() -> None:
    fields = {"history": Field("float", (6,)), "future": Field("float", (3,)), "scale": Field("float")}
    mine = task_of("forecasting", fields)
    rows = {"history": RNG.normal(50, 9, (4, 6)), "future": RNG.normal(50, 9, (4, 3)), "scale": np.ones(4)}
    batch = mine.collate(rows)
    outputs = torch.randn(4, 3)
    forecast = torch.tensor([one["forecast"] for one in mine.predict(lambda _: outputs, batch)])
    theirs = SymmetricMeanAbsolutePercentageError()(forecast, batch["future"])
    assert ratios(mine.metric_sums(lambda _: outputs, batch))["smape"] == pytest.approx(
        100 * float(theirs), rel=1e-5
    )
