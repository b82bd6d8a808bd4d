"""Encoded images (PNG, JPEG, ...) -> arrays, and back. The one file that imports PIL, when it must."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from distdl.errors import DataError, EnvironmentProblem

GREY = ("1", "L", "I", "I;16", "I;16B", "I;16L", "LA", "F")
"""PIL's modes that are kept as one channel, uint8 [H, W]; every other becomes RGB, [H, W, 3]."""


def is_grey(data: bytes, where: str) -> bool:
    """Whether an encoded image has one channel of colour; reads its head only. Raises DataError."""
    with _open(data, where) as image:
        return image.mode in GREY


def decode_image(
    data: bytes, where: str, *, grey: bool, convert: bool = False, size: tuple[int, int] | None = None
) -> npt.NDArray[np.uint8]:
    """uint8 [H, W] (`grey`) or [H, W, 3], resized to `size` (height, width; bilinear with antialiasing).

    `where` names the row in errors. Raises DataError for bytes that are no image, or a coloured one among
    grey ones unless it is to `convert`; EnvironmentProblem where pillow is not installed.
    """
    with _open(data, where) as image:
        if grey and not convert and image.mode not in GREY:
            raise DataError(
                f"{where} is an image of mode {image.mode}, and those before it are grey; convert the "
                "images to one mode first"
            )
        try:
            if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
                image = _eight_bits(image, where)
            image = _upright(image)
            plain = image.convert("L" if grey else "RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{where} is a damaged image: {error}") from error
        if size is not None and plain.size != (size[1], size[0]):
            from PIL import Image

            plain = plain.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return np.asarray(plain, dtype=np.uint8)


_ORIENTATION = 0x0112
"""Which way up a photo is shown (Exif 2.3, section 4.6.4): cameras store the pixels as the sensor lay."""


def _orientation(image: Any) -> int:
    """1 to 8; 1, upright, where it is not said, or damaged."""
    from PIL import Image

    if image.format == "TIFF":  # which PIL turns by itself
        return 1
    try:
        found = Image.Image.getexif(image).get(_ORIENTATION, 1)  # that of PNG would decode all of it
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _eight_bits(image: Any, where: str) -> Any:
    """Grey images of 16 bits by their upper 8, of 32 if they fit: PIL's own conversion clips to 255."""
    from PIL import Image

    numbers = np.asarray(image)
    # PIL scales deep PGM to 16 bits, and older ones open PNG of 16 bits so.
    if image.mode not in ("I", "F") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        numbers = numbers >> 8
    elif not np.array_equal(numbers, np.clip(np.rint(numbers), 0, 255)):
        raise DataError(
            f"{where} is an image of 32-bit numbers from {numbers.min()} to {numbers.max()}; expected whole "
            "ones from 0 to 255: scale them, or store them as an array"
        )
    plain = Image.fromarray(numbers.astype(np.uint8))
    plain.info.update(image.info)
    return plain


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """(height, width) of an encoded image as it is shown; reads its head only. Raises DataError."""
    with _open(data, where) as image:
        return (image.width, image.height) if _orientation(image) >= 5 else (image.height, image.width)


def decode_classes(data: bytes, where: str, *, size: tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """The numbers of an image whose pixels are classes: uint8 [H, W], of a palette its indices; resized to
    `size` (height, width) without numbers in between. Raises DataError for colours and numbers above 255.
    """
    with _open(data, where) as image:
        if image.format in ("JPEG", "MPO"):
            raise DataError(
                f"{where} is a JPEG, which blends neighbouring numbers; store masks as PNG, or in another "
                "format that keeps each pixel"
            )
        try:
            numbers = np.asarray(_upright(image))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{where} is a damaged image: {error}") from error
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise DataError(
                f"{where} is an image of mode {image.mode}; a mask is a class number for each pixel, modes L "
                "and P. Turn its colours into numbers first"
            )
    if numbers.max(initial=0) > 255 or numbers.min(initial=0) < 0:
        raise DataError(f"{where} has classes from {numbers.min()} to {numbers.max()}; expected 0 to 255")
    numbers = numbers.astype(np.uint8)
    if size is not None and numbers.shape != size:
        # The number under the centre of each new pixel.
        rows, columns = (
            (2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip(size, numbers.shape, strict=True)
        )
        numbers = numbers[np.ix_(rows, columns)]
    return numbers


def encode_classes(mask: npt.NDArray[np.uint8]) -> bytes:
    """A PNG whose pixels are the numbers of `mask` [H, W], and show as a colour each."""
    from PIL import Image

    image = Image.fromarray(mask, "P")
    image.putpalette([value for k in range(256) for value in _colour(k)])
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


def encode_picture(picture: npt.NDArray[np.floating[Any]]) -> bytes:
    """A PNG of floats, 0 (black) to 1, [H, W] or [H, W, 3]; what is beyond is cut off."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.rint(picture.clip(0, 1) * 255).astype(np.uint8)).save(out, "png")
    return out.getvalue()


def _colour(k: int) -> tuple[int, ...]:
    """Red, green, blue: black for 0; the bits of k in turn, lowest first, as in PASCAL VOC's masks."""
    return tuple(sum((k >> (3 * i + part) & 1) << (7 - i) for i in range(3)) for part in range(3))


def _open(data: bytes, where: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise EnvironmentProblem("images need pillow: pip install pillow") from error
    try:
        return Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} is not an image that PIL can read: {error}") from error
