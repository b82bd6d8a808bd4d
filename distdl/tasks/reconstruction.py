"""Reconstruction: an image from itself; squared error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from distdl.errors import DataError
from distdl.samples import DataInfo
from distdl.tasks.base import Batch, Prediction, Rows
from distdl.tasks.columns import words
from distdl.tasks.pictures import Pictures, image_column, is_image


class Reconstruction:
    """Rows with an image column; pixels 0..255 become floats in [0, 1], which the model gives back.

    The loss is the squared error, summed over an image's pixels and a mean over images.
    """

    def __init__(
        self, make_model: Callable[..., nn.Module], data_info: DataInfo, image: str | None = None
    ) -> None:
        self._make_model = make_model
        self.image_field = image or _only_image(data_info)
        self.inputs = (self.image_field,)
        self._pictures = Pictures(image_column(data_info, self.image_field, "reconstruction"))

    def build_model(self) -> nn.Module:
        return self._make_model(input_shape=self._pictures.input_shape)

    def collate(self, rows: Rows) -> Batch:
        return {"images": self._pictures(rows[self.image_field]).div_(255)}

    def count(self, batch: Batch) -> int:
        return batch["images"].shape[0]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        error: Tensor = model(batch["images"]).float() - batch["images"]
        return error.square().sum()

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        """`squared_error`: of an image, summed over its pixels; `pixel_error`: of a pixel."""
        images = batch["images"]
        error = float((model(images).double() - images).square().sum())
        return {"squared_error": (error, images.shape[0]), "pixel_error": (error, images.numel())}

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Of each row the `image` that is given back (its first channel, where there are not three), and its
        `squared_error`, summed over pixels.
        """
        images = batch["images"]
        found = model(images).float()
        errors = (found - images).double().square().flatten(1).sum(1)
        return [
            {"squared_error": error, "image": image if image.shape[2] == 3 else image[..., 0]}
            for error, image in zip(errors.tolist(), found.movedim(1, -1).cpu().numpy(), strict=True)
        ]

    def draw(self, axes: Any, row: dict[str, Any], prediction: Prediction) -> None:
        """The image, and beside it what is given back."""
        before = self._pictures.shown(row[self.image_field]) / 255
        before = before if before.shape[2:] in ((), (3,)) else before[..., 0]
        axes.imshow(np.concatenate([before, prediction["image"]], 1), cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"squared error {prediction['squared_error']:.2f}")
        axes.set_axis_off()


def _only_image(data: DataInfo) -> str:
    images = [name for name, field in data.fields.items() if is_image(field)]
    if len(images) == 1:
        return images[0]
    raise DataError(
        f"task reconstruction needs one uint8 image column of two or three dimensions, all of one size; "
        f"dataset {data.name!r} has {words(data)}. Name it in task.image, or prepare with --image-size"
    )
