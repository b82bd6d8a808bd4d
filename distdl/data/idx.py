"""Read IDX files, the format of MNIST and its relatives (described at the end of LeCun's MNIST page).

Two zero bytes, a type code, the number of dimensions, each dimension as a big-endian uint32, then the values
in C order, big-endian.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
