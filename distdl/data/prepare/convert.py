"""From the columns that a source has to those that are trained on. Pure functions on Arrow tables.

Every conversion keeps the number and order of rows; what cannot be converted is a DataError that names the
column and the row (its number in the split of the source).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from distdl.data.huggingface import (
    Features,
    array_shape,
    canonical_type,
    class_label,
    feature_of,
    is_image,
    is_sound,
    with_features,
)
from distdl.data.prepare.decode import decode_classes, decode_image, image_size
from distdl.data.prepare.readers import Ids
from distdl.data.prepare.sound import Sound, decode_sound, log_mel
from distdl.data.prepare.tokenize import encode
from distdl.errors import DataError

RowName = Callable[[int], str]
"""Row of the table at hand -> what to call it in an error."""


@dataclass(frozen=True)
class Picture:
    """How a column of images is decoded; `size` (height, width) None: as it is; `numbers`: of classes;
    `convert`: colours among grey ones become grey, and are no error.
    """

    grey: bool
    size: tuple[int, int] | None
    numbers: bool = False
    convert: bool = False


@dataclass(frozen=True)
class Conversion:
    """What is done to every row. Keys are column names after renaming. Goes to the workers by pickle."""

    columns: tuple[str, ...]
    """Columns of the source that are kept, by the source's names."""
    names: dict[str, str]
    """The source's name -> name in the result, for those that change."""
    features: Features
    """The source's features, by the names of the result."""
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pictures: dict[str, Picture] = field(default_factory=dict)
    boxes: dict[str, str | None] = field(default_factory=dict)
    """Columns of boxes, and the column of the images that they are resized with, if any are."""
    sounds: dict[str, Sound] = field(default_factory=dict)
    tokenize: tuple[str, ...] = ()
    tokenizer: str | None = None
    max_tokens: int | None = None

    def apply(self, table: pa.Table, rows: Ids | range, split: str) -> tuple[pa.Table, int]:
        """(converted table, rows whose tokens were cut). `rows` are their numbers in the source's `split`."""

        def where(row: int) -> str:
            return f"row {rows[row]} of split {split!r}"

        found: dict[str, pa.Array] = {}
        cut = 0
        for source in self.columns:
            name = self.names.get(source, source)
            column = canonical(_one_chunk(table.column(source)))
            if name in self.pictures:
                found[name] = decode_column(column, name, self.pictures[name], where)
                continue
            if name in self.sounds:
                found[name] = hear_column(column, name, self.sounds[name], where)
                continue
            encoded = is_image(self.features.get(name)) or is_sound(self.features.get(name))
            if not encoded:  # whose path or bytes may be null
                require_no_nulls(column, name, where)
            shape = array_shape(self.features.get(name))
            if name in self.boxes:
                column = resize_boxes(column, self._factors(table, self.boxes[name], where), name, where)
            elif name in self.classes:
                column = encode_classes(column, name, self.classes[name], where)
            elif name in self.tokenize:
                assert self.tokenizer is not None
                require_text(column, name)
                column, shortened = encode(self.tokenizer, column.to_pylist(), self.max_tokens)
                cut += shortened
            elif shape is not None:
                column = fix_lists(column, shape, name, where)
            found[name] = column
        result = pa.table(found)
        return result.cast(with_features(result.schema, self._features(result.schema))), cut

    def _factors(self, table: pa.Table, image: str | None, where: RowName) -> list[tuple[float, float]]:
        """By how much the image of each row is resized: (width, height)."""
        size = self.pictures[image].size if image else None
        if image is None or size is None:
            return [(1.0, 1.0)] * len(table)
        old = next(c for c in self.columns if self.names.get(c, c) == image)
        found = []
        for row, value in enumerate(table.column(old)):
            label = _label(image, where(row), value.as_py())
            height, width = image_size(file_bytes(value.as_py(), label), label)
            found.append((size[1] / width, size[0] / height))
        return found

    def _features(self, schema: pa.Schema) -> Features:
        changed = {*self.pictures, *self.sounds, *self.tokenize, *self.boxes}
        features: Features = {}
        for column in schema:
            old = self.features.get(column.name)
            if column.name in self.classes:
                features[column.name] = class_label(self.classes[column.name])
            elif old is None or column.name in changed or array_shape(old) is not None:
                features[column.name] = feature_of(column.type)
            else:
                features[column.name] = old
        return features


def canonical(column: pa.Array) -> pa.Array:
    """`column` in its `canonical_type`."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = canonical_type(column.type)
    # Two list types compare equal whatever their items are called, and `datasets` writes the names down.
    if str(column.type) == str(kind):
        return column
    if "list_view" in str(column.type):  # which pyarrow 26 casts to lists with other rows in them
        return pa.array(column.to_pylist(), kind)
    return column.cast(kind)


def require_no_nulls(column: pa.Array, name: str, where: RowName) -> None:
    """Raises DataError for the first row that is null, or has one inside."""
    if not _has_nulls(column):
        return
    row = next(i for i, value in enumerate(column) if _is_null(value.as_py()))
    raise DataError(f"column {name!r} has a null, first in {where(row)}; fill or drop such rows first")


def require_text(column: pa.Array, name: str) -> None:
    """Raises DataError for a column that is not text."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(f"column {name!r} has type {column.type}; only text can be tokenised")


def encode_classes(column: pa.Array, name: str, names: tuple[str, ...], where: RowName) -> pa.Array:
    """Strings (or numbers, by their decimal text) -> int64 positions in `names`."""
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    found = pc.index_in(column, value_set=pa.array(names, column.type))
    if found.null_count:
        row = int(np.flatnonzero(np.asarray(found.is_null()))[0])
        raise DataError(
            f"column {name!r}: {column[row].as_py()!r} in {where(row)} is not among {list(names)}"
        )
    return found.cast(pa.int64())


def fix_lists(column: pa.Array, shape: tuple[int | None, ...], name: str, where: RowName) -> pa.Array:
    """Nested lists -> fixed-size lists of `shape` (None: that axis stays variable). Raises DataError."""

    def ragged(row: int, found: int, length: int) -> DataError:
        return DataError(
            f"column {name!r} is ragged where its feature says shape {list(shape)}: {where(row)} has a list "
            f"of {found} where {length} are expected. Make its rows alike, leave such rows out, or give the "
            "feature no length"
        )

    return _fix_lists(column, shape, np.arange(len(column)), ragged)


def _fix_lists(
    column: pa.Array,
    shape: tuple[int | None, ...],
    owner: npt.NDArray[np.int64],
    ragged: Callable[[int, int, int], DataError],
) -> pa.Array:
    """`owner` (int64 [n]) says which row of the table each of these lists belongs to."""
    if not shape:
        return column
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    length = shape[0]
    if length is not None and (lengths != length).any():
        first = int(np.flatnonzero(lengths != length)[0])
        raise ragged(int(owner[first]), int(lengths[first]), length)
    inner = _fix_lists(column.flatten(), shape[1:], np.repeat(owner, lengths), ragged)
    if length is not None:
        return pa.FixedSizeListArray.from_arrays(inner, length)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), inner)


def resize_boxes(
    column: pa.Array, factors: Sequence[tuple[float, float]], name: str, where: RowName
) -> pa.Array:
    """Lists of four numbers (left, top, right, bottom, or left, top, width, height), times the factors of the
    width and the height of their row -> float32 [k, 4] a row. Raises DataError for anything else.
    """

    def resized(boxes: Any, width: float, height: float) -> list[list[float]] | None:
        try:
            return [[a * width, b * height, c * width, d * height] for a, b, c, d in boxes]
        except (TypeError, ValueError):
            return None

    found = [resized(boxes, *by) for boxes, by in zip(column.to_pylist(), factors, strict=True)]
    if None in found:
        row = found.index(None)
        raise DataError(
            f"--boxes {name}: {where(row)} has {str(column[row])[:80]}; expected a list of boxes of four "
            "numbers each (left, top, right, bottom)"
        )
    return pa.array(found, pa.list_(pa.list_(pa.float32(), 4)))


def decode_column(column: pa.Array, name: str, picture: Picture, where: RowName) -> pa.Array:
    """struct<bytes, path> -> uint8 [H, W] or [H, W, 3]. Raises DataError where two sizes meet."""
    images: list[npt.NDArray[np.uint8]] = []
    for row, value in enumerate(column):
        label = _label(name, where(row), value.as_py())
        data = file_bytes(value.as_py(), label)
        if picture.numbers:
            images.append(decode_classes(data, label, size=picture.size))
        else:
            grey, convert, size = picture.grey, picture.convert, picture.size
            images.append(decode_image(data, label, grey=grey, convert=convert, size=size))
        if images[-1].shape != images[0].shape:
            raise size_error(name, images[0].shape, where(0), images[-1].shape, where(row))
    return to_fixed_lists(np.stack(images))


def hear_column(column: pa.Array, name: str, sound: Sound, where: RowName) -> pa.Array:
    """struct<bytes, path> -> lists of `sound.mels` float16, one a frame. Raises DataError."""
    heard: list[npt.NDArray[np.float16]] = [np.zeros((0, sound.mels), np.float16)]
    for row, value in enumerate(column):
        label = _label(name, where(row), value.as_py())
        samples, rate = decode_sound(file_bytes(value.as_py(), label), label)
        heard.append(log_mel(samples, rate, sound, label))
    ends = np.cumsum([len(one) for one in heard]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), to_fixed_lists(np.concatenate(heard)))


def _label(name: str, row: str, value: Any) -> str:
    path = value.get("path") if isinstance(value, Mapping) else None
    return f"column {name!r}, {row}" + (f" ({path})" if path else "")


def size_error(name: str, first: Sequence[int], there: str, other: Sequence[int], here: str) -> DataError:
    """Two images of different sizes."""
    return DataError(
        f"column {name!r}: the image in {there} is {first[0]}x{first[1]} (height x width) and that in {here} "
        f"{other[0]}x{other[1]}; all images of a dataset need one size: give --image-size, such as "
        f"--image-size {first[0]}x{first[1]}"
    )


def file_bytes(value: Any, label: str) -> bytes:
    """The encoded image or sound in a row: its bytes, or the file that its path names."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        if value.get("path"):
            try:
                return Path(value["path"]).read_bytes()
            except OSError as error:
                raise DataError(f"{label}: cannot read {value['path']}: {error.strerror or error}") from error
    raise DataError(f"{label} has no image or sound; drop such rows first")


def to_fixed_lists(array: npt.NDArray[Any]) -> pa.Array:
    """[n, *shape] -> n rows of nested fixed-size lists."""
    column = pa.array(np.ascontiguousarray(array).reshape(-1))
    for length in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, length)
    return column


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


def _has_nulls(column: pa.Array) -> bool:
    if column.null_count:
        return True
    kind = column.type
    if pa.types.is_struct(kind):
        return any(_has_nulls(child) for child in column.flatten())
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and _has_nulls(column.flatten())


def _is_null(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_is_null, value.values()))
    if isinstance(value, list):
        return any(map(_is_null, value))
    return value is None
