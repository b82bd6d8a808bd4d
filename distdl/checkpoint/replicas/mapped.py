"""A file in memory, as a tensor: what is written there is there after this process has died."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

_SHARED = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # all pages at once: far cheaper than one by one


class Mapped:
    """A file of `nbytes` bytes, one at least; `tensor`: [nbytes] of uint8, on the CPU, the file itself.

    The file may be moved and removed while the tensor is used.
    """

    def __init__(self, path: Path, descriptor: int, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self.tensor: Tensor = torch.frombuffer(
            mmap.mmap(descriptor, nbytes, flags=_SHARED), dtype=torch.uint8
        )
        self._registered = False

    @classmethod
    def create(cls, path: Path, nbytes: int) -> Mapped:
        """A new file, for this user alone. Raises OSError: ENOSPC rather than a SIGBUS at a later write."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            return cls(path, descriptor, nbytes)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(descriptor)

    @classmethod
    def attach(cls, path: Path, nbytes: int) -> Mapped:
        """A file that is there. Raises OSError, and ValueError where it is shorter."""
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return cls(path, descriptor, nbytes)
        finally:
            os.close(descriptor)

    def register(self) -> None:
        """Let a GPU write into it without a detour, as into pinned memory. Once is enough."""
        if not self._registered:
            code = torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), self.nbytes, 0)
            self._registered = int(code) == 0
            if not self._registered:
                # Copies are slower then, and just as right; but CUDA would tell the error to who comes next.
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device="cuda")

    def move(self, path: Path) -> None:
        """Give it another name on the same file system. Raises OSError."""
        self.path.rename(path)
        self.path = path

    def remove(self) -> None:
        """Remove the file; the memory goes with the last use of the tensor."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
            self._registered = False
