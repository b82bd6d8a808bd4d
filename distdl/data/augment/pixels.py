"""Operations on a batch of images, whichever axis their channels are: what augmentations are made of.

Images are [B, H, W], [B, C, H, W] ("first") or [B, H, W, C] ("last"), of any dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from distdl.data.augment.noise import below, row_words
from distdl.errors import DataError

Array = npt.NDArray[Any]
Channels = Literal["first", "last"]

MOST_COLOURS = 4
"""An axis of up to this many is taken for channels: grey, grey and alpha, RGB, RGB and alpha."""


@dataclass(frozen=True)
class Normalise:
    """(value * scale - mean) / std for each channel, in float32.

    With `scale` 1 the mean is in units of the stored values, 0 to 255 for uint8; the usual figures for
    images, in units of 0 to 1, need `scale` 1/255.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0


def likely_channels(shape: tuple[int, ...]) -> Channels:
    """Last where, of four axes, only the last is short enough for colours; first otherwise."""
    return "last" if len(shape) == 4 and shape[1] > MOST_COLOURS >= shape[3] else "first"


def channel_axis(ndim: int, channels: Channels) -> int | None:
    """The axis of the channels; None for [B, H, W]."""
    return None if ndim == 3 else (1 if channels == "first" else 3)


def _height_axis(ndim: int, channels: Channels) -> int:
    return 2 if ndim == 4 and channels == "first" else 1


def flip_and_crop(images: Array, flip: bool, padding: int, key: int, channels: Channels) -> Array:
    """Both keyed by `key` and the number of the image, and the choices of each not moved by the other."""
    if not (flip or padding):
        return images
    words = row_words(key, len(images), 3)
    height = _height_axis(images.ndim, channels)
    if flip:
        images = _flip(images, (words[:, 0] >> np.uint64(63)).astype(bool), height + 1)
    if padding:
        images = _crop(images, below(words[:, 1:], 2 * padding + 1), padding, height)
    return images


def _flip(images: Array, chosen: npt.NDArray[np.bool_], width: int) -> Array:
    flipped = images.copy()
    flipped[chosen] = np.flip(images[chosen], axis=width)
    return flipped


def _crop(images: Array, corners: npt.NDArray[np.int64], padding: int, height: int) -> Array:
    """Windows of the size of an image, at `corners` [B, 2] of the padded one; `height` is the axis of it."""
    border = [(0, 0)] * images.ndim
    border[height] = border[height + 1] = (padding, padding)
    size = images.shape[height : height + 2]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(images, border), size, (height, height + 1))
    # [B, (C,) y, x, (C,) H, W] -> [B, y, x, the image's own axes], so that one index picks whole windows.
    windows = np.moveaxis(windows, (height, height + 1, -2, -1), (1, 2, height + 2, height + 3))
    return np.ascontiguousarray(windows[np.arange(len(images)), corners[:, 0], corners[:, 1]])


def cut_out(images: Array, side: int, key: int, channels: Channels) -> Array:
    """Zeros in a square of `side` pixels about a random one of each image, as far as it lies inside."""
    words = row_words(key, len(images), 2)
    height = _height_axis(images.ndim, channels)
    inside = []
    for axis in (0, 1):
        pixels = images.shape[height + axis]
        begins = below(words[:, axis], pixels) - side // 2
        from_begin = np.arange(pixels) - begins[:, None]
        inside.append((from_begin >= 0) & (from_begin < side))
    square = inside[0][:, :, None] & inside[1][:, None, :]
    if images.ndim == 4:
        square = np.expand_dims(square, 1 if channels == "first" else 3)
    return np.where(square, images.dtype.type(0), images)


def normalise_channels(values: Array, by: Normalise, axis: int | None) -> Array:
    """float32; `axis` is that of the channels (None: one channel). DataError for another number of them."""
    count = 1 if axis is None else values.shape[axis]
    if len(by.mean) != count:
        raise DataError(
            f"normalise has {len(by.mean)} means, and the data {count} channels (shape {list(values.shape)})"
        )
    shape = [1] * values.ndim
    if axis is not None:
        shape[axis] = count
    out = values.astype(np.float32)
    if by.scale != 1:
        out *= np.float32(by.scale)
    out -= np.array(by.mean, dtype=np.float32).reshape(shape)
    out /= np.array(by.std, dtype=np.float32).reshape(shape)
    return out
