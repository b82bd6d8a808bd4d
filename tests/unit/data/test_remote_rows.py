"""Rows whose shards are fetched while they are read: the same rows, and no more kept than asked for."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from stream_support import FlakyStore, write_prepared

from distdl.data import ArrowTable, ShardedDataset, describe, ready
from distdl.data.order.kinds import Block, Sequential
from distdl.data.stream.remote_dataset import RemoteDataset
from distdl.data.stream.remote_rows import RemoteRows
from distdl.data.stream.retry import Patience, Stopped
from distdl.errors import DataError

SHARDS, ROWS = 8, 100


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FlakyStore.reset()
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def far(tmp_path: Path) -> RemoteDataset:
    write_prepared(tmp_path / "far", SHARDS, ROWS)
    found = RemoteDataset.open(f"flaky://{tmp_path / 'far'}")
    FlakyStore.reset()
    return found


def rows_of(far: RemoteDataset, fit: int = 3, patience: Patience | None = None) -> RemoteRows:
    """A cache for `fit` shards."""
    bound = fit * max(shard.bytes for shard in far.shards("train"))
    return RemoteRows(far, "train", far.cache(bound, patience=patience))


def deleted_maps(folder: Path) -> int:
    """Maps of this process whose file is gone: disk space that nobody can use."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in line and line.endswith("(deleted)") for line in lines)


def wait_until_here(rows: RemoteRows, numbers: list[int]) -> None:
    for _ in range(500):
        if all(rows._cache.touch(rows._shards[n]) for n in numbers):
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"shards {numbers} did not come")


def test_rows_come_in_any_order_and_evicted_files_keep_no_disk_space(
    tmp_path: Path, far: RemoteDataset
) -> None:
    rows = rows_of(far)
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(0, len(rows), 5)
        found = rows.gather(ids)
        np.testing.assert_array_equal(found["id"], ids)
        np.testing.assert_array_equal(found["image"][:, 0], ids * 31 % 251)
        assert [len(t) for t in found["tokens"].tolist()] == (ids % 7).tolist()
        assert len(rows._table._opened.maps) <= 5  # type: ignore[union-attr]
    rows.gather(np.array([159, 150]))
    rows.gather(np.array([759, 750]))
    assert deleted_maps(tmp_path / "cache") == 0
    rows.close()


def test_threads_that_push_out_each_others_shards_read_right(far: RemoteDataset) -> None:
    rows = rows_of(far, fit=2)

    def read(seed: int) -> bool:
        chance = np.random.default_rng(seed)
        asked = [chance.integers(0, len(rows), 40) for _ in range(25)]
        return all(np.array_equal(rows.gather(ids)["image"][:, 0], ids * 31 % 251) for ids in asked)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    rows.close()


def test_only_what_is_needed_is_fetched(far: RemoteDataset) -> None:
    rows = rows_of(far)
    assert len(rows) == SHARDS * ROWS
    assert rows.columns == ["image", "id", "tokens"]
    assert FlakyStore.gets.total() == 0
    assert rows.gather(np.array([520, 510]))["id"].tolist() == [520, 510]
    assert list(FlakyStore.gets) == ["data-00005-of-00008.arrow"]
    with pytest.raises(DataError, match="no column 'imag'; did you mean 'image'"):
        RemoteRows(far, "train", rows._cache, ["imag"])
    rows.close()


def test_rows_read_in_stored_order_are_followed(far: RemoteDataset) -> None:
    rows = rows_of(far, fit=4)
    rows.gather(np.arange(200, 210))
    wait_until_here(rows, [2, 3, 4])
    assert FlakyStore.gets.total() == 3
    rows.close()


def test_block_order_is_looked_ahead_and_every_shard_comes_once(far: RemoteDataset) -> None:
    rows = rows_of(far, fit=5)
    order = Block(7, [shard.rows for shard in far.shards("train")], window=150)
    seen = []
    for start in range(0, len(rows), 32):
        stop = min(start + 32, len(rows))
        rows.look_ahead(order, 0, start, stop, again=False)
        if start == 0:
            wait_until_here(rows, order.coming(0, 0, 32, 2)[:4])
        seen += rows.gather(order.ids(0, start, stop))["id"].tolist()
    assert sorted(seen) == list(range(len(rows)))
    assert set(FlakyStore.gets.values()) == {1}
    rows.close()


def test_the_next_epoch_is_looked_ahead_to(far: RemoteDataset) -> None:
    rows = rows_of(far, fit=8)
    order = Block(7, [shard.rows for shard in far.shards("train")], window=150)
    rows.look_ahead(order, 0, 790, 800, again=True)
    wait_until_here(rows, order.shards(0, 790, 800))
    rows.look_ahead(order, 0, 790, 800, again=True)
    wait_until_here(rows, order.shards(1, 0, 150)[:1])
    rows.close()
    last = rows_of(far)
    last.look_ahead(Sequential(800), 0, 700, 800, again=True)
    wait_until_here(last, [7, 0])
    last.close()


def test_shards_to_come_are_those_that_the_positions_touch() -> None:
    sizes = [10, 0, 35, 7, 20, 0, 0, 18, 40]
    for window in (1, 4, 25, 1000):
        order = Block(3, sizes, window)
        for start in range(0, order.rows, 7):
            stop = min(start + 9, order.rows)
            coming = order.coming(1, start, stop, 2)
            assert set(order.shards(1, start, stop)) <= set(coming)
            rest = [n for n in order.shards(1, start, order.rows) if sizes[n]]
            assert set(rest[:1]) <= set(coming)
            assert len(coming) == len(set(coming))


def test_a_window_larger_than_the_cache_is_said(far: RemoteDataset) -> None:
    heard: list[str] = []
    rows = rows_of(far, fit=2, patience=Patience(1, heard.append))
    order = Block(7, [shard.rows for shard in far.shards("train")], window=500)
    rows.look_ahead(order, 0, 0, 10)
    rows.look_ahead(order, 0, 10, 20)
    rows.close()
    assert len(heard) == 1
    assert "hardware.cache_bytes" in heard[0]
    assert "data.block_window" in heard[0]


def test_a_stop_ends_the_wait_for_a_server_that_hangs(far: RemoteDataset) -> None:
    stop, hanging, end = threading.Event(), threading.Event(), threading.Event()

    def hang(*_: str) -> None:
        hanging.set()
        assert end.wait(30)

    FlakyStore.faults.append(hang)
    rows = rows_of(far, patience=Patience(3600, lambda _: None, stop.is_set))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(rows.gather, np.array([3]))
        assert hanging.wait(30)
        stop.set()
        with pytest.raises(Stopped):
            waiting.result(5)
    end.set()
    rows.close()


def test_an_outage_is_said_once_and_so_is_its_end(far: RemoteDataset) -> None:
    heard: list[str] = []
    patience = Patience(60, heard.append)
    FlakyStore.faults.extend([TimeoutError("slow")] * 6)
    rows = rows_of(far, fit=6, patience=patience)
    rows.look_ahead(Sequential(800), 0, 0, 100)
    rows.gather(np.arange(0, 300))
    wait_until_here(rows, [0, 1, 2])
    rows.close()
    assert sum("did not come" in text for text in heard) <= 2
    assert "did not come" in heard[0]


def test_waiting_for_another_process_counts_as_trying(far: RemoteDataset) -> None:
    cache = rows_of(far, patience=Patience(0.4, lambda _: None))._cache
    FlakyStore.faults.extend([TimeoutError("slow")] * 100)
    shard = far.shards("train")[0]

    def fetch(_: int) -> str:
        with pytest.raises(DataError) as caught:
            cache.fetch(shard)
        return str(caught.value)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(fetch, range(8)))
    assert sum(" 1 tries in" in text for text in texts) >= 5


def test_another_process_opens_them_again(far: RemoteDataset) -> None:
    rows = rows_of(far, patience=Patience(5, lambda _: None, lambda: False))
    copy = pickle.loads(pickle.dumps(rows))  # noqa: S301 - made above
    assert copy.gather(np.array([301]))["id"].tolist() == [301]
    copy.close()
    rows.close()


def test_by_url_everywhere(tmp_path: Path, far: RemoteDataset) -> None:
    url, folder = f"flaky://{tmp_path / 'far'}", tmp_path / "far"
    assert describe(None, url).remote
    assert describe(None, url).fingerprint == describe(None, folder).fingerprint
    assert ready(None, url).split("train").rows == ready(None, folder).split("train").rows
    near, streamed = ShardedDataset(folder), ShardedDataset(url, cache_bytes=10**6, retry_s=0)
    assert streamed.sequence_columns == near.sequence_columns == ["tokens"]
    ids = np.array([5, 799, 5, 301])
    np.testing.assert_array_equal(streamed.lengths(ids, "tokens"), near.lengths(ids, "tokens"))
    np.testing.assert_array_equal(streamed[ids]["image"], near[ids]["image"])
    streamed.close()
    near.close()


def test_a_table_lets_go_of_what_was_used_longest_ago(tmp_path: Path, far: RemoteDataset) -> None:
    shards, cache = far.shards("train"), far.cache(10**7)
    held: list[int] = []

    def hold(number: int):  # type: ignore[no-untyped-def]
        held.append(number)
        return cache.hold(shards[number])

    table = ArrowTable([s.title for s in shards], [s.rows for s in shards], hold=hold, keep=2, head=1)
    for number in (1, 2, 1, 3, 1, 2):
        assert table.gather(np.array([number * ROWS]))["id"].tolist() == [number * ROWS]
    assert held == [1, 1, 2, 3, 2]  # the first for its columns
    assert sorted(table._opened.maps) == [1, 2]
    assert len(table._opened.starts) == 2
