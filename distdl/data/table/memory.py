"""Copy many pieces of memory-mapped files at once: rows of one size, and spans of different sizes.

Files are mapped wherever the kernel puts them. An address says where a row lies whatever file it belongs to,
so a batch over a thousand files is one indexing operation instead of a thousand. numpy sees memory as one
array of overlapping items, an item beginning at every byte; nothing but the pieces asked for is touched.

The caller answers for the addresses: `columns` makes them from buffers whose sizes were checked.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from distdl.data.table.ragged import Allocate, span_index

Int64 = npt.NDArray[np.int64]
_PIECE_BYTES = 128 * 2**10
"""Rows are copied through a buffer of about this size, which stays in the processor's cache."""

_BLOCK_BYTES = 256
"""Long spans are copied in blocks of this size; an index of each element would be larger than the data."""

_LARGEST_ARRAY = 2**62
"""numpy counts the bytes of an array, overlaps included, in 63 bits."""


def allocate_plain(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Ordinary memory."""
    return np.empty(shape, dtype)


def take_rows(
    addresses: Int64, dtype: np.dtype[Any], shape: tuple[int, ...], allocate: Allocate | None = None
) -> npt.NDArray[Any]:
    """The rows at `addresses` (int64 [n]) -> [n, *shape] of `dtype`, in memory from `allocate`."""
    row_bytes = dtype.itemsize * math.prod(shape)
    if not addresses.size or not row_bytes:
        return (allocate or allocate_plain)((len(addresses), *shape), dtype)
    base = int(addresses.min())
    index = addresses - base
    reach = int(index.max()) + 1
    while reach * row_bytes > _LARGEST_ARRAY and row_bytes % 2 == 0:
        row_bytes //= 2
        index = (index[:, None] + np.array([0, row_bytes])).reshape(-1)
        reach += row_bytes
    source = _overlapping(base, reach, row_bytes)
    if allocate is None:
        values: npt.NDArray[Any] = source[index].view(dtype)
        return values.reshape(len(addresses), *shape)
    out = allocate((len(addresses), *shape), dtype)
    target = out.reshape(-1).view(f"V{row_bytes}")
    step = max(8, _PIECE_BYTES // row_bytes)
    for start in range(0, len(index), step):
        target[start : start + step] = source[index[start : start + step]]
    return out


def take_spans(
    starts: Int64, lengths: Int64, dtype: np.dtype[Any], items: int, out: npt.NDArray[Any]
) -> None:
    """Copy spans end to end: span i is `lengths[i]` rows of `items` values of `dtype` at address `starts[i]`.

    `out` is C-contiguous and has room for them all. Spans of length 0 are not touched: their address may be
    anything.
    """
    held = lengths > 0
    if not held.all():
        starts, lengths = starts[held], lengths[held]
    if not len(starts) or not items:
        return
    values = lengths * items
    flat = out.reshape(-1)
    if int(values.sum()) * dtype.itemsize > 2 * _BLOCK_BYTES * len(values):
        _copy_by_blocks(starts, values * dtype.itemsize, flat.view(np.uint8))
    else:
        _copy_by_values(starts, values, flat)


def _copy_by_values(starts: Int64, lengths: Int64, out: npt.NDArray[Any]) -> None:
    size = out.dtype.itemsize
    base = int(starts.min())
    first, rest = np.divmod(starts - base, size)
    if base % size == 0 and not rest.any():
        # Arrow aligns buffers to 8 bytes, so that this is the usual way.
        source = _array(base, int((first + lengths).max()), out.dtype, size)
        # mode "raise", the default, would go through a copy of the result.
        np.take(source, span_index(first, lengths), out=out[: int(lengths.sum())], mode="clip")
    else:
        within = span_index(np.zeros_like(starts), lengths)
        out[:] = take_rows(np.repeat(starts, lengths) + within * size, out.dtype, ())


def _copy_by_blocks(starts: Int64, lengths: Int64, out: npt.NDArray[np.uint8]) -> None:
    """Spans of `lengths` bytes. The last block of a span ends where the span does, and so overlaps."""
    ends = np.cumsum(lengths)
    long = lengths >= _BLOCK_BYTES
    begins = ends - lengths
    for chosen, block in ((long, _BLOCK_BYTES), (~long, 1)):
        if not chosen.any():
            continue
        sizes = lengths[chosen]
        blocks = -(-sizes // block)
        within = span_index(np.zeros_like(blocks), blocks) * block
        within = np.minimum(within, np.repeat(sizes - block, blocks))
        source = np.repeat(starts[chosen], blocks) + within
        target = np.repeat(begins[chosen], blocks) + within
        base = int(source.min())
        memory = _overlapping(base, int(source.max()) - base + 1, block)
        into = np.ndarray((len(out) - block + 1,), f"V{block}", buffer=out.data, strides=(1,))
        step = max(8, _PIECE_BYTES // block)
        for first in range(0, len(source), step):
            part = slice(first, first + step)
            into[target[part]] = memory[source[part] - base]


class _At:
    """Memory at an address, in the form that numpy makes an array of without a copy."""

    def __init__(self, address: int, count: int, kind: str, stride: int) -> None:
        self.__array_interface__ = {
            "data": (address, True),
            "shape": (count,),
            "typestr": kind,
            "strides": (stride,),
            "version": 3,
        }


def _array(address: int, count: int, dtype: np.dtype[Any], stride: int) -> npt.NDArray[Any]:
    return np.asarray(_At(address, count, dtype.str, stride))


def _overlapping(address: int, count: int, item_bytes: int) -> npt.NDArray[Any]:
    return np.asarray(_At(address, count, f"|V{item_bytes}", 1))
