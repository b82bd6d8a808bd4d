"""Convert and write the shards of a dataset, in worker processes; each whole shard leaves a record.

What a shard holds depends on its job alone, never on the number of workers or on what ran before a kill.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distdl.data.huggingface import unnest
from distdl.data.prepare.convert import Conversion, size_error
from distdl.data.prepare.readers import Ids, Piece, in_tables, read_ids
from distdl.data.prepare.writer import Written, fsync_path, write_durable, write_stream
from distdl.errors import DataError
from distdl.lifeline import die_with_parent
from distdl.testing.faults import arm_from_environment, point

Count = Callable[[int], None]
"""Told how many more rows are done."""

_POLL_S = 0.2
_rows_done: Synchronized[int] | None = None


@dataclass(frozen=True)
class Job:
    """One shard: rows `ids` of a split of the source, converted into `schema`, written to `target`."""

    number: int
    target: Path
    record: Path
    pieces: tuple[Piece, ...]
    source_split: str
    ids: Ids | range
    conversion: Conversion
    schema: pa.Schema
    batch_rows: int


@dataclass(frozen=True)
class Record:
    """What is known of a shard that is whole. Its row lengths lie beside the record."""

    rows: int
    bytes: int
    hash: str
    cut: int
    lengths: dict[str, str]


def read_record(job: Job) -> Record | None:
    """The record of a shard that an earlier run finished, else None."""
    try:
        record = Record(**json.loads(job.record.read_text(encoding="utf-8")))
        whole = job.target.stat().st_size == record.bytes
    except (OSError, ValueError, TypeError):
        return None
    return (
        record if whole and all((job.record.parent / f).is_file() for f in record.lengths.values()) else None
    )


def read_lengths(job: Job, record: Record, column: str) -> npt.NDArray[np.int64]:
    """Row lengths of a sequence column in a shard, int64 [rows]."""
    found: npt.NDArray[np.int64] = np.load(job.record.parent / record.lengths[column], allow_pickle=False)
    return found


def make_shard(job: Job, count: Count) -> Record:
    """Write one shard and then its record, both durable. Raises DataError and OSError."""
    point("prepare.shard", job.number)
    cut = 0

    def converted() -> Iterator[pa.Table]:
        nonlocal cut
        at = 0
        for table in in_tables(read_ids(job.pieces, job.ids, job.conversion.columns), job.batch_rows):
            found, shortened = job.conversion.apply(table, job.ids[at : at + len(table)], job.source_split)
            _check_schema(job, found.schema, at)
            yield found.replace_schema_metadata(job.schema.metadata)
            at += len(table)
            cut += shortened
            count(len(table))

    partial = job.target.with_name(f"{job.target.name}.part")
    written = write_stream(partial, job.schema, converted())
    if written.rows != len(job.ids):
        raise DataError(
            f"split {job.source_split!r} has {written.rows} rows where {len(job.ids)} were found at first; "
            "was its source changed meanwhile? Run the command again."
        )
    point("prepare.shard_written", job.number)
    partial.replace(job.target)
    fsync_path(job.target.parent)
    record = Record(written.rows, written.bytes, written.hash, cut, _save_lengths(job, written))
    write_durable(job.record, json.dumps(asdict(record)))
    point("prepare.shard_recorded", job.number)
    return record


def _save_lengths(job: Job, written: Written) -> dict[str, str]:
    names = {}
    for number, (column, lengths) in enumerate(written.lengths.items()):
        names[column] = f"{job.record.stem}-{number}.npy"
        with (job.record.parent / names[column]).open("wb") as file:
            np.save(file, lengths)
            file.flush()
            os.fsync(file.fileno())
    return names


def _check_schema(job: Job, found: pa.Schema, at: int) -> None:
    for expected in job.schema:
        kind = found.field(expected.name).type
        if kind == expected.type:
            continue
        here = f"row {job.ids[at]} of split {job.source_split!r}"
        if expected.name in job.conversion.pictures:
            raise size_error(expected.name, unnest(expected.type)[0], "the first rows", unnest(kind)[0], here)
        raise DataError(
            f"column {expected.name!r} has type {kind} from {here} on, and {expected.type} in the first rows"
        )


def run_jobs(jobs: Sequence[Job], workers: int, count: Count) -> None:
    """Make all of `jobs`; the first error ends it. `workers` 1: in this process.

    Raises what `make_shard` raises, and DataError where a worker was killed.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            make_shard(job, count)
        return
    # Not forked: a fork would copy the threads' locks of Arrow and tokenizers in whatever state they are.
    context = multiprocessing.get_context("spawn")
    total = context.Value("q", 0)
    seen = 0
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _begin_worker, (total,)) as pool:
        futures: set[Future[Any]] = {pool.submit(_work, job) for job in jobs}
        try:
            while futures:
                done, futures = wait(futures, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                count(total.value - seen)
                seen = total.value
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps for lack of memory. Run the same command again: it "
                "goes on where it stopped; fewer --workers need less memory."
            ) from error
        finally:
            for future in futures:
                future.cancel()


def _begin_worker(total: Synchronized[int]) -> None:
    global _rows_done
    die_with_parent()
    # One process a core is enough; the library would start as many threads in each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    arm_from_environment(0)
    _rows_done = total


def _work(job: Job) -> None:
    def count(rows: int) -> None:
        assert _rows_done is not None
        with _rows_done.get_lock():
            _rows_done.value += rows

    make_shard(job, count)
