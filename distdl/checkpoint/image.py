"""What a rank writes, as bytes: straight from its tensors, or from a copy taken at a step boundary."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from distdl.checkpoint.tensorfile import Slot, lay_out
from distdl.pieces import Piece

STAGING = 8 << 20
"""Bytes of the pinned buffer through which a GPU's tensors are written."""


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as the manifest writes it: "float32"."""
    return str(dtype).removeprefix("torch.")


def slots_of(pieces: Mapping[str, Piece]) -> list[Slot]:
    """Where these stand in their file: a part of a tensor has one dimension there."""
    return lay_out([(n, dtype_name(p.data.dtype), tuple(p.data.shape)) for n, p in pieces.items()])


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, [nbytes] of uint8, without a copy."""
    return tensor.reshape(-1).view(torch.uint8)


def memory_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return _bytes_of(tensor.detach()).numpy().data


def views(slots: Sequence[Slot], pieces: Mapping[str, Piece]) -> Iterator[memoryview]:
    """The data section, in order. A view is good until the next is asked for.

    CPU tensors are not copied, unless they are not contiguous; others pass through one small buffer.
    """
    staging: Tensor | None = None
    for slot in slots:
        data = pieces[slot.name].data.detach().contiguous()
        if slot.begin == slot.end:
            continue
        if data.device.type == "cpu":
            yield memory_of(data)
            continue
        if staging is None:
            staging = torch.empty(STAGING, dtype=torch.uint8, pin_memory=data.device.type == "cuda")
        flat = _bytes_of(data)
        for at in range(0, flat.numel(), STAGING):
            part = flat[at : at + STAGING]
            yield memory_of(staging[: part.numel()].copy_(part))


class Image:
    """A copy of what a rank writes, in one buffer that is kept from save to save.

    Making it costs more than filling it: the pages are touched once. On CUDA it is pinned, so that the copies
    of all tensors are queued and waited for once.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, slots: Sequence[Slot], pieces: Mapping[str, Piece]) -> memoryview:
        """Copy all tensors; returns the data section. Blocks until they may be changed.

        What `take` returned before must not be in use any more.
        """
        nbytes = slots[-1].end if slots else 0
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # give the old one back first
            self._buffer = _make(nbytes, pinned=any(p.data.device.type == "cuda" for p in pieces.values()))
        return take_into(self._buffer[:nbytes], slots, pieces)


def take_into(buffer: Tensor, slots: Sequence[Slot], pieces: Mapping[str, Piece]) -> memoryview:
    """Copy all tensors into `buffer`, [bytes] of uint8 on the CPU; returns the data section.

    Blocks until the tensors may be changed.
    """
    devices = set()
    for slot in slots:
        data = pieces[slot.name].data
        target = buffer[slot.begin : slot.end].view(data.dtype).view(data.shape)
        target.copy_(data.detach(), non_blocking=True)
        if data.device.type == "cuda":
            devices.add(data.device)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return memory_of(buffer) if buffer.numel() else memoryview(b"")


def _make(nbytes: int, *, pinned: bool) -> Tensor:
    if pinned:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)  # a five-hundredth of the page faults
    return torch.frombuffer(memory, dtype=torch.uint8).zero_()
