"""Shards fetched ahead of their use, in background threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from distdl.data.stream.arrival import RemoteShard
from distdl.data.stream.retry import Stopped
from distdl.data.stream.shard_cache import ShardCache

_THREADS = 2
_CLOSE_S = 2.0


class Fetcher:
    """Shards by number, some of them fetched before they are asked for. Safe to use from several threads.

    A download ahead that fails has no effect unless somebody waits for it already: `path` tries again and
    raises. Threads are daemons: a process that dies of an error does not wait for a server. Pickles as its
    arguments; after a fork, make a new one.
    """

    def __init__(self, cache: ShardCache, shards: Sequence[RemoteShard], ahead: int = 2) -> None:
        """`ahead`: how many shards of those wanted are on their way at most; 0 fetches nothing ahead."""
        if ahead < 0:
            raise ValueError(f"ahead is {ahead}; expected 0 or more shards")
        self._arguments = (cache, shards, ahead)
        self._shards = shards
        self._ahead = ahead
        self._closed = threading.Event()
        outer = cache.patience
        patience = replace(outer, stopped=lambda: self._closed.is_set() or outer.stopped())
        self._cache = ShardCache(cache.folder, cache.max_bytes, patience)
        self._changed = threading.Condition()
        self._queue: deque[int] = deque()
        self._current: set[int] = set()
        self._running: dict[int, _Running] = {}
        self._threads: list[threading.Thread] = []
        self._workers = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def want(self, numbers: Iterable[int]) -> None:
        """Fetch the first `ahead` of these that are not here, in the background; replaces what has not begun.

        List them in the order of their use, the one used now first or left out. What would not fit the bound
        beside those before it is not fetched ahead: it would push them out before they are used.
        """
        wanted = self._fitting(list(dict.fromkeys(numbers)))
        with self._changed:
            if self._closed.is_set():
                raise RuntimeError("this Fetcher is closed")
            self._queue = deque(n for n in wanted if n not in self._running)
            while self._workers < min(_THREADS, self._ahead) and self._queue:
                self._start(f"distdl-fetch-{self._workers}", self._work)
                self._workers += 1
            self._changed.notify_all()

    def path(self, number: int) -> Path:
        """Shard `number` as a local Arrow file; blocks. Raises as `ShardCache.fetch`. Map it soon."""
        with self.hold(number) as path:
            return path

    @contextmanager
    def hold(self, number: int) -> Iterator[Path]:
        """`path`, and the file is not evicted inside the `with` block."""
        with self._changed:
            if self._closed.is_set():
                raise RuntimeError("this Fetcher is closed")
            if number in self._queue:
                self._queue.remove(number)  # it is begun at once
            running = self._running.get(number)
            self._current = {number}
            if running is None and not self._cache.touch(self._shards[number]):
                # In a thread of its own: a server that hangs must not keep this one from hearing of a stop.
                running = self._running[number] = _Running()
                self._start(f"distdl-fetch-shard-{number}", lambda: self._fetch(number))
        if running is not None:
            self._wait(running)
        with self._cache.hold(self._shards[number]) as path:
            yield path

    def close(self) -> None:
        """Give up what is being fetched, and wait for the threads: a moment. May be called again.

        A thread that hangs in a connection is left behind; it ends with its time-out, or with the process.
        """
        with self._changed:
            self._closed.set()
            self._queue.clear()
            self._changed.notify_all()
            threads = [*self._threads]
            self._threads.clear()
        end = time.monotonic() + _CLOSE_S
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fitting(self, numbers: list[int]) -> list[int]:
        """The first `ahead` that are not here and fit the bound; those that are here are used soon."""
        missing: list[int] = []
        with self._changed:
            room = self._cache.max_bytes - sum(self._shards[n].needs for n in self._current - {*numbers})
        for number in numbers:
            room -= self._shards[number].needs
            if room < 0 or len(missing) == self._ahead:
                break
            if not self._cache.touch(self._shards[number]):
                missing.append(number)
        return missing

    def _wait(self, running: _Running) -> None:
        while not running.done.wait(0.1):
            if self._cache.patience.stopped():
                raise Stopped
        if running.error is not None:
            raise running.error

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed.is_set():
                    self._changed.wait()
                if self._closed.is_set():
                    return
                number = self._queue.popleft()
                if number in self._running:
                    continue
                self._running[number] = _Running()
            self._fetch(number)

    def _fetch(self, number: int) -> None:
        """Fetch a shard that is noted as running."""
        running = self._running[number]
        try:
            self._cache.fetch(self._shards[number])
        except Exception as error:
            running.error = error
        finally:
            with self._changed:
                del self._running[number]
            running.done.set()

    def _start(self, name: str, target: Callable[[], None]) -> None:
        """Begin a thread. `_changed` is ours."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=target, name=name, daemon=True))
        self._threads[-1].start()


class _Running:
    """A download in a background thread, for those who wait for it."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: Exception | None = None
