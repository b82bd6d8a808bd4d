"""Image columns: which they are, and their pixels as tensors that a model reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distdl.errors import DataError
from distdl.samples import DataInfo, Field
from distdl.tasks.columns import in_words


def is_image(field: Field) -> bool:
    """Whether rows are uint8 images of one size: [H, W], [H, W, C] or [C, H, W]."""
    return field.dtype == "uint8" and len(field.shape) in (2, 3) and None not in field.shape


def image_column(data: DataInfo, name: str, task: str) -> Field:
    """Column `name`, which must hold images. Raises DataError."""
    field = data.fields[name]
    if is_image(field):
        return field
    raise DataError(
        f"task {task} reads images from column {name!r} of dataset {data.name!r}, which is "
        f"{in_words(field)}; expected uint8 of two or three dimensions, all of one size. `distdl data "
        "prepare` with --image-size makes them (with --masks and --boxes, of what goes along with them)"
    )


class Pictures:
    """Rows of an image column as floats. `input_shape` is (C, H, W). Raises DataError above four channels."""

    def __init__(self, field: Field) -> None:
        shape = tuple(n for n in field.shape if n is not None)
        if len(shape) == 3 and min(shape[0], shape[2]) > 4:
            raise DataError(
                f"images of {list(shape)}: expected [height, width], or up to four channels before or after "
                "them; for more, write a task of your own (docs/bring-your-own.md)"
            )
        self._channels_last = len(shape) == 3 and shape[0] > 4
        if len(shape) == 2:
            shape = (1, *shape)
        self.input_shape = (shape[2], *shape[:2]) if self._channels_last else shape

    def shown(self, pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One image as stored -> [H, W] or [H, W, C], as a drawing wants it."""
        channels_first = pixels.ndim == 3 and not self._channels_last
        return (np.moveaxis(pixels, 0, -1) if channels_first else pixels).squeeze()

    def __call__(self, pixels: npt.NDArray[Any]) -> Tensor:
        """uint8 as stored -> float32 [N, C, H, W], 0..255 as they are."""
        if self._channels_last:
            pixels = np.moveaxis(pixels, -1, 1)
        images = torch.from_numpy(np.ascontiguousarray(pixels)).view(-1, *self.input_shape)
        return images.to(torch.float32)
