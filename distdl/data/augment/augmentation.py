"""Keyed augmentation in numpy: no state, no per-row Python, the same bits on every machine.

What is done to row i of a microbatch follows from the microbatch's key (64 bits) and i alone, and each kind
of augmentation draws from a stream of its own: turning one on or off does not move the choices of another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from distdl.data.augment.noise import item_words, normal, uniform
from distdl.data.augment.pixels import (
    MOST_COLOURS,
    Array,
    Channels,
    Normalise,
    channel_axis,
    cut_out,
    flip_and_crop,
    likely_channels,
    normalise_channels,
)
from distdl.data.table.ragged import Ragged
from distdl.data.table.rows import Batch
from distdl.errors import DataError, nearest
from distdl.keys import key as derive

Ints = npt.NDArray[np.int64]
Kind = Literal["image", "tokens", "series"]


@dataclass(frozen=True)
class TokenDropout:
    """Replace each token by `replacement` with `probability`, but never those in `spared` (padding, say)."""

    probability: float
    replacement: int
    spared: tuple[int, ...] = ()


@dataclass(frozen=True)
class Augmentation:
    """What to do to one column of a microbatch; called with (values, key). Pure: any thread, any process.

    Images ([B, H, W], [B, C, H, W] or [B, H, W, C], any dtype), in this order: `flip` left to right with
    probability 1/2; `crop_padding` pixels of zeros on each side, cropped back at random; `normalise`;
    `cutout`, a square of so many pixels a side set to 0, its centre anywhere in the image (DeVries and
    Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017). `channels` says
    where the channel axis is; None tells it from the shape: the first of axes 1 and 3 that is 4 or less.

    Tokens (integers, [B, T] or `Ragged`): `token_dropout`. The column is changed as a whole: of one that is
    both input and target, the targets too.

    Series (floats, [B, T], [B, T, C] or `Ragged`; integers too where they are normalised): `normalise`, then
    `jitter`, the standard deviation of normal noise in units of the result.

    `kind` is needed for `normalise` alone; other options tell it. Values that need no change are returned as
    they are, and never written into. Raises DataError for options that do not go together, and for values of
    another shape or dtype.
    """

    kind: Kind | None = None
    flip: bool = False
    crop_padding: int = 0
    cutout: int = 0
    token_dropout: TokenDropout | None = None
    jitter: float = 0.0
    normalise: Normalise | None = None
    channels: Channels | None = None

    def __post_init__(self) -> None:
        _check_options(self)
        object.__setattr__(self, "kind", _kind(self))

    def __call__(self, values: Array | Ragged, key: int) -> Array | Ragged:
        """`values` (one row or more of a microbatch) augmented by `key` (64 bits), in the same shape."""
        if self.kind is None:
            return values
        if self.kind == "image":
            return self._image(values, key)
        items, lengths = _items(values, self.kind, self.normalise is not None)
        change = self._tokens if self.kind == "tokens" else self._series
        items = change(items, lengths, key)
        return replace(values, values=items) if isinstance(values, Ragged) else items.reshape(values.shape)

    def on(self, column: str) -> Callable[[Batch, int], Batch]:
        """The same for a whole microbatch, of which `column` is augmented: (batch, key) -> a new batch."""
        return functools.partial(augment_column, column, self)

    def _image(self, values: Array | Ragged, key: int) -> Array:
        if isinstance(values, Ragged) or values.ndim not in (3, 4):
            raise DataError(
                f"images have shape {_shape(values)}; expected [B, H, W], [B, C, H, W] or [B, H, W, C]. "
                "Resize them to one size when you prepare the data (`--image-size`)."
            )
        channels = self._channels(values.shape)
        images = flip_and_crop(values, self.flip, self.crop_padding, key, channels)
        if self.normalise is not None:
            images = normalise_channels(images, self.normalise, channel_axis(images.ndim, channels))
        if self.cutout:
            images = cut_out(images, self.cutout, derive(key, "cutout"), channels)
        return images

    def _channels(self, shape: tuple[int, ...]) -> Channels:
        if self.channels is not None or len(shape) == 3:
            return self.channels or "first"
        if min(shape[1], shape[3]) > MOST_COLOURS:
            raise DataError(
                f"images have shape {list(shape)}: neither axis 1 nor axis 3 looks like channels (1 to "
                f"{MOST_COLOURS}). Say channels: first, or last."
            )
        return likely_channels(shape)

    def _tokens(self, items: Array, lengths: Ints, key: int) -> Array:
        dropout = self.token_dropout
        if dropout is None or not dropout.probability:
            return items
        held = np.iinfo(items.dtype)
        if not held.min <= dropout.replacement <= held.max:
            raise DataError(
                f"the replacement {dropout.replacement} does not fit tokens of type {items.dtype}"
            )
        chosen = uniform(item_words(derive(key, "token_dropout"), lengths)) < dropout.probability
        if dropout.spared:
            chosen &= ~np.isin(items, dropout.spared)
        return np.where(chosen, items.dtype.type(dropout.replacement), items)

    def _series(self, items: Array, lengths: Ints, key: int) -> Array:
        if self.normalise is not None:
            items = normalise_channels(items, self.normalise, items.ndim - 1 if items.ndim > 1 else None)
        if self.jitter:
            each = int(np.prod(items.shape[1:], dtype=np.int64))
            noise = normal(item_words(derive(key, "jitter"), lengths * each)) * self.jitter
            items = items + noise.astype(items.dtype).reshape(items.shape)
        return items


def augment_column(column: str, augmentation: Augmentation, batch: Batch, key: int) -> Batch:
    """`batch` with `column` augmented by `key`; the other columns as they are. DataError without it."""
    if column not in batch:
        raise DataError(
            f"there is no column {column!r} to augment{nearest(column, batch) or '.'} "
            f"Columns: {', '.join(batch)}."
        )
    try:
        return {**batch, column: augmentation(batch[column], key)}
    except DataError as error:
        raise DataError(f"column {column!r}: {error}") from error


def augment(
    images: Array, flip: bool, crop_padding: int, key: int, channels: Channels | None = None
) -> Array:
    """Flip each image left to right with probability 1/2, and crop it at random after zero padding.

    `images` is [B, H, W], [B, C, H, W] or [B, H, W, C], any dtype; the result has the same shape and dtype.
    `channels` None: last where only the last axis is 4 or less, else first. `crop_padding` is in pixels on
    each side; 0 leaves out the crop. The choices for image i depend on `key` (64 bits) and i alone, and those
    of the flip not on `crop_padding`. Without flip and crop, `images` itself is returned.
    """
    if images.ndim not in (3, 4):
        raise ValueError(
            f"images have shape {images.shape}; expected [B, C, H, W], [B, H, W, C] or [B, H, W]"
        )
    if crop_padding < 0:
        raise ValueError(f"crop_padding is {crop_padding}; expected 0 or more pixels")
    return flip_and_crop(images, flip, crop_padding, key, channels or likely_channels(images.shape))


def _items(values: Array | Ragged, kind: Kind, converted: bool) -> tuple[Array, Ints]:
    """All items end to end, [total, *item shape], and how many each row has. DataError for another dtype."""
    items, lengths = _flat(values)
    wanted = np.integer if kind == "tokens" else (np.number if converted else np.floating)
    if (
        lengths is None
        or isinstance(items, Ragged)
        or not np.issubdtype(items.dtype, wanted)
        or (kind == "tokens" and items.ndim > 1)
    ):
        expected = "integers [B, T]" if kind == "tokens" else "floats [B, T] or [B, T, C]"
        raise DataError(f"{kind} to augment are {_shape(values)}; expected {expected}, or lists of them")
    return items, lengths


def _flat(values: Array | Ragged) -> tuple[Array | Ragged, Ints | None]:
    """Items and lengths of any values; no lengths where a row is a single number."""
    if isinstance(values, Ragged):
        return values.values, values.lengths
    if values.ndim < 2:
        return values, None
    rows, length = values.shape[:2]
    return values.reshape(rows * length, *values.shape[2:]), np.full(rows, length, dtype=np.int64)


def _shape(values: Array | Ragged) -> str:
    if not isinstance(values, Ragged):
        return f"{list(values.shape)} {values.dtype}"
    return f"[{len(values)}, varying] of {_shape(values.values)}"


def _kind(options: Augmentation) -> Kind | None:
    """What the options are for. Raises DataError where they are for different things."""
    given: dict[str, Kind] = {}
    for name in ("flip", "crop_padding", "cutout", "channels"):
        if getattr(options, name):
            given[name] = "image"
    if options.token_dropout is not None:
        given["token_dropout"] = "tokens"
    if options.jitter:
        given["jitter"] = "series"
    if options.kind is not None:
        given["kind"] = options.kind
    kinds = set(given.values())
    if len(kinds) > 1:
        shown = ", ".join(f"{name} is for {kind}" for name, kind in given.items())
        raise DataError(f"these augmentations do not go together on one column: {shown}")
    if options.normalise is not None and kinds == {"tokens"}:
        raise DataError("normalise is for images and for series, not for tokens")
    if options.normalise is not None and not kinds:
        raise DataError("normalise is for images and for series: say kind: image, or series")
    return next(iter(kinds), None)


def _check_options(options: Augmentation) -> None:
    for name in ("crop_padding", "cutout", "jitter"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise DataError(f"{name} is {getattr(options, name)}; expected 0 or more")
    dropout, normalise = options.token_dropout, options.normalise
    if dropout is not None and not 0 <= dropout.probability <= 1:
        raise DataError(f"the probability of token_dropout is {dropout.probability}; expected 0 to 1")
    if normalise is not None and not (
        len(normalise.mean) == len(normalise.std) > 0 and all(0 < s < float("inf") for s in normalise.std)
    ):
        raise DataError(
            f"normalise has mean {list(normalise.mean)} and std {list(normalise.std)}; expected one mean and "
            "one std above 0 for each channel"
        )
