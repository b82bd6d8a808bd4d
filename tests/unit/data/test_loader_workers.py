"""Worker processes: clear errors, none left behind, no hang."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from distdl.data import ArrayRows, Batch, loader
from distdl.data.table.ragged import Ragged
from distdl.errors import DataError

ROWS = ArrayRows({"id": np.arange(40, dtype=np.int64)})


def fail_at(batch: Batch, key: int, row: int = 17) -> Batch:
    if row in batch["id"]:
        raise ZeroDivisionError(f"row {row} is bad")
    return batch


def shorten(batch: Batch, key: int) -> Batch:
    return {"id": batch["id"][:1]}


def varying(batch: Batch, key: int) -> Batch:
    lengths = np.asarray(batch["id"]) % 5
    return {
        **batch,
        "x": Ragged(np.ones(lengths.sum(), np.float32), lengths),
        "e": np.empty((len(lengths), 0)),
    }


def kill_self(batch: Batch, key: int) -> Batch:
    if 17 in batch["id"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch


def gone(pid: int) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            if (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_a_failing_transform_shows_its_traceback_and_the_rest_goes_on() -> None:
    with loader(ROWS, 10, order="sequential", transform=fail_at, workers=1) as batches:
        assert next(iter(batches))["id"].tolist() == list(range(10))
        with pytest.raises(DataError, match=r"(?s)worker process.*Traceback.*in fail_at.*row 17 is bad"):
            next(iter(batches))
        assert batches.samples == 10
    with (
        loader(ROWS, 10, order="sequential", transform=shorten) as batches,
        pytest.raises(DataError, match="given 10 rows and returned 1 rows"),
    ):
        next(iter(batches))


def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    with loader(ROWS, 10, order="sequential", transform=kill_self, workers=1) as batches:
        steps = iter(batches)
        with pytest.raises(DataError, match=r"was killed by SIGKILL.*memory"):
            list(steps)
        with pytest.raises(DataError, match="was killed by SIGKILL"):
            next(iter(batches))


def test_closing_ends_the_processes_and_they_ignore_stop_signals() -> None:
    with loader(ROWS, 10, transform=varying, workers=2) as batches:
        plain = loader(ROWS, 10, transform=varying, prefetch=0)
        pids = batches._pool.pids
        iterator = iter(batches)
        first = next(iterator)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        for one, other in zip([first, *iterator], plain, strict=True):
            assert one.keys() == other.keys()
            assert all(one[name].equal(other[name]) for name in one)
            assert one["x"].dtype == other["x"].dtype
    assert all(gone(pid) for pid in pids)


def test_what_cannot_be_imported_elsewhere_is_refused_at_once() -> None:
    def inner(batch: Batch, key: int) -> Batch:
        return batch

    for transform in (lambda batch, key: batch, inner, functools.partial(inner)):
        with pytest.raises(DataError, match="top of a module"):
            loader(ROWS, 10, transform=transform, workers=1)
