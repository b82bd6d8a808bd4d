"""IDX files: read as written, and refused in clear words when they are not whole."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from distdl.data.prepare.idx import read_idx
from distdl.errors import DataError


def _idx(code: int, array: np.ndarray) -> bytes:
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize(
    ("code", "dtype"), [(8, ">u1"), (9, ">i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")]
)
@pytest.mark.parametrize("zipped", [False, True])
def test_an_array_comes_back_as_written(tmp_path: Path, code: int, dtype: str, zipped: bool) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    data = _idx(code, array)
    (tmp_path / "a").write_bytes(gzip.compress(data) if zipped else data)
    read = read_idx(tmp_path / "a")
    assert np.array_equal(read, array)
    assert read.dtype == np.dtype(dtype).newbyteorder("=")
    assert read.flags.writeable


DATA = _idx(8, np.arange(200, dtype=np.uint8))
ZIPPED = gzip.compress(DATA, mtime=0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not an IDX file"),
        (b"PK\3\4" + DATA, "begins with bytes 50 4b 03 04"),
        (b"\0\0\7\1" + DATA[4:], "not an IDX file"),
        (DATA[:6], "cut short inside its header: 6 bytes, expected 8"),
        (DATA[:-1], "cut short: its header promises shape \\(200,\\), 208 bytes in all, and it has 207"),
        (DATA + b"x", "too long"),
        (ZIPPED[:-20], "damaged gzip"),
        (ZIPPED[:12] + b"\xff" * 30, "damaged gzip"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_idx(tmp_path / "a.gz")
    assert str(tmp_path / "a.gz") in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing-here"):
        read_idx(tmp_path / "nothing-here")
