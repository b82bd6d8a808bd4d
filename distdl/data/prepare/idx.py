"""Read IDX files, the format of MNIST and its relatives (described at the end of LeCun's MNIST page).

Two zero bytes, a type code, the number of dimensions, each dimension as a big-endian uint32, then the values
in C order, big-endian.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distdl.data.huggingface import class_label, feature_of, with_features
from distdl.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> npt.NDArray[Any]:
    """The array in an IDX file, gzipped or not, in native byte order.

    Raises DataError for a file that is missing, cut short, too long, or not IDX at all.
    """
    data = _read_bytes(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES:
        raise DataError(
            f"{path} is not an IDX file: it begins with bytes {data[:4].hex(' ') or '(none)'}; expected "
            f"00 00, a type code ({', '.join(f'{c:02x}' for c in _DTYPES)}) and the number of dimensions"
        )
    dtype, dimensions = np.dtype(_DTYPES[data[2]]), data[3]
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise DataError(
            f"{path} is cut short inside its header: {len(data)} bytes, expected {header} or more"
        )
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    expected = header + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        fault = "cut short" if len(data) < expected else "too long"
        raise DataError(
            f"{path} is {fault}: its header promises shape {shape}, {expected} bytes in all, and it has "
            f"{len(data)}. Fetch the file again."
        )
    return np.frombuffer(data, dtype, offset=header).reshape(shape).astype(dtype.newbyteorder("="))


_NAME = re.compile(r"(?P<split>\w+)-(?P<what>images|labels)[-.]idx[13]-ubyte(\.gz)?")
_SPLITS = {"t10k": "test"}

Pair = tuple[Path, Path]
"""The files of one split: images and labels."""


def find_idx(folder: Path) -> dict[str, Pair]:
    """The pairs SPLIT-images-idx3-ubyte, SPLIT-labels-idx1-ubyte (.gz or not) in `folder`; t10k is "test".

    Empty where there are none. Raises DataError for one without the other.
    """
    files: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.iterdir(), reverse=True):  # so that the plain file wins over the .gz beside it
        match = _NAME.fullmatch(file.name)
        if match:
            files.setdefault(match["split"], {})[match["what"]] = file
    for split, pair in files.items():
        for what in ("images", "labels"):
            if what not in pair:
                number = 3 if what == "images" else 1
                raise DataError(f"{folder} has no {split}-{what}-idx{number}-ubyte (or .gz) beside {pair}")
    ordered = sorted(files, key=lambda split: (split != "train", split))
    return {_SPLITS.get(split, split): (files[split]["images"], files[split]["labels"]) for split in ordered}


def idx_schema(pairs: dict[str, Pair], class_names: tuple[str, ...] | None) -> pa.Schema:
    """Columns `image` (fixed-size lists, type as stored) and `label` (int64 with class names).

    Without `class_names` the classes are called by their numbers. Reads the files. Raises DataError.
    """
    kinds, largest = set(), -1
    for split, pair in pairs.items():
        images, labels = read_idx(pair[0]), read_idx(pair[1])
        if images.ndim < 2 or labels.ndim != 1 or labels.dtype.kind not in "iu" or len(images) != len(labels):
            raise DataError(
                f"{pair[0].parent}: the {split} files hold images {images.shape} {images.dtype} and labels "
                f"{labels.shape} {labels.dtype}; expected [N, H, W] and as many integers, [N]"
            )
        if not len(labels) or labels.min() < 0:
            raise DataError(f"{pair[1]}: expected at least one label, none below 0")
        kinds.add((images.shape[1:], images.dtype))
        largest = max(largest, int(labels.max()))
    if len(kinds) != 1:
        raise DataError(f"the splits hold images of different kinds: {sorted(map(str, kinds))}")
    if class_names is not None and largest >= len(class_names):
        raise DataError(f"the labels reach {largest}; expected 0 to {len(class_names) - 1}")
    shape, dtype = kinds.pop()
    kind = pa.from_numpy_dtype(dtype)
    for length in reversed(shape):
        kind = pa.list_(kind, length)
    features = {
        "image": feature_of(kind),
        "label": class_label(class_names or [str(number) for number in range(largest + 1)]),
    }
    return with_features(pa.schema([pa.field("image", kind), pa.field("label", pa.int64())]), features)


def idx_table(pair: Pair, schema: pa.Schema) -> pa.Table:
    """The rows of one split in the columns of `idx_schema`."""
    images, labels = read_idx(pair[0]), read_idx(pair[1])
    column = pa.array(images.reshape(-1))
    for length in reversed(images.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, length)
    return pa.table([column, pa.array(labels.astype(np.int64))], schema=schema)


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the IDX file {path}: {error.strerror or error}") from error
    if data[:2] != _GZIP_MAGIC:
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}. Fetch the file again.") from error
