"""The cache of remote shards: each fetched once, checked, bounded, and not lost to failures or kills."""

from __future__ import annotations

import errno
import pickle
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stream_support import FlakyStore, flip, ids_of, shorten, write_shards

from distdl.data.index import hash_file
from distdl.data.stream import shard_cache, store
from distdl.data.stream.arrival import RemoteShard
from distdl.data.stream.fetcher import Fetcher
from distdl.data.stream.retry import Missing, Patience, Stopped, scrub
from distdl.data.stream.shard_cache import ShardCache
from distdl.data.table.arrow import ArrowTable
from distdl.errors import DataError, EnvironmentProblem

PASSING = [
    ConnectionRefusedError(111, "refused"),
    ConnectionResetError(104, "reset"),
    TimeoutError("slow"),
    OSError(5, "503"),
]


@pytest.fixture(autouse=True)
def _fresh_store() -> Iterator[None]:
    FlakyStore.reset()
    yield
    FlakyStore.reset()


class Ears:
    """What a person hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def patience(self, seconds: float = 10.0) -> Patience:
        return Patience(seconds, self.heard.append)


def partials(cache: ShardCache) -> list[str]:
    return sorted(p.name for p in (cache.folder / "partial").iterdir())


def test_a_shard_is_fetched_once_and_has_the_same_bytes(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "far", 3)
    cache = ShardCache(tmp_path / "near", 10**6)
    for _ in range(2):
        for n, shard in enumerate(shards):
            path = cache.fetch(shard)
            assert hash_file(path) == shard.hash
            assert ids_of(path) == list(range(n * 100, n * 100 + 100))
    assert set(FlakyStore.gets.values()) == {1}
    assert partials(cache) == []
    assert cache.used_bytes() == sum(s.bytes for s in shards)


def test_threads_that_want_the_same_shards_fetch_each_once(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "far", 5)
    caches = [ShardCache(tmp_path / "near", 10**6) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: caches[n % 4].fetch(shards[n % 5]), range(40)))
    assert len(FlakyStore.gets) == 5
    assert set(FlakyStore.gets.values()) == {1}


# --- failures ---


@pytest.mark.parametrize("fault", PASSING, ids=lambda e: type(e).__name__)
def test_what_passes_is_tried_again_and_said_twice(tmp_path: Path, fault: Exception) -> None:
    ears = Ears()
    shard = write_shards(tmp_path / "far", 1)[0]
    FlakyStore.faults.extend([fault, fault])
    path = ShardCache(tmp_path / "near", 10**6, ears.patience()).fetch(shard)
    assert hash_file(path) == shard.hash
    assert FlakyStore.gets.total() == 3
    assert len(ears.heard) == 2
    assert shard.url in ears.heard[0]
    assert "try 3" in ears.heard[1]


def test_a_body_cut_short_is_tried_again(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "far", 1)[0]
    FlakyStore.faults.extend([shorten, shorten, shorten])
    ears = Ears()
    path = ShardCache(tmp_path / "near", 10**6, ears.patience()).fetch(shard)
    assert hash_file(path) == shard.hash
    assert f"{shard.bytes // 2} of {shard.bytes} bytes came" in ears.heard[0]


def test_after_its_time_the_shard_the_tries_and_the_cause_are_named(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "far", 1)[0]
    FlakyStore.faults.extend([ConnectionRefusedError(111, "refused")] * 100)
    cache = ShardCache(tmp_path / "near", 10**6, Ears().patience(0.35))
    with pytest.raises(DataError) as caught:
        cache.fetch(shard)
    for words in (shard.url, "4 tries", "ConnectionRefusedError", "0.35 s"):
        assert words in str(caught.value)
    assert partials(cache) == []
    FlakyStore.faults.clear()
    assert hash_file(cache.fetch(shard)) == shard.hash


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (FileNotFoundError(2, "no such key"), Missing, "404"),
        (PermissionError(13, "no"), DataError, "AWS_ACCESS_KEY_ID"),
    ],
)
def test_what_will_not_pass_is_named_at_once(
    tmp_path: Path, fault: Exception, kind: type[DataError], words: str
) -> None:
    shard = write_shards(tmp_path / "far", 1)[0]
    FlakyStore.faults.append(fault)
    with pytest.raises(kind, match=words) as caught:
        ShardCache(tmp_path / "near", 10**6).fetch(shard)
    assert shard.url in str(caught.value)
    assert FlakyStore.gets.total() == 1


def test_a_bug_is_not_tried_again(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "far", 1)[0]
    FlakyStore.faults.append(TypeError("bug"))
    with pytest.raises(TypeError, match="bug"):
        ShardCache(tmp_path / "near", 10**6).fetch(shard)


def test_waiting_ends_when_it_is_stopped(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "far", 1)[0]
    FlakyStore.faults.extend([TimeoutError("slow")] * 100)
    stop = threading.Event()
    cache = ShardCache(tmp_path / "near", 10**6, Patience(3600, lambda _: stop.set(), stop.is_set))
    with pytest.raises(Stopped):
        cache.fetch(shard)
    assert FlakyStore.gets.total() == 1


def test_a_flipped_bit_on_the_way_is_found_and_the_shard_fetched_once_more(tmp_path: Path) -> None:
    ears = Ears()
    shard = write_shards(tmp_path / "far", 1)[0]
    FlakyStore.faults.append(flip)
    path = ShardCache(tmp_path / "near", 10**6, ears.patience()).fetch(shard)
    assert hash_file(path) == shard.hash
    assert "once more" in ears.heard[0]


def test_a_damaged_shard_is_named_with_both_hashes(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "far", 1)[0]
    file = Path(shard.url.removeprefix("flaky://"))
    flip("", str(file))
    cache = ShardCache(tmp_path / "near", 10**6, Ears().patience())
    with pytest.raises(DataError, match="the same both times") as caught:
        cache.fetch(shard)
    assert f"its hash is {hash_file(file)}, expected {shard.hash}" in str(caught.value)
    assert FlakyStore.gets.total() == 2
    assert partials(cache) == []
    assert list(cache.folder.glob("*.arrow")) == []


@pytest.mark.parametrize("change", [-8, 8])
def test_a_shard_of_another_size_is_named(tmp_path: Path, change: int) -> None:
    shard = write_shards(tmp_path / "far", 1)[0]
    file = Path(shard.url.removeprefix("flaky://"))
    file.write_bytes((file.read_bytes() + bytes(8))[: shard.bytes + change])
    with pytest.raises(DataError, match=f"{shard.bytes}") as caught:
        ShardCache(tmp_path / "near", 10**6, Ears().patience()).fetch(shard)
    assert shard.url in str(caught.value)
    assert FlakyStore.gets.total() == 2


def test_a_cached_file_that_lost_its_end_is_fetched_again(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "far", 1)[0]
    cache = ShardCache(tmp_path / "near", 10**6)
    shorten("", str(cache.fetch(shard)))
    assert hash_file(cache.fetch(shard)) == shard.hash


# --- the bound ---


def test_the_bound_holds_and_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "far", 6)
    bound = 3 * shards[0].bytes
    cache = ShardCache(tmp_path / "near", bound)
    for n, shard in enumerate(shards):
        cache.fetch(shard)
        cache.fetch(shards[0])
        assert cache.used_bytes() <= bound
        assert sum(p.stat().st_size for p in cache.folder.rglob("*.*")) <= bound
        assert len(list(cache.folder.glob("*.arrow"))) == min(n + 1, 3)
    assert FlakyStore.gets["data-00000-of-00006.arrow"] == 1


def test_the_bound_holds_at_every_moment_of_many_threads(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "far", 8)
    bound = 2 * shards[0].bytes + 10
    cache = ShardCache(tmp_path / "near", bound)
    seen: list[int] = []

    def use(n: int) -> bool:
        with cache.hold(shards[n % 8]) as path:
            seen.append(cache.used_bytes())
            return ids_of(path)[0] == n % 8 * 100

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(48)))
    assert max(seen) <= bound


def test_what_is_evicted_while_mapped_can_still_be_read(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "far", 3)
    cache = ShardCache(tmp_path / "near", shards[0].bytes)
    path = cache.fetch(shards[0])
    table = ArrowTable([path], [100])
    table.gather(np.array([0]))
    cache.fetch(shards[1])
    assert not path.exists()
    assert table.gather(np.arange(100))["id"].tolist() == list(range(100))


def test_what_is_held_is_not_evicted(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "far", 3)
    cache = ShardCache(tmp_path / "near", 2 * shards[0].bytes)
    with cache.hold(shards[0]) as path:
        cache.fetch(shards[1])
        cache.fetch(shards[2])
        assert path.exists()


def test_nothing_can_be_evicted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path / "far", 2)
    cache = ShardCache(tmp_path / "near", shards[0].bytes, Ears().patience(0.0))
    monkeypatch.setattr(shard_cache, "_HELD_S", 0.05)
    with cache.hold(shards[0]), pytest.raises(DataError, match="in use"):
        cache.fetch(shards[1])


def test_who_needs_room_waits_for_those_who_fetch(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "far", 2)
    cache = ShardCache(tmp_path / "near", shards[0].bytes + 1)
    begun, go_on = threading.Event(), threading.Event()

    def block(_: str, __: str) -> None:
        begun.set()
        assert go_on.wait(30)

    FlakyStore.faults.append(block)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.fetch, shards[0])
        assert begun.wait(30)
        second = pool.submit(cache.fetch, shards[1])
        assert cache.used_bytes() == shards[0].bytes
        assert not second.done()
        go_on.set()
        first.result(30)
        assert ids_of(second.result(30))[0] == 100
    assert cache.used_bytes() == shards[1].bytes


def test_a_shard_that_never_fits_says_the_least_bound_that_does(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "far", 1)[0]
    with pytest.raises(DataError, match=f"cache_bytes to {shard.bytes} or more"):
        ShardCache(tmp_path / "near", shard.bytes - 1).fetch(shard)
    assert FlakyStore.gets.total() == 0
    ShardCache(tmp_path / "near", shard.bytes).fetch(shard)


def test_a_bound_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected 1 or more"):
        ShardCache(tmp_path, 0)


# --- the disk ---


def test_a_full_disk_is_said_with_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path / "far", 2)
    cache = ShardCache(tmp_path / "near", 10**6)
    cache.fetch(shards[0])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 17))
    with pytest.raises(DataError) as caught:
        cache.fetch(shards[1])
    for words in (
        str(cache.folder),
        str(shards[1].bytes),
        "17 are free",
        "DISTDL_CACHE",
        "hardware.cache_bytes",
    ):
        assert words in str(caught.value)
    assert list(cache.folder.glob("*.arrow")) == []  # it gave up what it could before it gave up


def test_a_disk_that_fills_up_meanwhile_is_not_tried_again(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "far", 1)[0]
    FlakyStore.faults.append(OSError(errno.ENOSPC, "No space left on device"))
    cache = ShardCache(tmp_path / "near", 10**6)
    with pytest.raises(DataError, match="no space"):
        cache.fetch(shard)
    assert FlakyStore.gets.total() == 1
    assert partials(cache) == []


def test_a_folder_that_cannot_be_made_is_the_machines_problem(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "far", 1)[0]
    (tmp_path / "near").write_text("a file")
    with pytest.raises(EnvironmentProblem, match="DISTDL_CACHE"):
        ShardCache(tmp_path / "near", 10**6).fetch(shard)


# --- kills ---

_HANGS = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import stream_support
from pathlib import Path
from distdl.data.stream.shard_cache import ShardCache

def hang(*_):
    print("half way", flush=True)
    threading.Event().wait()

shards = stream_support.write_shards(Path(sys.argv[2]), 2)
stream_support.FlakyStore.faults.append(hang)
ShardCache(Path(sys.argv[3]), 10**6).fetch(shards[0])
"""


def test_a_killed_process_leaves_no_lock_and_its_rest_is_cleared(tmp_path: Path) -> None:
    far, near = tmp_path / "far", tmp_path / "near"
    command = [sys.executable, "-c", _HANGS, str(Path(__file__).parent), str(far), str(near)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        shards = write_shards(far, 2)
        cache = ShardCache(near, shards[0].bytes + 10)
        assert len(partials(cache)) == 2
        assert cache.used_bytes() == shards[0].bytes
        process.kill()
    assert ids_of(cache.fetch(shards[1]))[0] == 100  # there is room for it now
    assert partials(cache) == []
    assert ids_of(cache.fetch(shards[0]))[0] == 0


# --- Parquet ---


def parquet_shard(path: Path, table: pa.Table, local_bytes: int = 0, **options: object) -> RemoteShard:
    pq.write_table(table, path, **options)
    found = store.entry(f"flaky://{path}")
    return RemoteShard(found.url, table.num_rows, found.bytes, None, local_bytes, found.version, "train", 0)


def test_parquet_arrives_as_arrow_that_can_be_gathered(tmp_path: Path) -> None:
    rows = 10_000
    table = pa.table(
        {
            "id": pa.array(range(rows)),
            "text": pa.array([f"w{i % 9}" for i in range(rows)]).dictionary_encode(),
            "list": pa.array([list(range(i % 5)) for i in range(rows)], pa.list_(pa.int16())),
        }
    )
    shard = parquet_shard(tmp_path / "train.parquet", table, row_group_size=1500, compression="zstd")
    cache = ShardCache(tmp_path / "near", 10**7)
    path = cache.fetch(shard)
    with pa.ipc.open_stream(path.read_bytes()) as reader:
        assert all(batch.num_rows <= 4096 for batch in reader)
    got = ArrowTable([path], [rows]).gather(np.arange(rows))
    assert got["id"].tolist() == list(range(rows))
    assert got["text"].tolist() == table["text"].to_pylist()
    assert got["list"].tolist() == table["list"].to_pylist()
    assert partials(cache) == []


def test_parquet_features_give_shapes(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"x": datasets.Array2D((2, 3), "uint8"), "label": datasets.ClassLabel(2)})
    data = datasets.Dataset.from_dict(
        {"x": np.arange(24).reshape(4, 2, 3).tolist(), "label": [0, 1, 1, 0]}, features
    )
    data.to_parquet(str(tmp_path / "train.parquet"))
    found = store.entry(f"flaky://{tmp_path / 'train.parquet'}")
    shard = RemoteShard(found.url, 4, found.bytes, None, 0, found.version, "train", 0)
    path = ShardCache(tmp_path / "near", 10**6).fetch(shard)
    got = ArrowTable([path], [4]).gather(np.array([3, 0]))
    assert got["x"].tolist() == [[[18, 19, 20], [21, 22, 23]], [[0, 1, 2], [3, 4, 5]]]


def test_an_empty_parquet_file_arrives(tmp_path: Path) -> None:
    shard = parquet_shard(tmp_path / "train.parquet", pa.table({"id": pa.array([], pa.int64())}))
    assert ids_of(ShardCache(tmp_path / "near", 10**6).fetch(shard)) == []


def test_parquet_that_swells_says_the_least_bound_that_does(tmp_path: Path) -> None:
    table = pa.table({"id": pa.array([7] * 200_000)})
    shard = parquet_shard(tmp_path / "train.parquet", table, local_bytes=1)
    small = ShardCache(tmp_path / "near", 500_000)
    with pytest.raises(DataError, match=r"Set hardware\.cache_bytes to (\d+) or more") as caught:
        small.fetch(shard)
    assert partials(small) == []
    needed = int(str(caught.value).partition("cache_bytes to ")[2].split()[0])
    whole = ShardCache(tmp_path / "near", needed).fetch(shard)
    assert len(ids_of(whole)) == 200_000
    least = shard.bytes + whole.stat().st_size
    assert least <= needed <= 1.15 * least


def test_a_parquet_file_changed_since_the_opening_is_named(tmp_path: Path) -> None:
    shard = parquet_shard(tmp_path / "train.parquet", pa.table({"id": [1, 2, 3]}))
    pq.write_table(pa.table({"id": [1, 2, 3, 4]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="changed after the dataset was opened"):
        ShardCache(tmp_path / "near", 10**6).fetch(shard)


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    shard = parquet_shard(path, pa.table({"id": range(1000)}))
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    shard = replace(shard, version=store.entry(shard.url).version)
    with pytest.raises(DataError, match="cannot be read through as Parquet"):
        ShardCache(tmp_path / "near", 10**6).fetch(shard)


# --- ahead ---


def test_what_is_wanted_is_there_before_it_is_asked_for(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "far", 5)
    cache = ShardCache(tmp_path / "near", 10**6)
    come = threading.Event()
    FlakyStore.faults.append(lambda *_: None)
    FlakyStore.faults.append(lambda *_: come.set())
    with Fetcher(cache, shards, ahead=2) as fetcher:
        fetcher.want([3, 1, 4, 2])
        assert come.wait(30)
        assert ids_of(fetcher.path(3))[0] == 300
        assert ids_of(fetcher.path(1))[0] == 100
        assert FlakyStore.gets.total() == 2  # 4 and 2 were beyond `ahead`
        assert ids_of(fetcher.path(0))[0] == 0
    assert set(FlakyStore.gets.values()) == {1}


@pytest.mark.parametrize("fit", [1, 2, 3, 5])
@pytest.mark.parametrize("now_listed", [True, False])
def test_what_was_fetched_ahead_is_not_pushed_out_before_its_use(
    tmp_path: Path, fit: int, now_listed: bool
) -> None:
    shards = write_shards(tmp_path / "far", 12)
    cache = ShardCache(tmp_path / "near", fit * shards[0].bytes + 1)
    ids = []
    with Fetcher(cache, shards, ahead=2) as fetcher:
        for n in range(12):
            if now_listed:
                fetcher.want(range(n, 12))
            with fetcher.hold(n) as path:
                ids += ids_of(path)
            if not now_listed:
                fetcher.want(range(n + 1, 12))
    assert ids == list(range(1200))
    assert set(FlakyStore.gets.values()) == {1}


def test_a_failure_ahead_of_time_has_no_effect(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "far", 1)
    failed = threading.Event()

    def fail(*_: str) -> None:
        failed.set()
        raise FileNotFoundError(2, "not yet")

    FlakyStore.faults.append(fail)
    with Fetcher(ShardCache(tmp_path / "near", 10**6), shards) as fetcher:
        fetcher.want([0])
        assert failed.wait(30)
        while fetcher._running:
            threading.Event().wait(0.01)
        assert ids_of(fetcher.path(0))[0] == 0


def test_who_waits_for_a_download_hears_of_its_failure(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "far", 1)
    begun, go_on = threading.Event(), threading.Event()

    def fail(*_: str) -> None:
        begun.set()
        assert go_on.wait(30)
        raise FileNotFoundError(2, "gone")

    FlakyStore.faults.append(fail)
    with Fetcher(ShardCache(tmp_path / "near", 10**6), shards) as fetcher, ThreadPoolExecutor(1) as pool:
        fetcher.want([0])
        assert begun.wait(30)
        waiting = pool.submit(fetcher.path, 0)
        threading.Event().wait(0.05)  # let it begin to wait; if it had not, it would fetch for itself
        go_on.set()
        with pytest.raises(Missing):
            waiting.result(30)
    assert FlakyStore.gets.total() == 1


def test_closing_gives_up_what_is_tried_again_and_again(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "far", 1)
    FlakyStore.faults.extend([TimeoutError("slow")] * 1000)
    heard = threading.Event()
    cache = ShardCache(tmp_path / "near", 10**6, Patience(3600, lambda _: heard.set()))
    fetcher = Fetcher(cache, shards)
    fetcher.want([0])
    assert heard.wait(30)
    fetcher.close()
    fetcher.close()
    assert partials(cache) == []
    with pytest.raises(RuntimeError, match="closed"):
        fetcher.path(0)


def test_cache_and_fetcher_can_be_sent_to_another_process(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "far", 1)
    with Fetcher(ShardCache(tmp_path / "near", 10**6), shards) as fetcher:
        fetcher.want([0])
        with pickle.loads(pickle.dumps(fetcher)) as other:  # noqa: S301
            assert ids_of(other.path(0))[0] == 0


# --- secrets ---


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("ftp://me:secret@host/a", "ftp://host/a"),
        ("GET https://host/a?X-Amz-Signature=abc&b=1 failed", "GET https://host/a failed"),
        ("s3://bucket/a", "s3://bucket/a"),
        ("key 12345678abc is wrong", "key *** is wrong"),
    ],
)
def test_secrets_are_not_shown(text: str, clean: str) -> None:
    assert scrub(text, {"AWS_SECRET_ACCESS_KEY": "12345678abc"}) == clean


def test_a_shard_does_not_show_the_password_in_its_url() -> None:
    shard = RemoteShard("ftp://me:secret@host/a", 1, 1)
    assert "secret" not in f"{shard} {shard.title}"
