"""A folder of Arrow files that came from far away, bounded in size, shared by all processes of a node.

    FOLDER/NAME.arrow       whole shards; the time of last use is the file's mtime
    FOLDER/kept/            small files that stay (offsets); outside the bound
    FOLDER/partial/         what is being fetched, and how much room it was promised (NAME.reserved)
    FOLDER/locks/           one lock a shard, and `space` for the sums; empty files that are never removed

There is no server: processes meet in `flock`, which the kernel lets go of when its holder dies, so a killed
process leaves no lock. What it left in partial/ is removed by the next one that needs room. A shard's lock is
held exclusively while it is fetched and shared while a path to it is held; `space` is taken for moments only,
and whoever has it tries the locks of shards without waiting, so that no circle of waiting can form.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

import xxhash

from distdl.data.index import DataFile
from distdl.data.stream.arrival import RemoteShard, convert_parquet, fetch_checked, fetch_parquet
from distdl.data.stream.locks import POLL_S, Locks
from distdl.data.stream.retry import Patience, scrub
from distdl.errors import DataError, EnvironmentProblem

_FULL = (errno.ENOSPC, errno.EDQUOT)
_HELD_S = 10.0
"""A path that is held should be mapped, and let go, by then."""
_STEP_BYTES = 32 * 2**20
"""The most room that a growing conversion takes ahead; less where it is small, so as not to evict for it."""
_WAYS_OUT = (
    "Free some space, set DISTDL_CACHE to a folder on a larger disk, or lower the bound "
    "(hardware.cache_bytes)."
)


class ShardCache:
    """Shards of one dataset in `folder`, at most `max_bytes` of them. Any number of processes and threads.

    The bound is on the files in the folder, those being fetched included. A file that is evicted while it is
    mapped keeps its disk space until the last map of it is gone, so a reader should let go of maps it is done
    with. Prepared shards never pass the bound; Parquet shards by at most what those being converted at the
    same moment turn out larger than their footers let expect.

    Pickles as its arguments.
    """

    def __init__(self, folder: Path, max_bytes: int, patience: Patience | None = None) -> None:
        """`max_bytes` is the same in all processes that share `folder`. Touches nothing on disk yet."""
        if max_bytes < 1:
            raise DataError(
                f"the cache of shards may hold {max_bytes} bytes (hardware.cache_bytes); expected 1 or more"
            )
        self.folder = folder
        self.max_bytes = max_bytes
        self.patience = patience or Patience()
        self._locks = Locks(folder / "locks", self.patience)

    def fetch(self, shard: RemoteShard) -> Path:
        """The shard as a local Arrow stream file; blocks until it is there. Map it soon: see `hold`.

        Raises DataError (no such shard, it never came, it is damaged, it does not fit, the disk is full),
        EnvironmentProblem (the folder cannot be written) and Stopped.
        """
        with self.hold(shard) as path:
            return path

    @contextmanager
    def hold(self, shard: RemoteShard) -> Iterator[Path]:
        """`fetch`, and the file is not evicted inside the `with` block: time to map it, which keeps it."""
        name = local_name(shard)
        path = self.folder / f"{name}.arrow"
        self._make_folders()
        # Waiting for a process that fetches it counts as trying: ranks that fail one after another would
        # each wait for the whole time, and the others in a collective for all of them.
        patience = replace(self.patience, since=time.monotonic())
        holder = f"{shard.title}: waiting for another process or thread of this machine, which fetches it"
        while True:
            with self._locks.shared(name, holder):
                if _is_whole(path, shard):
                    with suppress(PermissionError):  # a file of another user: its place in the queue stays
                        os.utime(path)
                    yield path
                    return
            with self._locks.exclusive(name):
                if not _is_whole(path, shard):
                    self._bring(shard, name, path, patience)
                    # Held on exclusively: between two locks the file could be evicted again.
                    yield path
                    return

    def touch(self, shard: RemoteShard) -> bool:
        """Whether the shard is here; if so it counts as used now, so that others are evicted first."""
        path = self.folder / f"{local_name(shard)}.arrow"
        if not _is_whole(path, shard):
            return False
        with suppress(OSError):
            os.utime(path)
        return True

    def fetch_kept(self, url: str, file: DataFile) -> Path:
        """A checked file that stays in the folder, outside the bound. Raises as `fetch`."""
        name = f"{_stem(file.file)}-{file.hash[:16]}"
        path = self.folder / "kept" / f"{name}{PurePosixPath(file.file).suffix}"
        self._make_folders()
        with self._locks.exclusive(name):
            if not (path.is_file() and path.stat().st_size == file.bytes):
                partial = self.folder / "partial" / f"{name}.kept.part"
                with self._disk_errors(file.bytes):
                    what = f"file {scrub(url)}"
                    fetch_checked(what, url, file.bytes, file.hash, partial, self.patience)
                    partial.replace(path)
        return path

    def used_bytes(self) -> int:
        """Bytes that count towards the bound now: whole shards, and room promised to those on their way."""
        with self._locks.exclusive("space"):
            return sum(size for _, size, _ in self._whole()) + self._promised()

    def _bring(self, shard: RemoteShard, name: str, path: Path, patience: Patience) -> None:
        """Fetch a shard whose lock is ours."""
        partial = self.folder / "partial"
        arrow, parquet = partial / f"{name}.part", partial / f"{name}.parquet"
        try:
            with self._disk_errors(shard.needs):
                self._remove_partial(name)  # of a process that was killed
                self._reserve(shard, name, shard.needs)
                if shard.hash is not None:
                    fetch_checked(shard.title, shard.url, shard.bytes, shard.hash, arrow, patience)
                else:
                    fetch_parquet(shard, parquet, patience)
                    room = _Growing(self, shard, name)
                    convert_parquet(shard, parquet, arrow, room)
                    room.check()
                self._publish(name, arrow, path)
        finally:
            self._remove_partial(name)

    def _publish(self, name: str, arrow: Path, path: Path) -> None:
        with self._locks.exclusive("space"):
            os.utime(arrow)
            arrow.replace(path)
            self._remove_partial(name)

    def _reserve(self, shard: RemoteShard, name: str, size: int) -> None:
        """Wait until `size` bytes fit beside what others are fetching, and promise them to `name`."""
        if size > self.max_bytes:
            raise too_small(shard, size, self.max_bytes)
        waited_since = time.monotonic()
        while True:
            with self._locks.exclusive("space"):
                if self._make_room(size, self._promised()):
                    self._promise(name, size)
                    return
                if self._promised() > 0:
                    waited_since = time.monotonic()
            if time.monotonic() - waited_since > max(self.patience.total_s, _HELD_S):
                raise DataError(
                    f"{shard.title} needs {size} bytes in {self.folder}, whose bound is {self.max_bytes}, "
                    "and all that is there is in use. Raise the bound (hardware.cache_bytes)."
                )
            self.patience.wait(POLL_S)

    def _grow(self, name: str, size: int) -> None:
        """Promise `size` bytes in all. Does not wait: two that grew could wait for each other for ever."""
        with self._locks.exclusive("space"):
            self._make_room(size, self._promised(besides=name))
            self._promise(name, size)

    def _promise(self, name: str, size: int) -> None:
        (self.folder / "partial" / f"{name}.reserved").write_text(str(size), encoding="utf-8")

    def _make_room(self, size: int, promised: int) -> bool:
        """Evict the least recently used until `size` bytes fit the bound, and the disk. `space` is ours."""
        whole = sorted(self._whole())
        used = promised + sum(each for _, each, _ in whole)
        free = shutil.disk_usage(self.folder).free
        for _, each, path in whole:
            if used + size <= self.max_bytes and size <= free:
                break
            if self._evict(path):
                used -= each
                free = shutil.disk_usage(self.folder).free
        if used + size <= self.max_bytes and size > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        return used + size <= self.max_bytes

    def _evict(self, path: Path) -> bool:
        with self._locks.attempt(path.stem) as ours:
            if ours:
                path.unlink(missing_ok=True)
            return ours

    def _whole(self) -> list[tuple[int, int, Path]]:
        """(last use, bytes, path) of every whole shard."""
        found = []
        for path in self.folder.glob("*.arrow"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return found

    def _promised(self, besides: str = "") -> int:
        """Bytes promised to shards on their way; forgets, and removes, those whose process is gone."""
        total = 0
        for path in self.folder.glob("partial/*.reserved"):
            if path.stem == besides:
                continue
            with self._locks.attempt(path.stem) as abandoned:
                if abandoned:
                    self._remove_partial(path.stem)
                    continue
            with suppress(FileNotFoundError, ValueError):
                total += int(path.read_text(encoding="utf-8"))
        return total

    def _remove_partial(self, name: str) -> None:
        for suffix in ("part", "parquet", "reserved"):
            (self.folder / "partial" / f"{name}.{suffix}").unlink(missing_ok=True)

    def _make_folders(self) -> None:
        try:
            for part in ("locks", "partial", "kept"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
                if not os.access(self.folder / part, os.W_OK):
                    raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise self._unwritable(error) from error

    @contextmanager
    def _disk_errors(self, needed: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise self._unwritable(error) from error
            raise DataError(
                f"no space for shards in {self.folder}: {needed} bytes are needed and "
                f"{shutil.disk_usage(self.folder).free} are free (the bound is {self.max_bytes}). {_WAYS_OUT}"
            ) from error

    def _unwritable(self, error: OSError) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"cannot write the cache of shards {self.folder}: {error.strerror or error}. Set DISTDL_CACHE to "
            "a folder that can be written."
        )


class _Growing:
    """Keeps the promise of room ahead of a conversion that turns out larger than expected."""

    def __init__(self, cache: ShardCache, shard: RemoteShard, name: str) -> None:
        self._cache = cache
        self._shard = shard
        self._name = name
        self._promised = shard.needs
        self._total = 0

    def __call__(self, total: int) -> bool:
        """Whether `total` bytes of Arrow fit beside the Parquet file. Makes room for them."""
        self._total = total
        needed = self._shard.bytes + total
        if needed > self._cache.max_bytes:
            return False
        if needed > self._promised:
            self._promised = min(needed + min(needed // 4, _STEP_BYTES), self._cache.max_bytes)
            self._cache._grow(self._name, self._promised)
        return True

    def check(self) -> None:
        """Raises DataError where it did not fit."""
        needed = self._shard.bytes + self._total
        if needed > self._cache.max_bytes:
            raise too_small(self._shard, needed, self._cache.max_bytes)


def too_small(shard: RemoteShard, needed: int, bound: int) -> DataError:
    """A shard that does not fit even alone."""
    beside = "" if shard.hash is not None else ", its Parquet file included,"
    return DataError(
        f"{shard.title} takes {needed} bytes of cache{beside} and the bound is {bound}. Set "
        f"hardware.cache_bytes to {needed} or more; twice that lets one be fetched while another is read."
    )


def local_name(shard: RemoteShard) -> str:
    """The shard's name in the cache: readable, and another one for other contents. No suffix."""
    whole = f"{shard.split}\n{shard.rows}\n{shard.bytes}\n{shard.hash or (shard.url, shard.version)}"
    return f"{_stem(shard.url)}-{xxhash.xxh3_64_hexdigest(whole.encode())}"


def _stem(file: str) -> str:
    return re.sub(r"[^\w-]", "_", PurePosixPath(scrub(file)).stem)[:80]


def _is_whole(path: Path, shard: RemoteShard) -> bool:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return False
    return shard.hash is None or size == shard.bytes
