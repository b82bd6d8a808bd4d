"""Preparing a dataset: what comes out, whole or not at all, whoever else prepares it at that moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distdl.data.arrow import open_split
from distdl.data.prepare import Prepared, cache_folder, prepare
from distdl.errors import DataError, EnvironmentProblem


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test."""
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "datasets"


def write_ids(folder: Path, **splits: list[int]) -> Path:
    """A dataset with one column `id`; several numbers of rows make several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, shards in splits.items():
        start = 0
        for number, rows in enumerate(shards):
            name = f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
            pq.write_table(pa.table({"id": np.arange(start, start + rows)}), folder / name)
            start += rows
    return folder


def all_ids(prepared: Prepared, split: str = "train") -> list[int]:
    rows = open_split(prepared, split)
    return rows.gather(np.arange(len(rows)))["id"].tolist()


def test_shards_follow_one_another_in_order(tmp_path: Path, cache: Path) -> None:
    prepared = prepare(None, write_ids(tmp_path / "d", train=[5] * 12, test=[2]))
    assert all_ids(prepared) == list(range(60))
    assert all_ids(prepared, "test") == [0, 1]
    assert [p.name for p in cache.iterdir()] == [prepared.info.fingerprint]


def test_hugging_face_datasets_opens_it_too(cache: Path) -> None:
    import datasets

    prepared = prepare("fashion_mnist", None)
    train = datasets.load_from_disk(str(prepared.split_folder("train")))
    assert train.num_rows == 10_000
    assert train.features["label"].names[9] == "Ankle boot"
    assert set(datasets.load_from_disk(str(prepared.folder))) == {"train", "test"}


def test_a_folder_and_a_cache_with_pattern_characters_in_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "ca[ch]e*"))
    assert all_ids(prepare(None, write_ids(tmp_path / "da[t]a ?*", train=[3, 4]))) == list(range(7))


def _run(code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DISTDL_CACHE": str(cache.parent)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_no_network_and_no_noise(tmp_path: Path, cache: Path) -> None:
    folder = write_ids(tmp_path / "d", train=[5])
    code = f"""
import socket
calls = []
def refuse(*given, **named):
    calls.append(given)
    raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from distdl.data.prepare import prepare
prepare(None, {str(folder)!r})
assert not calls, calls
"""
    done = _run(code, cache)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_prepared_dataset_opens_without_importing_datasets(cache: Path) -> None:
    prepare("fashion_mnist", None)
    code = """
import sys
from distdl.data import open_split
from distdl.data.prepare import prepare
print(len(open_split(prepare("fashion_mnist", None), "test")))
assert not {"datasets", "torch"} & set(sys.modules)
"""
    done = _run(code, cache)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2000\n", "")


def test_a_kill_before_the_rename_leaves_nothing_that_counts(tmp_path: Path, cache: Path) -> None:
    folder = write_ids(tmp_path / "d", train=[5])
    code = f"""
import os, signal
from distdl.data import prepare as module
module._publish = lambda built, target: os.kill(os.getpid(), signal.SIGKILL)
module.prepare(None, {str(folder)!r})
"""
    assert _run(code, cache).returncode == -signal.SIGKILL
    (left,) = cache.iterdir()
    assert ".tmp-" in left.name
    prepared = prepare(None, folder)
    assert all_ids(prepared) == list(range(5))
    assert left.exists()

    long_ago = time.time() - 2 * 24 * 3600
    os.utime(left, (long_ago, long_ago))
    prepare(None, write_ids(tmp_path / "other", train=[6]))
    assert not left.exists()


def _prepare_at_once(barrier: multiprocessing.synchronize.Barrier, folder: str) -> None:
    from distdl.data import prepare as module

    publish = module._publish

    def together(built: Path, target: Path) -> None:
        barrier.wait(60)
        publish(built, target)

    module._publish = together
    assert all_ids(module.prepare(None, folder)) == list(range(5))


def test_two_processes_at_once_both_succeed(tmp_path: Path, cache: Path) -> None:
    folder = write_ids(tmp_path / "d", train=[5])
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_prepare_at_once, args=(barrier, str(folder))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(cache.iterdir())) == 1


def test_damage_behind_a_good_footer_is_a_data_error(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    table = pa.table({"id": np.random.default_rng(0).integers(0, 2**60, 10_000)})
    pq.write_table(table, folder / "train.parquet", compression="zstd")
    data = bytearray((folder / "train.parquet").read_bytes())
    data[4:4000] = b"\xff" * 3996
    (folder / "train.parquet").write_bytes(data)
    with pytest.raises(DataError, match="cannot be read through"):
        prepare(None, folder)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_the_machines_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentProblem, match=r"Not a directory.*DISTDL_CACHE"):
        prepare("fashion_mnist", None)


def test_a_split_that_was_lost_is_named(tmp_path: Path, cache: Path) -> None:
    folder = write_ids(tmp_path / "d", train=[5], test=[2])
    prepared = prepare(None, folder)
    (prepared.folder / "test" / "state.json").unlink()
    with pytest.raises(DataError, match="lost its test split; delete that folder"):
        prepare(None, folder)


def test_where_the_cache_lies() -> None:
    assert cache_folder({"DISTDL_CACHE": "/scratch/x"}) == Path("/scratch/x")
    assert cache_folder({}) == Path.home() / ".cache" / "distdl"
    assert cache_folder({"DISTDL_CACHE": ""}) == cache_folder({})
