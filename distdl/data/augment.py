"""Keyed image augmentation in numpy: no state, no per-image Python, the same bits on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[Any]


def augment(images: Images, flip: bool, crop_padding: int, key: int) -> Images:
    """Flip each image left to right with probability 1/2, and crop it at random after zero padding.

    `images` is [B, C, H, W] or [B, H, W], any dtype; the result has the same shape and dtype. `crop_padding`
    is in pixels on each side; 0 leaves out the crop. The choices for image i depend on `key` (64 bits) and i
    alone, and those of the flip not on `crop_padding`. Without flip and crop, `images` itself is returned.
    """
    if images.ndim not in (3, 4):
        raise ValueError(f"images have shape {images.shape}; expected [B, C, H, W] or [B, H, W]")
    if crop_padding < 0:
        raise ValueError(f"crop_padding is {crop_padding}; expected 0 or more pixels")
    words = _random_words(key, len(images), 3)
    if flip:
        images = _flip(images, (words[:, 0] >> np.uint64(63)).astype(bool))
    if crop_padding:
        images = _crop(images, _below(words[:, 1:], 2 * crop_padding + 1), crop_padding)
    return images


def _random_words(key: int, rows: int, columns: int) -> npt.NDArray[np.uint64]:
    # Raw words, because numpy promises the stream of a bit generator for ever, and of a `Generator` method
    # such as `integers` only until it finds a better algorithm (NEP 19).
    raw = np.random.Philox(key=key).random_raw(rows * columns)
    return np.asarray(raw, dtype=np.uint64).reshape(rows, columns)


def _below(words: npt.NDArray[np.uint64], limit: int) -> npt.NDArray[np.int64]:
    """Integers in 0 .. limit - 1, uniform to within limit / 2**32 (multiply and shift)."""
    return (((words >> np.uint64(32)) * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)


def _flip(images: Images, chosen: npt.NDArray[np.bool_]) -> Images:
    flipped = images.copy()
    flipped[chosen] = images[chosen][..., ::-1]
    return flipped


def _crop(images: Images, corners: npt.NDArray[np.int64], padding: int) -> Images:
    height, width = images.shape[-2:]
    border = [(0, 0)] * (images.ndim - 2) + [(padding, padding)] * 2
    padded = np.pad(images, border)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(-2, -1))
    # [B, (C,) y, x, H, W] -> [B, y, x, (C,) H, W], so that one index picks whole windows.
    windows = np.moveaxis(windows, (-4, -3), (1, 2))
    return np.ascontiguousarray(windows[np.arange(len(images)), corners[:, 0], corners[:, 1]])
