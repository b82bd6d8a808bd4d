"""Image classification: cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from distdl.errors import DataError
from distdl.samples import DataInfo
from distdl.tasks.base import Batch, Prediction, Rows
from distdl.tasks.classes import class_predictions, class_title, labels_of
from distdl.tasks.columns import words
from distdl.tasks.mixing import blend
from distdl.tasks.pictures import Pictures, is_image


class ImageClassification:
    """Rows with one image column (uint8, [H, W], [H, W, C] or [C, H, W]) and one class-label column.

    Pixels 0..255 become floats in [-1, 1]. With `mixup` or `cutmix` (see `blend`) an image is trained on as a
    blend of two of its microbatch, and the loss is that of both labels by their shares. Each microbatch draws
    its own share, so microbatches are then not run as one.
    """

    def __init__(
        self,
        make_model: Callable[..., nn.Module],
        data_info: DataInfo,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        self._make_model = make_model
        self._smoothing = label_smoothing
        self._mixup, self._cutmix = mixup, cutmix
        self.image_field, self._label_field = _columns(data_info)
        self._num_classes = data_info.fields[self._label_field].num_classes or 0
        self._classes = data_info.fields[self._label_field].classes
        self.inputs = (self.image_field,)
        self._pictures = Pictures(data_info.fields[self.image_field])

    def build_model(self) -> nn.Module:
        shape = self._pictures.input_shape
        return self._make_model(in_channels=shape[0], num_outputs=self._num_classes, input_shape=shape)

    def collate(self, rows: Rows) -> Batch:
        images = self._pictures(rows[self.image_field]).mul_(2 / 255).sub_(1)
        labels = labels_of(rows[self._label_field], self._label_field, self._num_classes)
        return {"images": images, "labels": labels}

    def count(self, batch: Batch) -> int:
        return batch["labels"].shape[0]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch["images"], batch["labels"]
        if not (self._mixup or self._cutmix):
            return self._cross_entropy(model(images), labels)
        images, order, share = blend(images, self._mixup, self._cutmix)
        logits = model(images)
        other = self._cross_entropy(logits, labels[order])
        return share * self._cross_entropy(logits, labels) + (1 - share) * other

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits.float(), labels, reduction="sum", label_smoothing=self._smoothing
        )

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        logits, labels = model(batch["images"]).float(), batch["labels"]
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(1) == labels).sum()
        n = labels.shape[0]
        return {"accuracy": (int(correct), n), "loss": (float(loss), n)}

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        return class_predictions(model(batch["images"]), self._classes)

    def draw(self, axes: Any, row: dict[str, Any], prediction: Prediction) -> None:
        axes.imshow(self._pictures.shown(row[self.image_field]), cmap="gray")
        axes.set_title(class_title(prediction))
        axes.set_axis_off()


def _columns(data: DataInfo) -> tuple[str, str]:
    images = [n for n, f in data.fields.items() if is_image(f)]
    labels = [n for n, f in data.fields.items() if f.num_classes and not f.shape]
    if len(images) == 1 and len(labels) == 1:
        return images[0], labels[0]
    raise DataError(
        f"task image_classification needs one uint8 image column of two or three dimensions, all of one "
        f"size, and one ClassLabel column; dataset {data.name!r} has {words(data)}. `distdl data prepare` "
        "with --image-size, --classes and --columns makes them"
    )
