"""A background thread that makes the next steps while this one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """`make(step)` for one step after another, computed ahead in one background thread.

    One thread, so `make` need not be thread-safe. What is made ahead and never asked for has no effect, and
    neither has its failure. Call `get` and `close` from one thread.
    """

    def __init__(self, make: Callable[[int], T], depth: int) -> None:
        """`depth` is how many steps are kept ready; 0 makes each when it is asked for, without a thread."""
        if depth < 0:
            raise ValueError(f"depth is {depth}; expected 0 or more steps")
        self._make = make
        self._depth = depth
        self._ahead: deque[tuple[int, Future[T]]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="distdl-prefetch") if depth else None
        self._closed = False

    def get(self, step: int) -> T:
        """`make(step)`: waits for it, or raises what it raised. Starts on the `depth` steps that follow.

        A step out of sequence discards what was made ahead. RuntimeError after `close`.
        """
        if self._closed:
            raise RuntimeError("this Prefetcher is closed")
        if self._pool is None:
            return self._make(step)
        if not self._ahead or self._ahead[0][0] != step:
            self._discard()
        first = self._ahead[-1][0] + 1 if self._ahead else step
        for number in range(first, step + self._depth + 1):
            self._ahead.append((number, self._pool.submit(self._make, number)))
        return self._ahead.popleft()[1].result()

    def close(self) -> None:
        """Drop what was made ahead and wait for the thread to end. May be called again."""
        self._closed = True
        self._discard()
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def _discard(self) -> None:
        while self._ahead:
            self._ahead.popleft()[1].cancel()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
