"""A small disk of one's own: a tmpfs that this process alone sees, as root or through a user namespace."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096
# sched.h and sys/mount.h
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1 << 5, 1 << 14, 1 << 18


def own_mounts() -> None:
    """Give this process, of one thread, mounts that end with it. Raises OSError where that is not allowed."""
    uid, gid = os.getuid(), os.getgid()
    try:
        _call("unshare", _CLONE_NEWNS)
    except PermissionError:
        _call("unshare", _CLONE_NEWNS | _CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)


class SmallDisk:
    """A tmpfs at `place`, of ample size at first."""

    _AMPLE = 1 << 16

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(exist_ok=True)
        self._mount(0, self._AMPLE, self._AMPLE)
        (place / "occupied").write_bytes(b"x")  # to a tmpfs a limit of 0 is none

    def leave(self, pages: int = _AMPLE, inodes: int = _AMPLE) -> None:
        """Leave room for so much more: pages of 4096 bytes, and files and directories."""
        now = os.statvfs(self.place)
        self._mount(_MS_REMOUNT, now.f_blocks - now.f_bfree + pages, now.f_files - now.f_ffree + inodes)

    def _mount(self, flags: int, blocks: int, inodes: int) -> None:
        options = f"nr_blocks={blocks},nr_inodes={inodes}".encode()
        _call("mount", b"tmpfs", os.fsencode(self.place), b"tmpfs", flags, options)


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` at `place` that other processes see too; skips where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs that others see needs root")
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
