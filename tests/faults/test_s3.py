"""Streaming from a real S3-compatible server: the same rows as from disk, whatever happens to the server."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distdl import stores
from distdl.data.index import Column, Index, Shard, Split, hash_file
from distdl.data.prepare.writer import write_stream
from distdl.data.stream.fetcher import Fetcher
from distdl.data.stream.remote_dataset import RemoteDataset
from distdl.data.stream.retry import Missing, Patience
from distdl.errors import DataError
from tests.s3_server import BUCKET, S3Server, s3_server

pytestmark = pytest.mark.slow

SHARDS, ROWS = 6, 500


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server(tmp_path / "s3") as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))
        # The address of the store is read when it is opened, and each test has another.
        monkeypatch.setattr(stores, "_stores", {})
        yield running


def table_of(number: int) -> pa.Table:
    ids = np.arange(number * ROWS, (number + 1) * ROWS)
    pixels = ((ids[:, None] * 31 + np.arange(256)) % 251).astype(np.uint8)
    return pa.table(
        {"image": pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 256), "id": pa.array(ids)}
    )


@pytest.fixture
def prepared(tmp_path: Path, server: S3Server) -> str:
    """URL of a prepared dataset on the server; a copy is in tmp_path / "local"."""
    folder = tmp_path / "local"
    (folder / "train").mkdir(parents=True)
    shards = []
    for n in range(SHARDS):
        file = f"train/data-{n:05d}-of-{SHARDS:05d}.arrow"
        made = write_stream(folder / file, table_of(n).schema, [table_of(n)])
        shards.append(Shard(file=file, bytes=made.bytes, hash=made.hash, rows=ROWS))
    columns = {"image": Column(dtype="uint8", shape=(256,)), "id": Column(dtype="int64")}
    index = Index(name="images", columns=columns, splits={"train": Split(shards=tuple(shards))})
    (folder / "index.json").write_text(index.to_json())
    return server.upload(folder, "prepared")


def rows_of(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as reader:
        return reader.read_all()


def impatient(seconds: float = 30.0) -> Patience:
    return Patience(seconds, lambda _: None)


def test_a_prepared_dataset_streams_as_it_is_on_disk(tmp_path: Path, server: S3Server, prepared: str) -> None:
    far, near = RemoteDataset.open(prepared), RemoteDataset.open(str(tmp_path / "local"))
    assert far.fingerprint == near.fingerprint
    cache = far.cache(10**8)
    for _ in range(2):
        for n, shard in enumerate(far.shards("train")):
            path = cache.fetch(shard)
            assert rows_of(path).equals(table_of(n))
            assert hash_file(path) == shard.hash
    gets = {key: count for key, count in server.requests().items() if key.endswith(".arrow")}
    assert len(gets) == SHARDS
    assert set(gets.values()) == {1}


def test_a_parquet_folder_streams_as_it_is_on_disk(tmp_path: Path, server: S3Server) -> None:
    folder = tmp_path / "parquet"
    folder.mkdir()
    for n in range(3):
        pq.write_table(table_of(n), folder / f"train-{n:05d}-of-00003.parquet", row_group_size=100)
    url = server.upload(folder, "parquet/data").removesuffix("/data")
    dataset = RemoteDataset.open(url)
    assert dataset.fingerprint == RemoteDataset.open(str(folder)).fingerprint
    assert all(len(shard.version) == 32 for shard in dataset.shards("train"))  # the etag
    cache = dataset.cache(10**8)
    for n, shard in enumerate(dataset.shards("train")):
        assert rows_of(cache.fetch(shard)).column("id").equals(table_of(n).column("id"))
    assert set(server.requests().values()) == {1} | {server.requests()[f"/{BUCKET}"]}


def test_a_server_killed_and_started_again_loses_nothing(server: S3Server, prepared: str) -> None:
    dataset = RemoteDataset.open(prepared)
    shards = dataset.shards("train")
    noticed = threading.Event()
    heard: list[str] = []

    def notice(text: str) -> None:
        heard.append(text)
        noticed.set()

    def restart() -> None:
        assert noticed.wait(60)
        server.start()

    order = [4, 1, 5, 0, 3, 2]
    cache = dataset.cache(2 * shards[0].bytes, patience=Patience(60, notice))
    ids: list[int] = []
    helper = threading.Thread(target=restart)
    helper.start()
    with Fetcher(cache, shards) as fetcher:
        for at, number in enumerate(order):
            if at == 2:
                server.kill()
            fetcher.want(order[at + 1 :])
            with fetcher.hold(number) as path:
                ids += rows_of(path).column("id").to_pylist()
    helper.join()
    assert ids == [i for n in order for i in range(n * ROWS, (n + 1) * ROWS)]
    assert "did not come" in heard[0]
    assert any("came at try" in text for text in heard)


def test_a_server_that_stays_away_ends_in_an_error_that_names_the_shard(
    server: S3Server, prepared: str
) -> None:
    dataset = RemoteDataset.open(prepared)
    shard = dataset.shards("train")[2]
    server.kill()
    with pytest.raises(DataError, match=r"data-00002-of-00006\.arrow did not come: \d+ tries in ") as caught:
        dataset.cache(10**8, patience=impatient(0.5)).fetch(shard)
    assert "S3RVER" not in str(caught.value)
    with pytest.raises(DataError, match=r"index\.json did not come"):
        RemoteDataset.open(prepared, patience=impatient(0.5))


def test_a_server_that_hangs_is_waited_for(
    server: S3Server, prepared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "READ_S", 0.5)
    dataset = RemoteDataset.open(prepared)
    heard: list[str] = []

    def notice(text: str) -> None:
        heard.append(f"{time.monotonic() - began:.1f} s: {text}")
        server.pause(False)

    server.pause(True)
    began = time.monotonic()
    path = dataset.cache(10**8, patience=Patience(60, notice)).fetch(dataset.shards("train")[0])
    assert rows_of(path).equals(table_of(0))
    assert "imed out" in heard[0] or "imeout" in heard[0]
    # One time-out, not the five that s3fs would wait in silence: 2.5 s and pauses between them.
    assert float(heard[0].split()[0]) < 2.5


def test_missing_objects_are_named_at_once(server: S3Server, prepared: str) -> None:
    dataset = RemoteDataset.open(prepared)
    server.remove("prepared/train/data-00003-of-00006.arrow")
    cache = dataset.cache(10**8, patience=impatient(3600))
    with pytest.raises(Missing, match=r"data-00003-of-00006\.arrow is not there"):
        cache.fetch(dataset.shards("train")[3])
    server.remove("prepared/index.json")
    with pytest.raises(DataError, match="is gone"):
        RemoteDataset.open(prepared, patience=impatient(3600))
    with pytest.raises(DataError, match="no dataset at s3://nobody/nothing"):
        RemoteDataset.open("s3://nobody/nothing", patience=impatient(3600))


def test_wrong_credentials_are_named_at_once(
    server: S3Server, prepared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody-it-knows")
    monkeypatch.setattr(stores, "_stores", {})
    with pytest.raises(DataError, match="Check the credentials") as caught:
        RemoteDataset.open(prepared, patience=impatient(3600))
    assert "nobody-it-knows" not in str(caught.value)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_object_is_found(tmp_path: Path, server: S3Server, prepared: str, damage: str) -> None:
    local = tmp_path / "local" / "train" / "data-00001-of-00006.arrow"
    data = bytearray(local.read_bytes())
    data[len(data) // 2] ^= 16
    local.write_bytes(data if damage == "flip" else data[:-100])
    server.upload(tmp_path / "local", "prepared")
    dataset = RemoteDataset.open(prepared)
    shard = dataset.shards("train")[1]
    with pytest.raises(DataError, match="is not what the index says") as caught:
        dataset.cache(10**8, patience=impatient()).fetch(shard)
    expected = (
        [hash_file(local), str(shard.hash)] if damage == "flip" else [f"{len(data) - 100}", f"{shard.bytes}"]
    )
    assert all(words in str(caught.value) for words in expected)


def _fetch_in_child(dataset: RemoteDataset, answer: Any) -> None:
    paths = [dataset.cache(10**8, patience=impatient(0.0)).fetch(s) for s in dataset.shards("train")]
    answer.put([rows_of(p).column("id")[0].as_py() for p in paths])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_connections_of_its_own(server: S3Server, prepared: str) -> None:
    dataset = RemoteDataset.open(prepared)
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=_fetch_in_child, args=(dataset, answer))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answer.get() == [n * ROWS for n in range(SHARDS)]


_READER = """
import json, sys
import pyarrow as pa
from distdl.data.stream.fetcher import Fetcher
from distdl.data.stream.remote_dataset import RemoteDataset

dataset = RemoteDataset.open(sys.argv[1])
shards = dataset.shards("train")
ids = []
with Fetcher(dataset.cache(10**8), shards) as fetcher:
    sys.stdin.readline()
    for n in range(len(shards)):
        fetcher.want(range(n + 1, len(shards)))
        with fetcher.hold(n) as path, pa.memory_map(str(path)) as mapped:
            ids += pa.ipc.open_stream(mapped).read_all().column("id").to_pylist()
print(json.dumps(ids == list(range(len(ids)))), len(ids))
"""


def test_two_processes_fetch_every_object_once(server: S3Server, prepared: str) -> None:
    command = [sys.executable, "-c", _READER, prepared]
    readers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for reader in readers:  # both begin at once
        assert reader.stdin is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
    answers = [reader.communicate(timeout=120)[0].split() for reader in readers]
    assert answers == [["true", str(SHARDS * ROWS)]] * 2
    gets = {key: count for key, count in server.requests().items() if key.endswith(".arrow")}
    assert len(gets) == SHARDS
    assert set(gets.values()) == {1}
