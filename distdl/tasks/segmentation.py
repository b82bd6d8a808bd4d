"""Segmentation: a class for every pixel; cross-entropy, mean intersection over union, Dice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.errors import DataError
from distdl.samples import DataInfo
from distdl.tasks.base import Batch, Prediction, Rows
from distdl.tasks.pictures import Pictures, image_column


class Segmentation:
    """Rows with an image column and a mask column: uint8 [H, W], of the image's size, a class for each pixel.

    Pixels 0..255 become floats in [-1, 1]. Mask pixels of value `ignore` are in no loss and no metric. The
    model gives logits [N, num_classes, H, W].
    """

    image_field: str | None = None  # an augmentation would move the image and not its mask

    def __init__(
        self,
        make_model: Callable[..., nn.Module],
        data_info: DataInfo,
        num_classes: int,
        image: str = "image",
        mask: str = "mask",
        ignore: int = 255,
    ) -> None:
        self._make_model = make_model
        self._num_classes, self._ignore = num_classes, ignore
        self._image, self._mask = image, mask
        self.inputs = (image,)
        self._pictures = Pictures(image_column(data_info, image, "segmentation"))
        size = self._pictures.input_shape[1:]
        found = data_info.fields[mask]
        if found.dtype != "uint8" or found.shape != size:
            raise DataError(
                f"task segmentation reads masks from column {mask!r} of dataset {data_info.name!r}, which is "
                f"{found.dtype} {list(found.shape)}; expected uint8 {list(size)}, as large as the images. "
                f"`distdl data prepare` with --masks {mask} makes them of encoded ones"
            )

    def build_model(self) -> nn.Module:
        shape = self._pictures.input_shape
        return self._make_model(in_channels=shape[0], num_pixel_classes=self._num_classes, input_shape=shape)

    def collate(self, rows: Rows) -> Batch:
        masks = np.ascontiguousarray(rows[self._mask])
        largest = int(masks.max(initial=0, where=masks != self._ignore))
        if largest >= self._num_classes:
            raise DataError(
                f"column {self._mask!r} has class {largest}; task.num_classes is {self._num_classes}, so "
                f"classes reach from 0 to {self._num_classes - 1}. Raise it, or set task.ignore={largest} "
                "for pixels that shall not count"
            )
        images = self._pictures(rows[self._image]).mul_(2 / 255).sub_(1)
        return {"images": images, "masks": torch.from_numpy(masks)}

    def count(self, batch: Batch) -> int:
        """Pixels that are not ignored."""
        return int((batch["masks"] != self._ignore).sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._cross_entropy(model(batch["images"]), batch["masks"])

    def _cross_entropy(self, logits: Tensor, masks: Tensor) -> Tensor:
        # As rows: of images there is no kernel on CUDA with the same bits each time.
        rows = logits.float().movedim(1, -1).flatten(0, -2)
        return functional.cross_entropy(
            rows, masks.flatten().long(), reduction="sum", ignore_index=self._ignore
        )

    def measure(self, model: nn.Module, batch: Batch) -> Any:
        """Loss and count, and pixels by [true class][predicted class]."""
        logits, masks = model(batch["images"]), batch["masks"].long()
        real = masks != self._ignore
        pairs = masks[real] * self._num_classes + logits.argmax(1)[real]
        pixels = torch.bincount(pairs, minlength=self._num_classes**2)
        return {
            "loss": float(self._cross_entropy(logits, masks)),
            "pixels": pixels.view(self._num_classes, -1).tolist(),
        }

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """A `mask` of each row: uint8 [H, W]."""
        masks = model(batch["images"]).argmax(1).to("cpu", torch.uint8).numpy()
        return [{"mask": mask} for mask in masks]

    def draw(self, axes: Any, row: dict[str, Any], prediction: Prediction) -> None:
        axes.imshow(self._pictures.shown(row[self._image]), cmap="gray")
        mask = np.ma.masked_equal(prediction["mask"], 0)
        axes.imshow((mask - 1) % 20, cmap="tab20", vmin=-0.5, vmax=19.5, alpha=0.6)
        axes.set_axis_off()

    def metrics(self, found: list[Any]) -> dict[str, float]:
        """`miou` and `dice` are means over the classes that occur in a mask or a prediction."""
        pixels = np.sum([np.array(one["pixels"]) for one in found], 0)
        hits = np.diag(pixels)
        sizes = pixels.sum(0) + pixels.sum(1)
        there = sizes > 0
        there[self._ignore : self._ignore + 1] = False  # one of the classes may be what is not counted
        total = max(int(pixels.sum()), 1)
        return {
            "miou": _mean(hits[there] / (sizes - hits)[there]),
            "dice": _mean(2 * hits[there] / sizes[there]),
            "accuracy": float(hits.sum() / total),
            "loss": sum(one["loss"] for one in found) / total,
        }


def _mean(values: Any) -> float:
    return float(values.mean()) if len(values) else 0.0
