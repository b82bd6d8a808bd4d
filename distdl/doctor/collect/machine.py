"""Cores, limits, memory, folders, the clock."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from distdl.checkpoint.replicas.room import free_ram
from distdl.data import cache_folder
from distdl.doctor.collect.software import HERE
from distdl.doctor.facts import Machine

SHM, CPU_MAX = Path("/dev/shm"), Path("/sys/fs/cgroup/cpu.max")
UNLIMITED = 1 << 40


def machine_here(env: Mapping[str, str]) -> Machine:
    """The machine as this process may use it."""
    tmp, cache = Path(env.get("TMPDIR") or "/tmp"), cache_folder(env)
    soft, hard = map(_bounded, resource.getrlimit(resource.RLIMIT_NOFILE))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    cpu_time = resource.getrlimit(resource.RLIMIT_CPU)[0]
    return Machine(
        cores=tuple(sorted(os.sched_getaffinity(0))),
        cpu_quota=_cpu_quota(),
        open_files=soft,
        open_files_hard=hard,
        processes=_bounded(resource.getrlimit(resource.RLIMIT_NPROC)[0]),
        address_space=None if space == resource.RLIM_INFINITY else space,
        cpu_time=None if cpu_time == resource.RLIM_INFINITY else cpu_time,
        share=share_of_a_core(),
        locked_memory=None if locked == resource.RLIM_INFINITY else locked,
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        memory_free=free_ram(),
        shm=_room(SHM)[0],
        shm_free=_room(SHM)[1],
        tmp=str(tmp),
        tmp_error=cannot_write(tmp),
        tmp_free=_room(tmp)[1],
        cache=str(cache),
        cache_error=cannot_write(nearest_folder(cache)),
        clock=time.time(),
        newest_file=max(path.stat().st_mtime for path in HERE.rglob("*.py")),
    )


def share_of_a_core(lasts_s: float = 0.3, times: int = 3) -> float:
    """Of one core, what this process gets when it asks for all of it: the best of a few tries, since
    something always starts just then. Blocks for about a second.
    """
    best = 0.0
    for _ in range(times):
        began, used = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < lasts_s:
            pass
        best = max(best, (time.process_time() - used) / (time.perf_counter() - began))
    return best


def _bounded(limit: int) -> int:
    return UNLIMITED if limit == resource.RLIM_INFINITY else limit


def _cpu_quota() -> float | None:
    """Cores that the control group (version 2) grants; None: all."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = CPU_MAX.read_text().split()
        return int(quota) / int(period)  # no limit is the word "max"
    return None


def _room(folder: Path) -> tuple[int, int]:
    """Bytes in all, bytes free; (0, 0) where there is no such folder."""
    try:
        found = shutil.disk_usage(folder)
    except OSError:
        return 0, 0
    return found.total, found.free


def nearest_folder(path: Path) -> Path:
    """`path`, or of the folders above it the nearest that is there."""
    return next((p for p in (path, *path.parents) if p.exists()), Path("/"))


def cannot_write(folder: Path) -> str | None:
    """Why no file can be made in a folder; None where one can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"doctor")
    except OSError as error:
        return error.strerror or str(error)
    return None
