"""Image classification: cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.errors import DataError
from distdl.plan import DataInfo, Field
from distdl.tasks.base import Batch, Rows


class ImageClassification:
    """Rows with one image column (uint8, [H, W], [H, W, C] or [C, H, W]) and one class-label column.

    Pixels 0..255 become floats in [-1, 1].
    """

    def __init__(
        self, make_model: Callable[..., nn.Module], data_info: DataInfo, label_smoothing: float = 0.0
    ) -> None:
        self._make_model = make_model
        self._smoothing = label_smoothing
        self.image_field, self._label_field = _columns(data_info)
        self._num_classes = data_info.fields[self._label_field].num_classes
        shape = tuple(n for n in data_info.fields[self.image_field].shape if n is not None)
        self._channels_last = len(shape) == 3 and shape[0] > 4
        self._input_shape = _channels_first(shape)

    def build_model(self) -> nn.Module:
        return self._make_model(
            in_channels=self._input_shape[0], num_outputs=self._num_classes, input_shape=self._input_shape
        )

    def collate(self, rows: Rows) -> Batch:
        pixels = rows[self.image_field]
        if self._channels_last:
            pixels = np.moveaxis(pixels, -1, 1)
        images = torch.from_numpy(np.ascontiguousarray(pixels)).view(-1, *self._input_shape)
        images = images.to(torch.float32).mul_(2 / 255).sub_(1)
        return {"images": images, "labels": torch.from_numpy(rows[self._label_field].astype(np.int64))}

    def count(self, batch: Batch) -> int:
        return batch["labels"].shape[0]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["images"])
        return functional.cross_entropy(
            logits.float(), batch["labels"], reduction="sum", label_smoothing=self._smoothing
        )

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        logits, labels = model(batch["images"]).float(), batch["labels"]
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(1) == labels).sum()
        n = labels.shape[0]
        return {"accuracy": (int(correct), n), "loss": (float(loss), n)}


def _columns(data: DataInfo) -> tuple[str, str]:
    images = [n for n, f in data.fields.items() if _is_image(f)]
    labels = [n for n, f in data.fields.items() if f.num_classes and not f.shape]
    if len(images) == 1 and len(labels) == 1:
        return images[0], labels[0]
    has = ", ".join(f"{n} ({_words(f)})" for n, f in data.fields.items())
    raise DataError(
        f"task image_classification needs one uint8 image column of two or three dimensions, all of one "
        f"size, and one ClassLabel column; dataset {data.name!r} has {has}. `distdl data prepare` with "
        "--image-size, --classes and --columns makes them"
    )


def _words(field: Field) -> str:
    shape = " x ".join("varies" if n is None else str(n) for n in field.shape)
    classes = f" of {field.num_classes} classes" if field.num_classes else ""
    return f"{field.dtype}{classes}{f' [{shape}]' if shape else ''}"


def _is_image(field: Field) -> bool:
    return field.dtype == "uint8" and len(field.shape) in (2, 3) and None not in field.shape


def _channels_first(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) == 2:
        return (1, shape[0], shape[1])
    if shape[0] <= 4:
        return (shape[0], shape[1], shape[2])
    return (shape[2], shape[0], shape[1])
