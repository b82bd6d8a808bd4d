"""Worker processes for transforms that take long in Python, such as decoding images.

A worker maps the dataset itself, gathers the rows it is asked for, transforms them and sends them back
through a pipe. It holds no state, so that the results do not depend on the number of workers. Gathering alone
is faster in the loader's own process: moving a batch costs more than that.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import get_context, util
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from distdl.data.table.rows import Batch, Rows
from distdl.errors import DataError
from distdl.lifeline import die_with_parent

_LEAVE = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Sent to whole process groups: the loader's process decides what they mean, and then closes its workers."""


class Workers:
    """`count` processes that gather rows and transform them. `submit` and `close` from one thread at a time.

    Raises DataError where `rows` or `transform` cannot be sent to another process.
    """

    def __init__(self, rows: Rows, transform: Callable[[Batch, int], Batch], count: int) -> None:
        payload = _payload(rows, transform)
        self._workers = [_Worker(payload, number) for number in range(count)]
        for worker in self._workers:  # started side by side, and waited for together
            worker.begin()
        # Before multiprocessing's own clean-up at exit, which would ask with a signal that workers ignore.
        self._end = util.Finalize(self, _end, args=(self._workers,), exitpriority=100)

    def submit(self, ids: npt.NDArray[np.int64], key: int) -> Future[Batch]:
        """Rows `ids`, transformed with `key`; the least busy worker does it.

        The future raises DataError with the worker's traceback where the transform fails, and where a worker
        ends unasked.
        """
        return min(self._workers, key=lambda worker: worker.busy).submit(ids, key)

    @property
    def pids(self) -> list[int]:
        """Process ids, for people and tests."""
        return [worker.pid for worker in self._workers]

    def close(self) -> None:
        """End the processes. May be called again."""
        self._end()


class _Worker:
    """The loader's side of one process: a thread reads its answers, which come in the order of the jobs."""

    def __init__(self, payload: bytes, number: int) -> None:
        context = get_context("forkserver")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, payload), name=f"distdl-data-{number}", daemon=True
        )
        self._process.start()
        theirs.close()
        self.pid = self._process.pid or 0
        self._lock = threading.Lock()
        self._waiting: deque[Future[Batch]] = deque()
        self._gone: DataError | None = None
        self._closing = False
        self._reader = threading.Thread(target=self._read, name=f"distdl-data-{number}", daemon=True)

    def begin(self) -> None:
        """Wait until the process lets stop signals pass, so that none ends it from then on."""
        with contextlib.suppress(EOFError, OSError):  # it is gone: the reader says so
            self._connection.recv_bytes()
        self._reader.start()

    @property
    def busy(self) -> int:
        """Jobs not answered yet."""
        return len(self._waiting)

    def submit(self, ids: npt.NDArray[np.int64], key: int) -> Future[Batch]:
        future: Future[Batch] = Future()
        future.set_running_or_notify_cancel()  # a job once sent is always answered
        with self._lock:
            if self._gone is not None:
                future.set_exception(self._gone)
                return future
            self._waiting.append(future)
        with contextlib.suppress(OSError):  # it is gone: the reader says so
            self._connection.send((ids, key))
        return future

    def end(self) -> None:
        """Kill the process: it holds nothing that could be lost."""
        self._closing = True
        self._process.kill()
        self._process.join()
        if threading.current_thread() is not self._reader:  # the garbage collector runs in any thread
            self._reader.join()
        self._connection.close()
        self._process.close()

    def _read(self) -> None:
        try:
            while True:
                ok, value = _receive(self._connection)
                future = self._waiting.popleft()
                if ok:
                    future.set_result(value)
                else:
                    future.set_exception(DataError(f"a worker process of the data loader failed:\n{value}"))
        except (EOFError, OSError):
            self._lost()

    def _lost(self) -> None:
        if not self._closing:
            self._process.join(5)
        error = DataError(f"worker process {self.pid} of the data loader {_how(self._process.exitcode)}")
        with self._lock:
            self._gone = error
            while self._waiting:
                self._waiting.popleft().set_exception(error)


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = "; the kernel does that when memory runs out: use fewer workers" if -code == 9 else ""
        return f"was killed by {name}{memory}"
    return f"ended unasked with exit code {code}"


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()


def _payload(rows: Rows, transform: Callable[[Batch, int], Batch]) -> bytes:
    try:
        pickle.dumps(transform)
    except Exception as error:
        raise DataError(
            f"workers > 0 needs a transform that another process can import, and {transform!r} cannot be: "
            f"{error}. Define it with `def` at the top of a module (a lambda, or a function inside "
            "a function, will not do; functools.partial of one at the top will), or use workers=0."
        ) from error
    try:
        return pickle.dumps((rows, transform))
    except Exception as error:
        raise DataError(f"workers > 0 needs rows that can be sent to another process: {error}") from error


def _serve(connection: Connection, payload: bytes) -> None:
    """The worker process: answer jobs until the loader is gone."""
    for number in _LEAVE:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEAVE)
    die_with_parent(init_is_fine=True)
    with contextlib.suppress(OSError):
        connection.send_bytes(b"ready")
    problem, rows, transform = None, None, None
    try:
        rows, transform = pickle.loads(payload)  # noqa: S301 - made by our own process
    except BaseException:
        problem = traceback.format_exc()
    with contextlib.suppress(EOFError, OSError):
        while True:
            ids, key = connection.recv()
            _send(connection, (False, problem) if problem else _answer(rows, transform, ids, key))
    os._exit(0)


def _answer(rows: Any, transform: Any, ids: npt.NDArray[np.int64], key: int) -> tuple[bool, Any]:
    from distdl.data.loading.microbatches import transformed

    try:
        return True, transformed(transform, rows.gather(ids), key)
    except DataError as error:
        return False, str(error)
    except Exception:
        return False, traceback.format_exc()


def _send(connection: Connection, message: tuple[bool, Any]) -> None:
    """Arrays go as they lie in memory, behind a short header."""
    buffers: list[pickle.PickleBuffer] = []
    try:
        header = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    except Exception:
        buffers.clear()
        header = pickle.dumps((False, f"what the transform returned:\n{traceback.format_exc()}"))
    raw = [buffer.raw() for buffer in buffers]
    connection.send([part.nbytes for part in raw])
    connection.send_bytes(header)
    for part in raw:
        if part.nbytes:
            connection.send_bytes(part)


def _receive(connection: Connection) -> tuple[bool, Any]:
    sizes = connection.recv()
    header = connection.recv_bytes()
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        if buffer:
            connection.recv_bytes_into(buffer)
    try:
        answer: tuple[bool, Any] = pickle.loads(header, buffers=buffers)  # noqa: S301 - our own process
    except Exception:
        return False, f"what the transform returned cannot be read here:\n{traceback.format_exc()}"
    return answer
