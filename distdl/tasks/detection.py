"""Detection: boxes and classes of the objects in an image; CenterNet's loss, COCO's average precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distdl.errors import DataError, RecipeError
from distdl.samples import DataInfo
from distdl.tasks import centres, coco
from distdl.tasks.base import Batch, Prediction, Rows
from distdl.tasks.pictures import Pictures, image_column


class Detection:
    """Rows with an image column, a column of boxes and one of classes, of varying length.

    Boxes [k, 4] are floats: left, top, right, bottom, in pixels; classes [k] are integers from 0.

    Pixels 0..255 become floats in [-1, 1]. The model gives [N, num_classes + 4, H / 4, W / 4] as described in
    `distdl.models.centernet`. What the loss is a mean over is objects, as in the paper. Predictions leave out
    what has a score below `min_score`; average precision takes all.
    """

    image_field: str | None = None  # an augmentation would move the image and not its boxes

    def __init__(
        self,
        make_model: Callable[..., nn.Module],
        data_info: DataInfo,
        num_classes: int,
        image: str = "image",
        boxes: str = "boxes",
        classes: str = "classes",
        max_objects: int = 128,
        max_detections: int = 100,
        min_score: float = 0.3,
    ) -> None:
        coco.require()
        self._make_model = make_model
        self._num_classes, self._most_objects, self._most_found = num_classes, max_objects, max_detections
        self._image, self._boxes, self._classes = image, boxes, classes
        self._min_score = min_score
        self.inputs = (image,)
        self._pictures = Pictures(image_column(data_info, image, "detection"))
        self._names = data_info.fields[classes].classes
        found, labels = data_info.fields[boxes], data_info.fields[classes]
        if found.shape != (None, 4) or "float" not in found.dtype:
            raise DataError(_unsuitable(data_info, boxes, "floats [k, 4]: left, top, right, bottom"))
        if labels.shape != (None,) or "int" not in labels.dtype:
            raise DataError(_unsuitable(data_info, classes, "integers [k]"))

    def build_model(self) -> nn.Module:
        shape = self._pictures.input_shape
        return self._make_model(in_channels=shape[0], num_object_classes=self._num_classes, input_shape=shape)

    def collate(self, rows: Rows) -> Batch:
        boxes, classes = rows[self._boxes], rows[self._classes]
        self._check(boxes, classes)
        ends = np.cumsum(boxes.lengths)[:-1]
        some, labels = np.split(boxes.values, ends), np.split(classes.values, ends)
        heat, geometry = centres.maps(some, labels, self._num_classes, self._pictures.input_shape[1:])
        images = self._pictures(rows[self._image]).mul_(2 / 255).sub_(1)
        # As wide in every microbatch, so that neighbours can be run as one.
        return {
            "images": images,
            "heat": torch.from_numpy(heat),
            "geometry": torch.from_numpy(geometry),
            "boxes": torch.from_numpy(boxes.padded(0, self._most_objects).astype(np.float32)),
            "classes": torch.from_numpy(classes.padded(-1, self._most_objects).astype(np.int64)),
        }

    def count(self, batch: Batch) -> int:
        """Objects."""
        return int((batch["classes"] >= 0).sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return centres.loss(self._output(model, batch), batch["heat"], batch["geometry"])

    def _output(self, model: nn.Module, batch: Batch) -> Tensor:
        output: Tensor = model(batch["images"]).float()
        expected = (len(output), self._num_classes + 4, *batch["heat"].shape[2:])
        if output.shape != expected:
            raise RecipeError(
                f"the model gives {list(output.shape)}; task detection expects {list(expected)}: for each "
                f"cell of {centres.STRIDE} x {centres.STRIDE} pixels a logit a class, offset and size"
            )
        return output

    def measure(self, model: nn.Module, batch: Batch) -> Any:
        """What was found and what is there, a pair for each image."""
        found = centres.detections(self._output(model, batch), self._num_classes, self._most_found)
        there = []
        for boxes, classes in zip(batch["boxes"].double(), batch["classes"], strict=True):
            real = classes >= 0
            corners = boxes[real]
            sized = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
            there.append({"boxes": sized.tolist(), "classes": classes[real].tolist()})
        return [list(pair) for pair in zip(found, there, strict=True)]

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """`objects`, best first: `box` (left, top, right, bottom, in pixels, no further than the image),
        `class` (by its name, where the data have names) and `score`.
        """
        found = centres.detections(self._output(model, batch), self._num_classes, self._most_found)
        return [{"objects": self._objects(one)} for one in found]

    def _objects(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        height, width = self._pictures.input_shape[1:]
        ends = (width, height, width, height)
        return [
            {
                "box": [
                    min(max(at, 0.0), float(end))
                    for at, end in zip((x, y, round(x + w, 3), round(y + h, 3)), ends, strict=True)
                ],
                "class": self._names[label] if label < len(self._names) else label,
                "score": score,
            }
            for (x, y, w, h), label, score in zip(
                found["boxes"], found["classes"], found["scores"], strict=True
            )
            if score >= self._min_score
        ]

    def draw(self, axes: Any, row: dict[str, Any], prediction: Prediction) -> None:
        axes.imshow(self._pictures.shown(row[self._image]), cmap="gray")
        for number, one in enumerate(prediction["objects"]):
            left, top, right, bottom = one["box"]
            colour = f"C{number % 10}"
            axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=colour)
            said = f"{one['class']} {one['score']:.2f}"
            axes.text(left, bottom, said, va="top", fontsize=7, color="white", backgroundcolor=colour)
        axes.set_axis_off()

    def metrics(self, found: list[Any]) -> dict[str, float]:
        """`map` (IoU 0.50 to 0.95), `map_50` and `map_75`."""
        pairs = [pair for batch in found for pair in batch]
        return coco.average_precision(
            [there for _, there in pairs], [seen for seen, _ in pairs], self._most_found
        )

    def _check(self, boxes: Any, classes: Any) -> None:
        """Raises DataError for what cannot be learnt from."""
        where = f"columns {self._boxes!r} and {self._classes!r}"
        for k, n in zip(boxes.lengths, classes.lengths, strict=True):
            if k != n:
                raise DataError(f"{where}: a row has {k} boxes and {n} classes; expected as many of both")
        longest = int(boxes.lengths.max(initial=0))
        if longest > self._most_objects:
            raise DataError(f"{where}: a row has {longest} objects; set task.max_objects to that or more")
        labels, corners = classes.values, boxes.values
        if labels.size and not 0 <= labels.min() <= labels.max() < self._num_classes:
            raise DataError(
                f"{where}: classes reach from {labels.min()} to {labels.max()}; task.num_classes is "
                f"{self._num_classes}, so they have to be 0 to {self._num_classes - 1}"
            )
        good = np.isfinite(corners).all(1) & (corners[:, 2:] > corners[:, :2]).all(1)
        wrong = corners[~good]
        if len(wrong):
            raise DataError(
                f"{where}: box {wrong[0].tolist()} is empty, or not finite; expected left, top, right, "
                "bottom with right > left and bottom > top"
            )


def _unsuitable(data: DataInfo, column: str, expected: str) -> str:
    field = data.fields[column]
    shape = ["varies" if n is None else n for n in field.shape]
    return (
        f"task detection reads column {column!r} of dataset {data.name!r}, which is {field.dtype} {shape}; "
        f"expected a list a row of {expected}"
    )
