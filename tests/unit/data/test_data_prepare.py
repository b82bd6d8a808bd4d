"""Preparing a dataset: what comes out, whole or not at all, whoever else prepares it at that moment."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distdl.data.index import INDEX_FILE, read_index
from distdl.data.info import describe
from distdl.data.opening import Ready, cache_folder, open_split, ready
from distdl.data.prepare.inspect import verify
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.errors import DataError, EnvironmentProblem
from distdl.testing.faults import InjectedFault, fail_at


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test."""
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "datasets"


def write_ids(folder: Path, **splits: list[int]) -> Path:
    """A dataset with columns `id` and `words`; several numbers of rows make several files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, shards in splits.items():
        start = 0
        for number, rows in enumerate(shards):
            name = f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
            ids = np.arange(start, start + rows)
            words = pa.array([[int(i)] * (int(i) % 4) for i in ids], pa.list_(pa.int32()))
            pq.write_table(pa.table({"id": ids, "words": words}), folder / name)
            start += rows
    return folder


def all_ids(found: Ready, split: str = "train") -> list[int]:
    rows = open_split(found, split, ["id"])
    return [int(i) for i in rows.gather(np.arange(len(rows)))["id"]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 2)])
def test_a_held_out_image_keeps_its_label(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Rows are chosen from slices of batches, of which Arrow's own `take` gives others."""
    rows = 3000
    column = pa.array(np.repeat(np.arange(rows, dtype=np.int32), np.prod(shape)))
    for length in reversed(shape):
        column = pa.FixedSizeListArray.from_arrays(column, length)
    (tmp_path / "in").mkdir()
    table = pa.table({"image": column, "label": np.arange(rows)})
    pq.write_table(table, tmp_path / "in" / "train.parquet", row_group_size=1100)
    prepare(
        str(tmp_path / "in"), tmp_path / "out", Options(shards=3, holdout={"validation": 0.2, "test": 0.3})
    )
    found = ready(None, tmp_path / "out")
    labels = []
    for split in ("train", "validation", "test"):
        opened = open_split(found, split)
        batch = opened.gather(np.arange(len(opened)))
        first = np.asarray(batch["image"]).reshape(len(opened), -1)
        assert (first == np.asarray(batch["label"])[:, None]).all(), split
        labels += np.asarray(batch["label"]).tolist()
    assert sorted(labels) == list(range(rows))


def test_shards_offsets_and_rows_are_those_of_the_source(tmp_path: Path) -> None:
    source = write_ids(tmp_path / "d", train=[5] * 12, test=[2])
    index = prepare(str(source), tmp_path / "out", Options(shards=7))
    assert [s.rows for s in index.splits["train"].shards] == [8, 9, 8, 9, 8, 9, 9]
    assert len(index.splits["test"].shards) == 1
    assert all_ids(ready(None, tmp_path / "out")) == list(range(60))
    offsets = index.splits["train"].offsets["words"]
    found = np.load(tmp_path / "out" / offsets.file, mmap_mode="r")
    assert np.diff(found).tolist() == [i % 4 for i in range(60)]
    assert (offsets.total, offsets.longest, found[0]) == (int(found[-1]), 3, 0)
    assert verify(tmp_path / "out") == index == read_index(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "out"]


def test_record_batches_are_bounded_and_aligned(tmp_path: Path) -> None:
    table = pa.table({"x": pa.array(np.zeros((9000, 8), np.uint8).tolist(), pa.list_(pa.uint8(), 8))})
    (tmp_path / "d").mkdir()
    pq.write_table(table, tmp_path / "d" / "train.parquet")
    prepare(str(tmp_path / "d"), tmp_path / "out")
    with pa.memory_map(str(tmp_path / "out/train/data-00000-of-00001.arrow")) as mapped:
        whole = mapped.read_buffer()
    batches = list(pa.ipc.open_stream(whole))
    assert [b.num_rows for b in batches] == [4096, 4096, 808]
    starts = [b.column(0).values.buffers()[1].address - whole.address for b in batches]
    assert [start % 64 for start in starts] == [0, 0, 0]


def test_shards_follow_max_shard_bytes(tmp_path: Path) -> None:
    source = write_ids(tmp_path / "d", train=[1000])
    index = prepare(str(source), tmp_path / "out", Options(max_shard_bytes=4000, columns=("id",)))
    assert len(index.splits["train"].shards) == 2


@pytest.mark.slow
def test_the_result_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    source = write_ids(tmp_path / "d", train=[40, 23], test=[9])
    seen: list[tuple[int, int]] = []
    for name, workers in [("a", 1), ("b", 2), ("c", 3)]:
        options = Options(shards=5, holdout={"validation": 0.2}, workers=workers)
        prepare(str(source), tmp_path / name / "out", options, progress=lambda a, b: seen.append((a, b)))
        assert seen[-1] == (72, 72)
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert any("validation/data-" in name for name in first)


def test_held_out_rows_are_chosen_by_the_seed_and_taken_from_train(tmp_path: Path) -> None:
    source = write_ids(tmp_path / "d", train=[60, 40])
    chosen = []
    for seed in (0, 0, 1):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        prepare(str(source), tmp_path / "out", Options(holdout={"validation": 0.1}, seed=seed))
        found = ready(None, tmp_path / "out")
        held, kept = all_ids(found, "validation"), all_ids(found)
        assert sorted(held + kept) == list(range(100))
        assert held == sorted(held)
        assert kept == sorted(kept)
        assert len(held) == 10
        chosen.append(held)
    assert chosen[0] == chosen[1] != chosen[2]


def test_hugging_face_datasets_opens_it_too(tmp_path: Path, cache: Path) -> None:
    import datasets

    found = ready("fashion_mnist", None)
    train = datasets.load_from_disk(str(found.folder / "train"))
    assert train.num_rows == 10_000
    assert train.features["label"].names[9] == "Ankle boot"
    assert set(datasets.load_from_disk(str(found.folder))) == {"train", "test"}
    ours = open_split(found, "train").gather(np.array([7, 9999]))
    assert np.array_equal(np.array(train[[7, 9999]]["image"]), ours["image"])
    source = write_ids(tmp_path / "d", train=[9])
    prepare(str(source), tmp_path / "out", Options(shards=2))
    assert datasets.load_from_disk(str(tmp_path / "out"))["train"]["words"][:] == [
        [i] * (i % 4) for i in range(9)
    ]


def test_a_folder_and_a_cache_with_pattern_characters_in_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "ca[ch]e*"))
    assert all_ids(ready(None, write_ids(tmp_path / "da[t]a ?*", train=[3, 4]))) == list(range(7))


def _run(code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DISTDL_CACHE": str(cache.parent)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_no_network_no_noise_and_neither_torch_nor_datasets(tmp_path: Path, cache: Path) -> None:
    folder = write_ids(tmp_path / "d", train=[5])
    code = f"""
import socket, sys
calls = []
def refuse(*given, **named):
    calls.append(given)
    raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from distdl.data.opening import ready
ready(None, {str(folder)!r})
ready("fashion_mnist", None).split("test")
assert not calls, calls
assert not {{"datasets", "torch"}} & set(sys.modules)
"""
    done = _run(code, cache)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


POINTS = [
    "prepare.source",
    "prepare.shard@0",
    "prepare.shard@2",
    "prepare.shard_written@1",
    "prepare.shard_recorded@1",
    "prepare.finish",
    "prepare.before_index",
    "prepare.before_rename",
    "prepare.renamed",
]


@pytest.mark.slow
@pytest.mark.parametrize("where", POINTS)
def test_killed_anywhere_it_leaves_nothing_or_all_and_goes_on(
    where: str, tmp_path: Path, cache: Path
) -> None:
    source = write_ids(tmp_path / "d", train=[30, 11])
    prepare(str(source), tmp_path / "other" / "out", Options(shards=4))
    out = tmp_path / "out"
    code = f"""
from pathlib import Path
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.testing.faults import arm_from_environment
arm_from_environment(0)
prepare({str(source)!r}, Path({str(out)!r}), Options(shards=4))
"""
    done = _run(code, cache, DISTDL_FAIL_AT=f"0:{where}:kill")
    assert done.returncode == -signal.SIGKILL, done.stderr
    if where == "prepare.renamed":
        verify(out)
        prepare(str(source), out, Options(shards=4))
    else:
        assert not out.exists()
        said: list[str] = []
        prepare(str(source), out, Options(shards=4), say=said.append)
        whole = {"prepare.shard@2": 2, "prepare.shard_written@1": 1, "prepare.shard_recorded@1": 2}
        whole |= {"prepare.finish": 4, "prepare.before_index": 4}
        expected = [f"going on: {whole[where]} of 4 shards are there already"] if where in whole else []
        assert said == expected
    assert contents(out) == contents(tmp_path / "other" / "out")
    assert not (tmp_path / "out.building").exists()


@pytest.mark.slow
def test_killed_with_its_workers_at_any_moment_it_goes_on(tmp_path: Path, cache: Path) -> None:
    """A process that is really killed from outside, later and later, until one gets through."""
    source = write_ids(tmp_path / "d", train=[4000, 3000])
    prepare(str(source), tmp_path / "other" / "out", Options(shards=40))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "distdl", "data", "prepare", str(source), "--out", str(out)]
    command += ["--shards", "40", "--workers", "2"]
    for attempt in range(30):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.6 + 0.25 * attempt)
        process.kill()
        code = process.wait()
        assert code in (0, -9)
        assert code == 0 or not out.exists() or verify(out)
        if code == 0:
            break
    assert code == 0
    assert attempt > 0, "the first attempt was not killed: nothing was tested"
    assert contents(out) == contents(tmp_path / "other" / "out")


def test_other_options_or_another_source_start_over(tmp_path: Path) -> None:
    source, out = write_ids(tmp_path / "d", train=[20]), tmp_path / "out"
    with fail_at(0, "prepare.shard@3"), pytest.raises(InjectedFault):
        prepare(str(source), out, Options(shards=4))
    said: list[str] = []
    prepare(str(source), out, Options(shards=5), say=said.append)
    assert said == ["the source or the options have changed since this was begun: starting over"]
    assert len(read_index(out).splits["train"].shards) == 5


def test_another_source_with_the_same_options_starts_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with fail_at(0, "prepare.shard@3"), pytest.raises(InjectedFault):
        prepare(str(write_ids(tmp_path / "d", train=[20])), out, Options(shards=4))
    table = pa.table({"id": np.arange(100, 120), "words": pa.array([[1]] * 20, pa.list_(pa.int32()))})
    pq.write_table(table, tmp_path / "d" / "train-00000-of-00001.parquet")
    prepare(str(tmp_path / "d"), out, Options(shards=4))
    assert all_ids(ready(None, out)) == list(range(100, 120))


def test_the_old_copy_outlives_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    source, out = write_ids(tmp_path / "d", train=[20]), tmp_path / "out"
    prepare(str(source), out, Options(shards=2))
    before = contents(out)
    with fail_at(0, "prepare.replaced"), pytest.raises(InjectedFault):
        prepare(str(source), out, Options(shards=3, overwrite=True))
    assert not out.exists()
    with fail_at(0, "prepare.source"), pytest.raises(InjectedFault):
        prepare(str(source), out, Options(shards=4, overwrite=True))
    assert contents(out) == before
    with pytest.raises(DataError, match="exists already"):
        prepare(str(source), out, Options(shards=4))
    prepare(str(source), out, Options(shards=4, overwrite=True))
    assert len(read_index(out).splits["train"].shards) == 4
    assert not (tmp_path / "out.building").exists()


def test_a_kill_between_the_two_renames_and_the_same_command_again(tmp_path: Path) -> None:
    source, out = write_ids(tmp_path / "d", train=[20]), tmp_path / "out"
    prepare(str(source), out, Options(shards=2))
    for _ in range(2):
        with fail_at(0, "prepare.replaced"), pytest.raises(InjectedFault):
            prepare(str(source), out, Options(shards=3, overwrite=True))
    prepare(str(source), out, Options(shards=3, overwrite=True))
    assert len(verify(out).splits["train"].shards) == 3
    assert not (tmp_path / "out.building").exists()


def test_files_are_read_as_utf8_whatever_the_machine_prefers(tmp_path: Path, cache: Path) -> None:
    source = write_ids(tmp_path / "d", train=[5])
    prepare(str(source), tmp_path / "out", Options(name="größe"))
    code = f"""
import warnings
from pathlib import Path
from distdl.data.index import read_index
from distdl.data.prepare.stage import stage
from distdl.data.stream.remote_dataset import RemoteDataset
RemoteDataset.open("file://{tmp_path}/out")
warnings.simplefilter("error", EncodingWarning)
assert read_index(Path({str(tmp_path / "out")!r})).name == "größe"
stage(Path({str(tmp_path / "out")!r}), Path({str(tmp_path / "copy")!r}))
for _ in range(2):
    RemoteDataset.open("file://{tmp_path}/copy")
"""
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-W", "ignore::EncodingWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_a_shard_that_was_cut_after_its_record_is_made_again(tmp_path: Path) -> None:
    source, out = write_ids(tmp_path / "d", train=[20]), tmp_path / "out"
    with fail_at(0, "prepare.shard@3"), pytest.raises(InjectedFault):
        prepare(str(source), out, Options(shards=4))
    shard = tmp_path / "out.building" / "dataset" / "train" / "data-00001-of-00004.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    said: list[str] = []
    prepare(str(source), out, Options(shards=4), say=said.append)
    assert said == ["going on: 2 of 4 shards are there already"]
    verify(out)


def test_a_row_group_larger_than_its_shards_is_decoded_a_few_times_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distdl.data.prepare import readers

    read = []
    plain = readers._read_parquet
    monkeypatch.setattr(readers, "_read_parquet", lambda *given: read.append(given) or plain(*given))
    prepare(str(write_ids(tmp_path / "d", train=[2000])), tmp_path / "out", Options(shards=40))
    assert len(read) <= 3
    assert all_ids(ready(None, tmp_path / "out")) == list(range(2000))


def test_a_full_disk_is_a_data_error_and_is_gone_on_from(tmp_path: Path) -> None:
    source, out = write_ids(tmp_path / "d", train=[20]), tmp_path / "out"
    with (
        fail_at(0, "prepare.shard_written@2", "enospc"),
        pytest.raises(DataError, match=r"no space left.*out: .*same command again"),
    ):
        prepare(str(source), out, Options(shards=4))
    said: list[str] = []
    prepare(str(source), out, Options(shards=4), say=said.append)
    assert said == ["going on: 2 of 4 shards are there already"]


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"has 0\.00 GB of free space, and about 0\.03 GB are needed"):
        prepare(str(write_ids(tmp_path / "d", train=[5])), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_two_into_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    source = write_ids(tmp_path / "d", train=[5])
    (tmp_path / "out.building").mkdir()
    with (tmp_path / "out.building" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 4711")
        lock.flush()
        with pytest.raises(DataError, match="is being prepared by process 4711"):
            prepare(str(source), tmp_path / "out")
    prepare(str(source), tmp_path / "out")


def test_the_same_command_again_says_that_it_is_done(tmp_path: Path) -> None:
    source, out = write_ids(tmp_path / "d", train=[5]), tmp_path / "out"
    first, before = prepare(str(source), out), contents(out)
    said: list[str] = []
    assert prepare(str(source), out, say=said.append) == first
    assert (contents(out), len(said)) == (before, 1)
    assert "is there already" in said[0]
    write_ids(tmp_path / "d", train=[6])
    with pytest.raises(DataError, match="exists already"):
        prepare(str(source), out)


def test_only_a_prepared_dataset_is_overwritten(tmp_path: Path) -> None:
    source, out = write_ids(tmp_path / "d", train=[5]), tmp_path / "out"
    prepare(str(source), out)
    with pytest.raises(DataError, match=r"exists already; give --overwrite"):
        prepare(str(source), out, Options(shards=2))
    prepare(str(write_ids(tmp_path / "e", train=[6])), out, Options(overwrite=True))
    assert read_index(out).splits["train"].rows == 6
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not a prepared dataset"):
        prepare(str(source), tmp_path / "mine", Options(overwrite=True))


def test_killed_while_it_replaces_a_dataset_the_new_one_appears_at_the_next_try(tmp_path: Path) -> None:
    out, source = tmp_path / "out", write_ids(tmp_path / "e", train=[6])
    prepare(str(write_ids(tmp_path / "d", train=[5])), out)
    with fail_at(0, "prepare.replaced"), pytest.raises(InjectedFault):
        prepare(str(source), out, Options(overwrite=True))
    assert not out.exists()
    prepare(str(source), out, Options(overwrite=True))
    assert all_ids(ready(None, out)) == list(range(6))
    assert not (tmp_path / "out.building").exists()


@pytest.mark.slow
def test_processes_that_need_the_cache_at_once_all_succeed(tmp_path: Path, cache: Path) -> None:
    folder = write_ids(tmp_path / "d", train=[5])
    code = f"""
import sys
from distdl.data.opening import ready
sys.stdin.readline()
print(ready(None, {str(folder)!r}).split("train").rows)
"""
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1, text=True)
        for _ in range(3)
    ]
    done = [process.communicate("go\n", timeout=60) for process in started]
    assert done == [("[5]\n", "")] * 3
    assert [p.name for p in cache.iterdir()] == [describe(None, folder).fingerprint]


def test_damage_behind_a_good_footer_is_a_data_error(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    table = pa.table({"id": np.random.default_rng(0).integers(0, 2**60, 10_000)})
    pq.write_table(table, folder / "train.parquet", compression="zstd")
    data = bytearray((folder / "train.parquet").read_bytes())
    data[4:4000] = b"\xff" * 3996
    (folder / "train.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"train\.parquet cannot be read through"):
        ready(None, folder)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_the_machines_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentProblem, match=r"Not a directory.*DISTDL_CACHE"):
        ready("fashion_mnist", None)


def test_a_shard_that_is_lost_or_cut_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(write_ids(tmp_path / "d", train=[5], test=[2])), out, Options(shards=2))
    shard = out / "train" / "data-00001-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow has \d+ bytes, and .*index.json says"):
        ready(None, out).split("train")
    shard.unlink()
    with pytest.raises(DataError, match=r"names .*data-00001-of-00002\.arrow, which cannot be read: No such"):
        ready(None, out).split("train")
    assert ready(None, out).split("test").rows == [2]
    with pytest.raises(DataError, match=r"no split 'trian'; did you mean 'train'"):
        ready(None, out).split("trian")


def test_a_thousand_shards_open_from_the_index_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(write_ids(tmp_path / "d", train=[5])), out)
    index = read_index(out)
    train = index.splits["train"]
    shards = tuple(
        train.shards[0].model_copy(update={"file": f"train/{n}.arrow", "rows": 10_000}) for n in range(1000)
    )
    splits = {"train": train.model_copy(update={"shards": shards})}
    (out / INDEX_FILE).write_text(index.model_copy(update={"splits": splits}).to_json())
    shutil.rmtree(out / "train")  # so nothing but the index can be read
    start = time.perf_counter()
    assert ready(None, out).info.rows == {"train": 10**7}
    assert time.perf_counter() - start < 1


def test_where_the_cache_lies() -> None:
    assert cache_folder({"DISTDL_CACHE": "/scratch/x"}) == Path("/scratch/x")
    assert cache_folder({}) == Path.home() / ".cache" / "distdl"
    assert cache_folder({"DISTDL_CACHE": ""}) == cache_folder({})
