"""Opening datasets behind URLs: the same rows as from disk, and errors that name what is wrong at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stream_support import FlakyStore, flip, ids_of, images, write_prepared

from distdl import stores
from distdl.data.index import read_index
from distdl.data.stream import hub
from distdl.data.stream.remote_dataset import RemoteDataset
from distdl.data.stream.retry import Patience
from distdl.data.table.arrow import ArrowTable
from distdl.errors import DataError


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))
    FlakyStore.reset()
    yield
    FlakyStore.reset()


def write_parquet(folder: Path, shards: int = 3, rows: int = 50, split: str = "train") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(shards):
        table = images(n * rows, n * rows + rows)
        pq.write_table(table, folder / f"{split}-{n:05d}-of-{shards:05d}.parquet")


def read_all(dataset: RemoteDataset, split: str, near: Path) -> list[int]:
    cache = dataset.cache(10**7, folder=near)
    return [i for shard in dataset.shards(split) for i in ids_of(cache.fetch(shard))]


# --- what is there ---


@pytest.mark.parametrize("form", ["{}", "file://{}", "flaky://{}", "{}/"])
def test_a_prepared_dataset_is_what_its_index_says(tmp_path: Path, form: str) -> None:
    index = write_prepared(tmp_path / "far")
    dataset = RemoteDataset.open(form.format(tmp_path / "far"))
    assert dataset.fingerprint == index.fingerprint == read_index(tmp_path / "far").fingerprint
    assert dict(dataset.info.rows) == {"train": 400}
    assert dataset.info.fields == index.info().fields
    assert dataset.info.remote
    shards = dataset.shards("train")
    assert [s.first for s in shards] == [0, 100, 200, 300]
    assert [(s.rows, s.bytes, s.hash) for s in shards] == [
        (s.rows, s.bytes, s.hash) for s in index.splits["train"].shards
    ]
    assert read_all(dataset, "train", tmp_path / "near") == list(range(400))


def test_offsets_come_once_are_checked_and_stay(tmp_path: Path) -> None:
    write_prepared(tmp_path / "far")
    dataset = RemoteDataset.open(f"flaky://{tmp_path / 'far'}")
    cache = dataset.cache(dataset.least_cache_bytes("train"))
    for _ in range(2):
        found = dataset.offsets("train", cache)
        np.testing.assert_array_equal(
            np.load(found["tokens"]), np.load(tmp_path / "far/train/offsets/tokens.npy")
        )
    assert FlakyStore.gets["tokens.npy"] == 1
    for shard in dataset.shards("train"):
        cache.fetch(shard)
    assert found["tokens"].exists()
    other = dataset.cache(10**6, folder=tmp_path / "other", patience=Patience(5, lambda _: None))
    flip("", str(tmp_path / "far/train/offsets/tokens.npy"))
    with pytest.raises(DataError, match=r"tokens\.npy is not what the index says"):
        dataset.offsets("train", other)


@pytest.mark.parametrize("below", ["", "data"])
def test_a_folder_of_parquet_is_what_its_footers_say(tmp_path: Path, below: str) -> None:
    write_parquet(tmp_path / "far" / below)
    write_parquet(tmp_path / "far" / below, shards=1, rows=7, split="test")
    dataset = RemoteDataset.open(f"flaky://{tmp_path / 'far'}")
    assert dict(dataset.info.rows) == {"train": 150, "test": 7}
    assert dataset.info.fields["image"].shape == (64,)
    assert dataset.info.remote
    assert read_all(dataset, "train", tmp_path / "near") == list(range(150))
    assert dataset.offsets("train", dataset.cache(1)) == {}


def test_rows_gathered_from_remote_shards_equal_those_on_disk(tmp_path: Path) -> None:
    write_parquet(tmp_path / "far")
    dataset = RemoteDataset.open(f"flaky://{tmp_path / 'far'}")
    cache = dataset.cache(10**7)
    shards = dataset.shards("train")
    table = ArrowTable([cache.fetch(s) for s in shards], [s.rows for s in shards])
    ids = np.random.default_rng(0).permutation(150)
    got, expected = table.gather(ids), images(0, 150)
    np.testing.assert_array_equal(got["id"], ids)
    np.testing.assert_array_equal(got["image"], np.stack(expected["image"].to_numpy())[ids])


def test_a_fingerprint_names_the_rows_and_not_their_place(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "data")
    first = RemoteDataset.open(str(tmp_path / "a")).fingerprint
    assert RemoteDataset.open(f"file://{tmp_path / 'b'}").fingerprint == first
    file = tmp_path / "b" / "data" / "train-00001-of-00003.parquet"
    pq.write_table(images(51, 101), file)
    assert RemoteDataset.open(f"file://{tmp_path / 'b'}").fingerprint != first


def test_a_footer_larger_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    wide = pa.table({f"a_column_with_quite_a_long_name_{n:04d}": [1, 2] for n in range(1500)})
    pq.write_table(wide, tmp_path / "far" / "train.parquet")
    dataset = RemoteDataset.open(f"flaky://{tmp_path / 'far'}")
    assert FlakyStore.gets["train.parquet"] == 2
    assert len(dataset.info.fields) == 1500


def test_an_opened_dataset_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    write_prepared(tmp_path / "far")
    dataset = RemoteDataset.open(str(tmp_path / "far"))
    assert pickle.loads(pickle.dumps(dataset)) == dataset  # noqa: S301


def _read_in_child(dataset: RemoteDataset, near: Path, answer: object) -> None:
    answer.put(read_all(dataset, "train", near))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_opens_the_store_for_itself(tmp_path: Path) -> None:
    write_parquet(tmp_path / "far")
    dataset = RemoteDataset.open(f"flaky://{tmp_path / 'far'}")
    parents = dict(stores._stores)
    assert parents
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(dataset, tmp_path / "near", answer))
    child.start()
    assert answer.get() == list(range(150))
    child.join(30)
    assert child.exitcode == 0
    assert stores._stores == parents


# --- what is wrong ---


def test_failures_while_opening_pass(tmp_path: Path) -> None:
    write_prepared(tmp_path / "far")
    FlakyStore.faults.extend([ConnectionResetError(104, "reset")] * 3)
    heard: list[str] = []
    RemoteDataset.open(f"flaky://{tmp_path / 'far'}", patience=Patience(10, heard.append))
    assert len(heard) == 2
    assert "index.json" in heard[0]


def test_nothing_there_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no index\.json and no Parquet file .*found notes\.txt"):
        RemoteDataset.open(str(tmp_path / "far"))
    with pytest.raises(DataError, match="no such folder"):
        RemoteDataset.open(str(tmp_path / "elsewhere"))


def test_an_index_that_was_lost_is_told_from_a_wrong_url(tmp_path: Path) -> None:
    index = write_prepared(tmp_path / "far")
    RemoteDataset.open(str(tmp_path / "far"))
    (tmp_path / "far" / "index.json").unlink()
    with pytest.raises(DataError, match="is gone: it was last opened") as caught:
        RemoteDataset.open(str(tmp_path / "far"))
    assert index.fingerprint in str(caught.value)


def test_another_dataset_at_the_same_place_is_told(tmp_path: Path) -> None:
    write_prepared(tmp_path / "far")
    RemoteDataset.open(str(tmp_path / "far"))
    shutil.rmtree(tmp_path / "far")
    write_prepared(tmp_path / "far", count=2)
    heard: list[str] = []
    for _ in range(2):
        RemoteDataset.open(str(tmp_path / "far"), patience=Patience(1, heard.append))
    assert len(heard) == 1
    assert "has changed" in heard[0]


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    write_prepared(tmp_path / "far")
    file = tmp_path / "far" / "index.json"
    file.write_text(file.read_text().replace('"small"', '"other"'))
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        RemoteDataset.open(str(tmp_path / "far"))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        RemoteDataset.open(str(tmp_path / "far"))


def test_a_missing_parquet_shard_and_other_columns_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "far")
    file = tmp_path / "far" / "train-00001-of-00003.parquet"
    kept = file.read_bytes()
    file.unlink()
    with pytest.raises(DataError, match="not complete"):
        RemoteDataset.open(str(tmp_path / "far"))
    pq.write_table(pa.table({"other": [1]}), file)
    with pytest.raises(DataError, match="train-00001-of-00003"):
        RemoteDataset.open(str(tmp_path / "far"))
    for damage in (b"", kept[:-3], b"no Parquet at all"):
        file.write_bytes(damage)
        with pytest.raises(DataError, match=r"train-00001-of-00003\.parquet as Parquet"):
            RemoteDataset.open(str(tmp_path / "far"))


def test_a_split_without_rows_and_an_unknown_one_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "far", shards=1)
    with pytest.raises(DataError, match="did you mean 'train'"):
        RemoteDataset.open(str(tmp_path / "far")).shards("trian")
    pq.write_table(images(0, 0), tmp_path / "far" / "test.parquet")
    with pytest.raises(DataError, match=r"'test'.* has no rows"):
        RemoteDataset.open(str(tmp_path / "far"))


@pytest.mark.parametrize(
    ("url", "words"), [("nowhere://a/b", "knows no nowhere://"), ("zip://a::s3://b/c.zip", "chains several")]
)
def test_urls_that_cannot_be_streamed_are_refused(url: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        RemoteDataset.open(url)


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(stores, "_stores", {})
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(DataError, match=r"pip install 'distdl\[s3\]'"):
        RemoteDataset.open("s3://bucket/a")


# --- the hub, from a node without internet ---


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_the_hub_is_refused_where_it_is_switched_off(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(DataError, match=f"{name} is set"):
        RemoteDataset.open("hf://datasets/owner/name")


def test_a_hub_out_of_reach_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(DataError, match="cannot be reached from this machine"):
            RemoteDataset.open("hf://datasets/owner/name")


@pytest.mark.parametrize("file", ["/etc/hostname", "file:///etc/hostname", "../x.arrow", "a/../../x", "~/x"])
def test_an_index_behind_a_url_names_files_beside_it_only(tmp_path: Path, file: str) -> None:
    index = write_prepared(tmp_path / "far")
    split = index.splits["train"]
    shards = (split.shards[0].model_copy(update={"file": file}), *split.shards[1:])
    index = index.model_copy(update={"splits": {"train": split.model_copy(update={"shards": shards})}})
    (tmp_path / "far" / "index.json").write_text(index.to_json(), encoding="utf-8")
    with pytest.raises(DataError, match=rf"index\.json names the file '{file}'"):
        RemoteDataset.open(f"file://{tmp_path}/far")
    if file.startswith(("/", "file:")):  # a node's copy of some shards names the others where they are
        assert read_index(tmp_path / "far") == index


def test_nothing_but_an_hf_url_imports_the_hub(tmp_path: Path) -> None:
    write_prepared(tmp_path / "far")
    code = (
        "import sys; from distdl.data.stream.remote_dataset import RemoteDataset; "
        f"RemoteDataset.open({str(tmp_path / 'far')!r}); "
        "import json; unwanted = ('huggingface_hub', 'datasets', 'torch'); "
        "print(json.dumps([m for m in unwanted if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
