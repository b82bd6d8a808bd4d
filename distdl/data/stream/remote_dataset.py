"""Datasets read from where they are: opening a folder behind a URL, and the shards in it.

A prepared dataset (a folder with index.json) costs one small file to open. A folder of Parquet files costs a
listing, and of each file the end, which has its footer. Rows come later, shard by shard, through
`distdl.data.stream.shard_cache`.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from distdl.data import folders
from distdl.data.huggingface import as_converted, fields_of
from distdl.data.index import INDEX_FILE, Index, parse_index, resolve
from distdl.data.prepare.readers import check_same_columns
from distdl.data.stream import store
from distdl.data.stream.arrival import RemoteShard
from distdl.data.stream.retry import Missing, Patience, scrub
from distdl.data.stream.shard_cache import ShardCache
from distdl.data.stream.store import Entry
from distdl.errors import DataError, EnvironmentProblem, nearest
from distdl.samples import DataInfo

_TAIL_BYTES = 64 * 1024
"""Read of the end of a Parquet file at first: holds most footers."""
_FOOTER_THREADS = 8


@dataclass(frozen=True)
class RemoteDataset:
    """A dataset behind a URL, as it was when it was opened. Plain data: it can be sent to other processes.

    `index` is None for a folder of Parquet files.
    """

    url: str = field(repr=False)
    info: DataInfo
    index: Index | None
    by_split: Mapping[str, tuple[RemoteShard, ...]]

    @classmethod
    def open(cls, url: str, *, patience: Patience | None = None, cache: Path | None = None) -> RemoteDataset:
        """The dataset in the folder `url`: a path, or s3://, hf://datasets/owner/name, file:// and so on.

        Any process may call it, alone; blocks while the server does not answer (`Patience`). `cache` is where
        it is remembered what stood there (None: `stream_folder()`). Raises DataError, EnvironmentProblem.
        """
        patience = patience or Patience()
        url = store.absolute(url)
        store.require_reachable(url)
        memory = _Memory(url, cache or stream_folder())
        dataset = _open_prepared(url, patience) or _open_parquet(url, patience, memory)
        memory.compare(dataset.fingerprint, patience)
        return dataset

    @property
    def fingerprint(self) -> str:
        """A name for the rows, 32 hex digits; of a prepared dataset the same wherever it lies."""
        return self.info.fingerprint

    def shards(self, split: str) -> tuple[RemoteShard, ...]:
        """The shards of a split in the order of their rows, none of them empty.

        Raises DataError for a split that does not exist or has no rows.
        """
        if split not in self.by_split:
            raise DataError(
                f"the dataset {scrub(self.url)} has no split {split!r}{nearest(split, self.by_split) or '.'} "
                f"Its splits: {', '.join(sorted(self.by_split))}."
            )
        found = tuple(shard for shard in self.by_split[split] if shard.rows)
        if not found:
            raise DataError(f"split {split!r} of {scrub(self.url)} has no rows")
        return found

    def offsets(self, split: str, cache: ShardCache) -> dict[str, Path]:
        """For each sequence column the .npy file (int64 [rows + 1]) that says where its rows begin.

        Fetched once a node, checked, and kept outside the bound of `cache`. Empty for Parquet files, which
        say nothing of lengths. Raises as `ShardCache.fetch`.
        """
        self.shards(split)
        if self.index is None:
            return {}
        parts = self.index.splits[split].offsets
        return {column: cache.fetch_kept(resolve(self.url, o.file), o) for column, o in parts.items()}

    def cache(
        self, max_bytes: int, *, patience: Patience | None = None, folder: Path | None = None
    ) -> ShardCache:
        """The cache of this dataset on this machine: `folder` (None: as in `open`) / fingerprint."""
        return ShardCache((folder or stream_folder()) / self.fingerprint, max_bytes, patience)

    def least_cache_bytes(self, split: str) -> int:
        """The smallest bound under which every shard of a split fits; for Parquet an estimate."""
        return max(shard.needs for shard in self.shards(split))


def stream_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where remote shards are kept on this machine: `$DISTDL_CACHE`/stream, or ~/.cache/distdl/stream."""
    from distdl.data.opening import cache_folder  # opens remote datasets too, and so imports this module

    return cache_folder(environ) / "stream"


def _open_prepared(url: str, patience: Patience) -> RemoteDataset | None:
    where = f"{url}/{INDEX_FILE}"
    try:
        raw = patience.call(f"index {scrub(where)}", lambda: store.read_bytes(where))
    except Missing:
        return None
    try:
        index = parse_index(raw.decode("utf-8"), scrub(where), remote="://" in url)
    except UnicodeDecodeError as error:
        raise DataError(f"{scrub(where)} is damaged: {error}. Copy the dataset there again.") from error
    by_split: dict[str, tuple[RemoteShard, ...]] = {}
    for name, split in index.splits.items():
        found, first = [], 0
        for shard in split.shards:
            place = resolve(url, shard.file)
            found.append(
                RemoteShard(place, shard.rows, shard.bytes, shard.hash, shard.bytes, "", name, first)
            )
            first += shard.rows
        by_split[name] = tuple(found)
    return RemoteDataset(url, replace(index.info(), remote=True), index, by_split)


def _open_parquet(url: str, patience: Patience, memory: _Memory) -> RemoteDataset:
    files = _parquet_files(url, patience, memory)
    with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="distdl-footers") as pool:
        entries = [entry for members in files.values() for entry in members]
        footers = dict(zip(entries, pool.map(lambda e: _read_footer(e, patience), entries), strict=True))
    schema = footers[entries[0]].schema
    by_split: dict[str, tuple[RemoteShard, ...]] = {}
    whole = xxhash.xxh3_128(schema.remove_metadata().to_string().encode())
    for split in sorted(files):
        whole.update(f"{split}:{len(files[split])}\n".encode())
        found, first = [], 0
        for entry in files[split]:
            footer = footers[entry]
            check_same_columns(Path(entry.name), footer.schema, Path(entries[0].name), schema)
            # The etag stays out: a copy of the same file in another store, or in other parts, has another.
            whole.update(f"{footer.rows} {entry.bytes} {footer.hash}\n".encode())
            found.append(
                RemoteShard(
                    entry.url, footer.rows, entry.bytes, None, footer.arrow_bytes, entry.version, split, first
                )
            )
            first += footer.rows
        if not first:
            raise DataError(f"split {split!r} of {scrub(url)} has no rows; leave its files out")
        by_split[split] = tuple(found)
    rows = {split: sum(s.rows for s in shards) for split, shards in by_split.items()}
    fields = fields_of(as_converted(schema))
    info = DataInfo(PurePosixPath(scrub(url)).name, rows, fields, whole.hexdigest(), remote=True)
    return RemoteDataset(url, info, None, by_split)


def _parquet_files(url: str, patience: Patience, memory: _Memory) -> dict[str, list[Entry]]:
    """Split -> its files, by their names, as `distdl.data.folders` does for local folders."""
    seen: list[str] = []
    for folder in (url, f"{url}/data"):
        what = f"listing of {scrub(folder)}"
        try:
            listed = patience.call(what, lambda folder=folder: store.files_of(folder))  # type: ignore[misc]
        except Missing:
            continue
        seen += [entry.name for entry in listed]
        named = {e.name: e for e in listed if e.name.endswith(".parquet") and not e.name.startswith(".")}
        if not named:
            continue
        splits: folders.Splits = {}
        for name in sorted(named):
            splits.setdefault(folders.split_of(Path(name)), []).append(Path(name))
        for split, members in splits.items():
            folders._check_shards(split, members)
        return {split: [named[path.name] for path in members] for split, members in splits.items()}
    memory.must_be_new()
    raise DataError(
        f"no dataset at {scrub(url)}: there is no {INDEX_FILE} and no Parquet file (looked for "
        f"{folders.patterns()}); found {', '.join(seen[:8]) or 'nothing, or no such folder'}. Check the URL, "
        "or copy a dataset made by `distdl data prepare` there."
    )


@dataclass(frozen=True)
class _Footer:
    rows: int
    schema: pa.Schema
    arrow_bytes: int
    hash: str


def _read_footer(entry: Entry, patience: Patience) -> _Footer:
    """What a Parquet file's last bytes say (their length, and "PAR1", are the last 8). Raises DataError."""
    what = f"footer of {scrub(entry.url)}"

    def tail(size: int) -> bytes:
        start = max(entry.bytes - size, 0)
        return patience.call(what, lambda: store.read_bytes(entry.url, start, entry.bytes))

    raw = tail(_TAIL_BYTES) if entry.bytes else b""
    needed = int.from_bytes(raw[-8:-4], "little") + 8 if raw[-4:] == b"PAR1" else 0
    if len(raw) < needed <= entry.bytes:
        raw = tail(needed)
    try:
        with pq.ParquetFile(pa.BufferReader(raw)) as opened:
            meta, schema = opened.metadata, opened.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {scrub(entry.url)} as Parquet: {error}. The file is damaged, cut short or not "
            "Parquet; write it again."
        ) from error
    plain = sum(meta.row_group(n).total_byte_size for n in range(meta.num_row_groups))
    fixed = meta.num_rows * sum(_row_bits(column.type) for column in schema) // 8
    return _Footer(meta.num_rows, schema, max(plain, fixed), xxhash.xxh3_128_hexdigest(raw))


def _row_bits(kind: pa.DataType) -> int:
    """Bits that a row takes at least in Arrow; 0 where that is not known from the type."""
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * _row_bits(kind.value_type)
    try:
        return int(kind.bit_width)
    except ValueError:
        return 0


class _Memory:
    """What stood at a URL when it was last opened from here: tells a lost index from a wrong URL."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._file = folder / "opened" / f"{xxhash.xxh3_128_hexdigest(url.encode())}.json"

    def must_be_new(self) -> None:
        """Raises DataError where a dataset stood here before."""
        if (last := self._last()) is not None:
            raise DataError(
                f"the dataset at {scrub(self._url)} is gone: it was last opened {last['when']}, fingerprint "
                f"{last['fingerprint']}, and now {INDEX_FILE} (or its Parquet files) is not there any more. "
                f"Copy it there again. (If another dataset shall stand there, delete {self._file}.)"
            )

    def compare(self, fingerprint: str, patience: Patience) -> None:
        """Tell a person if this is another dataset than last time, and remember it."""
        last = self._last()
        if last is not None and last["fingerprint"] != fingerprint:
            patience.notice(
                f"the dataset at {scrub(self._url)} has changed since {last['when']}: its fingerprint was "
                f"{last['fingerprint']} and is {fingerprint}"
            )
        if last is None or last["fingerprint"] != fingerprint:
            self._write({"fingerprint": fingerprint, "when": time.strftime("%Y-%m-%d %H:%M:%S %Z")})

    def _last(self) -> Mapping[str, Any] | None:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            return found if {"fingerprint", "when"} <= set(found) else None
        except (OSError, ValueError, TypeError):
            return None  # not there, or cut short by a crash: it only serves to word errors

    def _write(self, found: Mapping[str, Any]) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=self._file.parent, delete=False
            ) as part:
                json.dump(found, part)
            os.replace(part.name, self._file)
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot write {self._file}: {error.strerror or error}. Set DISTDL_CACHE to a folder that "
                "can be written."
            ) from error


__all__ = ["RemoteDataset", "RemoteShard", "stream_folder"]
