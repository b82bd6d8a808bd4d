"""Decode images while training: a transform for `loader(..., transform=decode, workers=N)`.

Where the decoded images fit on disk, `distdl data prepare --image-size` decodes them once instead, which is
many times faster in every epoch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from distdl.data.prepare.decode import decode_image
from distdl.data.table.ragged import Ragged
from distdl.data.table.rows import Batch
from distdl.errors import DataError, nearest


def decode(
    batch: Batch, key: int, *, column: str = "image", size: tuple[int, int] | None = None, grey: bool = False
) -> Batch:
    """Encoded images in `column.bytes` (or `column`) -> uint8 [n, H, W, 3], or [n, H, W, 1] if `grey`.

    `size` is (height, width) in pixels; None needs images of one size. Options are given with
    `functools.partial(decode, size=(224, 224))`, which worker processes can import. The column of file
    names beside the bytes is dropped. `key` is not used. Raises DataError.
    """
    name = f"{column}.bytes" if f"{column}.bytes" in batch else column
    encoded = batch.get(name)
    if not isinstance(encoded, Ragged) or encoded.text is not False:
        raise DataError(
            f"column {name!r} does not hold encoded images{nearest(name, batch) or '.'} Expected bytes; the "
            f"batch has {', '.join(batch)}. Images decoded by `distdl data prepare` need no transform."
        )
    images = [
        decode_image(data, f"image {number} of the batch, column {name!r},", grey=grey, size=size)
        for number, data in enumerate(encoded.tolist())
    ]
    kept = {n: c for n, c in batch.items() if n not in (name, f"{column}.path")}
    return {column: _stack(images, size, 1 if grey else 3), **kept}


def _stack(
    images: list[npt.NDArray[np.uint8]], size: tuple[int, int] | None, channels: int
) -> npt.NDArray[np.uint8]:
    if not images:
        return np.empty((0, *(size or (0, 0)), channels), np.uint8)
    for number, image in enumerate(images):
        if image.shape != images[0].shape:
            raise DataError(
                f"image 0 of the batch is {images[0].shape[:2]} pixels (height, width) and image {number} is "
                f"{image.shape[:2]}; give a size: functools.partial(decode, size=(224, 224))"
            )
    stacked = np.stack(images)
    return stacked.reshape(*stacked.shape[:3], channels)
