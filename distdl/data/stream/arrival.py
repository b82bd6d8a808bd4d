"""From a remote shard to a local Arrow stream file: fetched, checked, and converted where it is Parquet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distdl.data.huggingface import array_shape, feature_of, is_image, read_features, with_features
from distdl.data.index import hash_file
from distdl.data.prepare.convert import canonical, fix_lists, require_no_nulls
from distdl.data.prepare.writer import BATCH_BYTES, BATCH_ROWS, write_stream
from distdl.data.stream import store
from distdl.data.stream.retry import CutShort, Patience, TooLong, scrub
from distdl.errors import DataError

_HEAD_BYTES = 4096
"""More than the schema, or the description of a record batch, takes in an Arrow file of usual width."""


@dataclass(frozen=True)
class RemoteShard:
    """A file of a remote dataset with `rows` consecutive rows of `split`, the first of them number `first`.

    `hash` (XXH3-128) is that of a prepared shard, an Arrow stream file; None means Parquet. `bytes` is
    the size on the server, `local_bytes` that of the Arrow file: exact for prepared shards, estimated for
    Parquet. `version` is the server's mark of the contents (an etag) when the dataset was opened, or "".
    """

    url: str = field(repr=False)
    """May hold a user name and password: not for people."""
    rows: int
    bytes: int
    hash: str | None = None
    local_bytes: int = 0
    version: str = ""
    split: str = ""
    first: int = 0

    @property
    def title(self) -> str:
        """What to call it, without secrets."""
        return f"shard {scrub(self.url)}"

    @property
    def needs(self) -> int:
        """Bytes of cache that fetching takes: Parquet stands beside its Arrow file while it is converted."""
        return self.bytes if self.hash is not None else self.bytes + self.local_bytes


def fetch_checked(what: str, url: str, size: int, digest: str, target: Path, patience: Patience) -> None:
    """Fetch a file of known size and XXH3-128 to `target`, and make it durable.

    What came with another size or hash is fetched once more. Raises DataError that says both, and what
    `Patience.call` raises.
    """
    first = _wrong(what, url, size, digest, target, patience)
    if not first:
        return
    patience.notice(f"{what} is not what the index says: {first}. Fetching it once more.")
    again = _wrong(what, url, size, digest, target, patience)
    if again:
        earlier = "the same both times" if again == first else f"the first time {first}"
        raise DataError(
            f"{what} is not what the index says: {again}; {earlier}. The copy on the server is damaged or of "
            "another dataset: run `distdl data verify` on the original, and copy it there again."
        )


def _wrong(what: str, url: str, size: int, digest: str, target: Path, patience: Patience) -> str:
    """Fetch once; in what the file differs from the index, "" if in nothing (it is durable then)."""
    try:
        patience.call(what, lambda: store.download(url, target, size, patience.stopped))
    except TooLong:
        return f"it has more than the {size} bytes expected"
    found = target.stat().st_size
    if found != size:
        return f"it has {found} bytes, expected {size}"
    if (its := hash_file(target)) != digest:
        return f"its hash is {its}, expected {digest}"
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return ""


def fetch_parquet(shard: RemoteShard, target: Path, patience: Patience) -> None:
    """Fetch a Parquet shard as it is. Raises DataError where it changed since the dataset was opened."""

    def fetch() -> None:
        now = store.entry(shard.url)
        if (now.bytes, now.version) != (shard.bytes, shard.version):
            raise DataError(
                f"{shard.title} was changed after the dataset was opened: it has {now.bytes} bytes, version "
                f"{now.version or 'unknown'}; then {shard.bytes}, {shard.version or 'unknown'}. Put the old "
                "file back, or begin a new run."
            )
        store.download(shard.url, target, stopped=patience.stopped)
        if (size := target.stat().st_size) != shard.bytes:
            raise CutShort(f"{size} of {shard.bytes} bytes came")

    patience.call(shard.title, fetch)


def convert_parquet(shard: RemoteShard, source: Path, target: Path, fits: Callable[[int], bool]) -> None:
    """Write the rows of a Parquet file to an uncompressed Arrow stream file; bounded memory.

    `fits` hears how many bytes of rows there are so far, before they are written; from the first False on the
    rest is read, so that it hears the sum, and not written. Raises DataError for a file that cannot be read
    through; OSError with an errno where the disk fails.
    """
    try:
        with pq.ParquetFile(source) as opened:
            if opened.metadata.num_rows != shard.rows:
                raise DataError(
                    f"{shard.title} has {opened.metadata.num_rows} rows, and had {shard.rows} when the "
                    "dataset was opened"
                )
            tables = _converted(shard, opened)
            head = next(tables)
            write_stream(target, head.schema, _fitting(chain([head], tables), fits))
    except (pa.ArrowException, OSError) as error:
        # Arrow reports corrupt data as an OSError without an errno; with one, it is the disk.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{shard.title} cannot be read through as Parquet: {error}. It is damaged; write it again."
        ) from error


def _converted(shard: RemoteShard, opened: pq.ParquetFile) -> Iterator[pa.Table]:
    """At least one table; as many rows in each as make a record batch."""
    row_bytes = max(shard.local_bytes // max(shard.rows, 1), 1)
    rows = min(BATCH_ROWS, max(BATCH_BYTES // row_bytes, 1))
    schema, at, empty = opened.schema_arrow, shard.first, True
    for batch in opened.iter_batches(rows, use_threads=False):
        yield _convert(batch, schema, shard.split, at)
        at, empty = at + batch.num_rows, False
    if empty:
        yield _convert(pa.RecordBatch.from_pylist([], schema=schema), schema, shard.split, at)


def _convert(batch: pa.RecordBatch, schema: pa.Schema, split: str, at: int) -> pa.Table:
    """The same columns in the types that are stored, and the shapes that their features give them."""
    features = read_features(schema)

    def where(row: int) -> str:
        return f"row {at + row} of split {split!r}"

    found: dict[str, pa.Array] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        column, shape = canonical(column), array_shape(features.get(name))
        if shape is not None:
            require_no_nulls(column, name, where)
            column = fix_lists(column, shape, name, where)
        # Nulls elsewhere stay: whoever asks for that column is told.
        found[name] = column
    table = pa.table(found)
    kept = {n: f for n, f in features.items() if is_image(f) or array_shape(f) is None}
    named = {f.name: kept.get(f.name) or feature_of(f.type) for f in table.schema}
    return table.replace_schema_metadata(with_features(table.schema, named).metadata)


def _fitting(tables: Iterator[pa.Table], fits: Callable[[int], bool]) -> Iterator[pa.Table]:
    total = 0
    for table in tables:
        total += _stored_bytes(table)
        if fits(total):
            yield table


def _stored_bytes(table: pa.Table) -> int:
    """Bytes that a table takes in the file, or a little more: a batch may be split, and begins aligned."""
    rows = sum(pa.ipc.get_record_batch_size(batch) + _HEAD_BYTES for batch in table.to_batches())
    return int(rows) + int(table.nbytes) // BATCH_BYTES * 2 * _HEAD_BYTES
