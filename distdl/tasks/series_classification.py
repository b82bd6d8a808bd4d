"""Series classification: numbers over time, of one length or several, to one of N classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.errors import DataError
from distdl.samples import DataInfo, Field
from distdl.tasks.base import Batch, Prediction, Rows
from distdl.tasks.classes import class_predictions, class_title, labels_of
from distdl.tasks.columns import words

Series = npt.NDArray[np.float32]

FLOATS = ("halffloat", "float", "double")
"""Arrow's names for real numbers."""


class SeriesClassification:
    """Rows with one column of real numbers over time, [T] or [T, channels], and one class-label column.

    Where all rows have one length the model is called with series [N, T, channels] (float) alone; otherwise
    with short rows filled up with 0, and with lengths [N] (int64).

    `standardise` gives each channel of each series mean 0 and deviation 1 over its own steps: for data in
    which the level and the size of a series say nothing of its class.
    """

    image_field: str | None = None

    padding: Mapping[str, float] = {"series": 0.0}
    """Tensor of a batch -> what fills up its dimension 1: how batches of different widths are joined."""

    def __init__(
        self,
        make_model: Callable[..., nn.Module],
        data_info: DataInfo,
        label_smoothing: float = 0.0,
        standardise: bool = False,
    ) -> None:
        self._make_model = make_model
        self._smoothing = label_smoothing
        self._standardise = standardise
        self._series_field, self._label_field = _columns(data_info)
        self._num_classes = data_info.fields[self._label_field].num_classes or 0
        self._classes = data_info.fields[self._label_field].classes
        self.inputs = (self._series_field,)
        shape = data_info.fields[self._series_field].shape
        self._steps = shape[0]
        self._features = (shape[1] if len(shape) == 2 else None) or 1

    def build_model(self) -> nn.Module:
        return self._make_model(features=self._features, steps=self._steps, num_outputs=self._num_classes)

    def collate(self, rows: Rows) -> Batch:
        found = rows[self._series_field]
        varying = self._steps is None
        series = found.padded(0, max(int(found.lengths.max(initial=1)), 1)) if varying else found
        series = series.astype(np.float32).reshape(*series.shape[:2], self._features)
        real = np.ones(series.shape[:2], bool)
        if varying:
            real = np.arange(series.shape[1]) < found.lengths[:, None]
        if self._standardise:
            series = standardised(series, real)
        lengths = {"lengths": torch.from_numpy(found.lengths.astype(np.int64))} if varying else {}
        labels = labels_of(rows[self._label_field], self._label_field, self._num_classes)
        return {"series": torch.from_numpy(series), "labels": labels, **lengths}

    def count(self, batch: Batch) -> int:
        return batch["labels"].shape[0]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(
            _logits(model, batch), batch["labels"], reduction="sum", label_smoothing=self._smoothing
        )

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        logits, labels = _logits(model, batch), batch["labels"]
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(1) == labels).sum()
        n = labels.shape[0]
        return {"accuracy": (int(correct), n), "loss": (float(loss), n)}

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        return class_predictions(_logits(model, batch), self._classes)

    def draw(self, axes: Any, row: dict[str, Any], prediction: Prediction) -> None:
        axes.plot(row[self._series_field])
        axes.set_title(class_title(prediction))


def standardised(series: Series, real: npt.NDArray[np.bool_]) -> Series:
    """[N, T, C] with mean 0 and deviation 1 over the steps that are `real` [N, T], and 0 elsewhere.

    A channel that does not vary becomes 0 throughout.
    """
    weight = real[:, :, None].astype(np.float64)
    count = np.maximum(weight.sum(1, keepdims=True), 1)
    mean = (series * weight).sum(1, keepdims=True) / count
    away = (series - mean) * weight
    deviation = np.sqrt((away**2).sum(1, keepdims=True) / count)
    largest = np.abs(series * weight).max(1, keepdims=True)
    varies = deviation > 1e-12 * largest  # what is below is the rounding of the mean
    found: Series = (away / np.where(varies, deviation, np.inf)).astype(np.float32)
    return found


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    inputs = [batch[name] for name in ("series", "lengths") if name in batch]
    logits: Tensor = model(*inputs)
    return logits.float()


def _columns(data: DataInfo) -> tuple[str, str]:
    series = [n for n, f in data.fields.items() if is_series(f)]
    labels = [n for n, f in data.fields.items() if f.num_classes and not f.shape]
    if len(series) == 1 and len(labels) == 1:
        return series[0], labels[0]
    raise DataError(
        "task series_classification needs one column of real numbers over time, [T] or [T, channels] with "
        f"any T, and one ClassLabel column; dataset {data.name!r} has {words(data)}. `distdl data prepare` "
        "makes them of .ts files; data.columns chooses among several"
    )


def is_series(field: Field) -> bool:
    return field.dtype in FLOATS and len(field.shape) in (1, 2) and None not in field.shape[1:]
