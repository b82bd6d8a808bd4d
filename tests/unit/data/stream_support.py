"""A store that fails as a test says and counts what it is asked, and small datasets to stream."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from distdl.data.index import Column, Index, Offsets, Shard, Split, hash_file
from distdl.data.prepare.writer import write_stream
from distdl.data.stream.arrival import RemoteShard

Fault = BaseException | Callable[[str, str], None]
"""Raised instead of an answer, or called with (path on the server, local path) after the file was copied."""


class FlakyStore(LocalFileSystem):
    """flaky:///abs/path: local files behind a server that fails on demand. `faults` are used up in order."""

    protocol = "flaky"
    faults: ClassVar[deque[Fault]] = deque()
    gets: ClassVar[Counter[str]] = Counter()
    opened: ClassVar[threading.Event] = threading.Event()

    @classmethod
    def reset(cls) -> None:
        cls.faults.clear()
        cls.gets.clear()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return LocalFileSystem._strip_protocol(path.removeprefix("flaky://"))

    @staticmethod
    def _get_kwargs_from_urls(_: str) -> dict[str, Any]:
        return {}

    def _fault(self, path: str, local: str = "") -> None:
        if self.faults:
            fault = self.faults.popleft()
            if isinstance(fault, BaseException):
                raise fault
            fault(path, local)

    def get_file(self, path: str, local: str, callback: Any = None, **_: Any) -> None:
        name = Path(path).name
        self.gets[name] += 1
        data = Path(path).read_bytes()
        callback.set_size(len(data))
        Path(local).write_bytes(data)
        callback.relative_update(len(data))
        self._fault(path, local)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self.gets[Path(path).name] += 1
        self._fault(path)
        return Path(path).read_bytes()[start:end]


fsspec.register_implementation("flaky", FlakyStore, clobber=True)


def shorten(_: str, local: str) -> None:
    """A body that ended early."""
    data = Path(local).read_bytes()
    Path(local).write_bytes(data[: len(data) // 2])


def flip(_: str, local: str) -> None:
    """One bit wrong on the way."""
    data = bytearray(Path(local).read_bytes())
    data[len(data) // 2] ^= 1
    Path(local).write_bytes(data)


def images(start: int, stop: int) -> pa.Table:
    """Rows start .. stop - 1 of an endless set: an image of 64 bytes that follows from its id, and the id."""
    ids = np.arange(start, stop)
    pixels = ((ids[:, None] * 31 + np.arange(64)) % 251).astype(np.uint8)
    return pa.table(
        {"image": pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 64), "id": pa.array(ids)}
    )


def write_shards(folder: Path, count: int, rows: int = 100) -> list[RemoteShard]:
    """Prepared shards of equal size behind flaky://."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for n in range(count):
        path = folder / f"data-{n:05d}-of-{count:05d}.arrow"
        table = images(n * rows, (n + 1) * rows)
        made = write_stream(path, table.schema, [table])
        found.append(
            RemoteShard(f"flaky://{path}", rows, made.bytes, made.hash, made.bytes, "", "train", n * rows)
        )
    return found


def write_prepared(folder: Path, count: int = 4, rows: int = 100) -> Index:
    """A prepared dataset: split `train` of images with a sequence column `tokens`, and its offsets."""
    (folder / "train" / "offsets").mkdir(parents=True)
    shards, lengths = [], [np.zeros(1, np.int64)]
    for n in range(count):
        table = images(n * rows, (n + 1) * rows)
        tokens = [list(range(i % 7)) for i in range(n * rows, (n + 1) * rows)]
        table = table.append_column("tokens", pa.array(tokens, pa.list_(pa.int32())))
        file = f"train/data-{n:05d}-of-{count:05d}.arrow"
        made = write_stream(folder / file, table.schema, [table])
        shards.append(Shard(file=file, bytes=made.bytes, hash=made.hash, rows=rows))
        lengths.append(made.lengths["tokens"])
    path = folder / "train" / "offsets" / "tokens.npy"
    ends = np.cumsum(np.concatenate(lengths))
    np.save(path, ends)
    offsets = Offsets(
        file="train/offsets/tokens.npy",
        bytes=path.stat().st_size,
        hash=hash_file(path),
        total=int(ends[-1]),
        longest=6,
    )
    index = Index(
        name="small",
        columns={
            "image": Column(dtype="uint8", shape=(64,)),
            "id": Column(dtype="int64"),
            "tokens": Column(dtype="int32", shape=(None,)),
        },
        splits={"train": Split(shards=tuple(shards), offsets={"tokens": offsets})},
    )
    (folder / "index.json").write_text(index.to_json())
    return index


def ids_of(path: Path) -> list[int]:
    """The ids in a local Arrow stream file."""
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as reader:
        return reader.read_all().column("id").to_pylist()
