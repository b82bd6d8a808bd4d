"""How many bytes of memory a folder on a tmpfs may still take. Imports no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
RESERVED = 10
"""A tenth of what there is stays free: a tmpfs that takes the last page has some process killed."""


def free_memory(folder: Path) -> int:
    """The least of what the file system of `folder`, the machine and the control group let one take.

    Never negative. Raises OSError where the file system cannot be asked.
    """
    found = os.statvfs(folder)
    return min(found.f_bavail * found.f_frsize, free_ram())


def free_ram() -> int:
    """The least of what the machine and the control group let this process take. Never negative."""
    return max(0, min([*_machine(), *_groups()], default=1 << 62))


def _machine() -> Iterator[int]:
    with contextlib.suppress(OSError, KeyError, ValueError):
        told = _numbers(PROC / "meminfo", 1024)
        yield told["MemAvailable"] - told["MemTotal"] // RESERVED


def _groups() -> Iterator[int]:
    """Of the control group (version 2) of this process and of all above it, what each has left."""
    with contextlib.suppress(OSError):
        for line in (PROC / "self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                inside = CGROUP / line.removeprefix("0::/")
                for group in [inside, *inside.parents]:
                    if group.is_relative_to(CGROUP):
                        yield from _left(group)


def _left(group: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, KeyError, ValueError):  # no limit is the word "max"
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # Pages of files that nobody uses are counted as used, and are given back when memory is short.
        idle = _numbers(group / "memory.stat")["inactive_file"]
        yield limit - used + idle - limit // RESERVED


def _numbers(path: Path, unit: int = 1) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * unit for row in rows}
