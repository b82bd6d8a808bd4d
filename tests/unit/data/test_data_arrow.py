"""Gathering rows from Arrow files: the values, shapes and dtypes that were written, and clear refusals."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl.data.table import memory
from distdl.data.table.arrow import ArrowTable, _Opened
from distdl.data.table.ragged import Ragged
from distdl.data.table.rows import ArrayRows
from distdl.errors import DataError


def nested(array: np.ndarray) -> pa.Array:
    """[N, a, b, ...] as N fixed-size lists of fixed-size lists."""
    result = pa.array(array.reshape(-1))
    for length in reversed(array.shape[1:]):
        result = pa.FixedSizeListArray.from_arrays(result, length)
    return result


def write_stream(file: Path, table: pa.Table, batch_rows: int) -> Path:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return file


COLUMNS = {
    "image": np.random.default_rng(0).integers(0, 255, (100, 2, 3, 5), dtype=np.uint8),
    "box": np.random.default_rng(1).normal(size=(100, 4)).astype(np.float32),
    "half": np.random.default_rng(1).normal(size=100).astype(np.float16),
    "label": np.arange(100, dtype=np.int64) * -3,
    "flag": np.arange(100, dtype=np.int8),
}
TABLE = pa.table({name: nested(array) for name, array in COLUMNS.items()})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ArrowTable:
    """100 rows in three files and batches of uneven size; the one in the middle has no rows."""
    folder = tmp_path_factory.mktemp("arrow")
    return ArrowTable(
        [
            write_stream(folder / "0.arrow", TABLE.slice(0, 37), 10),
            write_stream(folder / "1.arrow", TABLE.slice(37, 0), 10),
            write_stream(folder / "2.arrow", TABLE.slice(37), 7),
        ],
        [37, 0, 63],
    )


@settings(max_examples=80, deadline=None)
@given(ids=st.lists(st.integers(0, 99), max_size=150))
def test_any_ids_come_in_the_order_asked_for(table: ArrowTable, ids: list[int]) -> None:
    asked = np.array(ids, dtype=np.int64)
    gathered = table.gather(asked)
    assert list(gathered) == list(COLUMNS)
    for name, array in gathered.items():
        assert array.dtype == COLUMNS[name].dtype
        assert np.array_equal(array, COLUMNS[name][asked])
        assert array.flags.c_contiguous
        assert array.flags.writeable
    assert len(table) == 100


def test_gathered_rows_are_copies(table: ArrowTable) -> None:
    table.gather(np.array([3]))["label"][:] = 77
    assert table.gather(np.array([3]))["label"].tolist() == [-9]


@pytest.mark.parametrize("bad", [[-1], [0, 100], [10**12]])
def test_ids_out_of_range_are_refused(table: ArrowTable, bad: list[int]) -> None:
    for rows in (table, ArrayRows(COLUMNS)):
        with pytest.raises(DataError, match="the split has 100 rows, 0 to 99"):
            rows.gather(np.array(bad))


def test_array_rows_stand_in_for_a_table(table: ArrowTable) -> None:
    ids = np.array([5, 99, 5, 0])
    other = ArrayRows(COLUMNS).gather(ids)
    for name, array in table.gather(ids).items():
        assert np.array_equal(array, other[name])
    with pytest.raises(ValueError, match="one common length"):
        ArrayRows({"a": np.zeros(2), "b": np.zeros(3)})


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array(["a", "b"]).dictionary_encode(), "column 'bad' has type dictionary"),
        (pa.array([[{"a": 1}], []]), r"column 'bad' has type struct.*cannot be gathered.*Leave it out"),
        (pa.array([1, None]), "column 'bad' has a null in row 1"),
        (pa.array([None, [1, 2]], pa.list_(pa.int8(), 2)), "column 'bad' has a null in row 0"),
        (pa.array([[1, 2], [3, None]], pa.list_(pa.int8(), 2)), "column 'bad' has a null in row 1"),
        (pa.array([[], [3, 4, None]], pa.list_(pa.int8())), "column 'bad' has a null in row 1"),
        (pa.array([{"x": "a"}, {"x": None}]), "column 'bad.x' has a null in row 1"),
        (pa.array([{"x": "a"}, None]), "column 'bad.x' has a null in row 1"),
    ],
)
def test_unsuitable_columns_are_named_unless_left_out(tmp_path: Path, column: pa.Array, words: str) -> None:
    file = write_stream(tmp_path / "a.arrow", pa.table({"good": [1, 2], "bad": column}), 10)
    with pytest.raises(DataError, match=words):
        ArrowTable([file]).gather(np.array([0]))
    assert ArrowTable([file], columns=["good"]).gather(np.array([1]))["good"].tolist() == [2]


VARYING = {
    "tokens": pa.array([list(range(n)) for n in (3, 0, 700, 1, 64)] * 20, pa.list_(pa.int32())),
    "large": pa.array([[0.5] * (i % 5) for i in range(100)], pa.large_list(pa.float64())),
    "points": pa.array(
        [[[i, j] for j in range(i % 4)] for i in range(100)], pa.list_(pa.list_(pa.int16(), 2))
    ),
    "nested": pa.array([[[i] * j for j in range(i % 3)] for i in range(100)], pa.list_(pa.list_(pa.int64()))),
    "flags": pa.array([[bool(i & j) for j in range(i % 11)] for i in range(100)], pa.list_(pa.bool_())),
    "bits": pa.array([[i % 2 == 0, i % 3 == 0, True] for i in range(100)], pa.list_(pa.bool_(), 3)),
    "yes": pa.array([i % 7 == 0 for i in range(100)]),
    "text": pa.array(["é" * (i % 9) for i in range(100)]),
    "raw": pa.array([bytes([i]) * (i * 37 % 900) for i in range(100)], pa.large_binary()),
    "words": pa.array([["a" * i, "b"] for i in range(100)], pa.list_(pa.string(), 2)),
    "triples": pa.array([[[i] * 3] * (i % 3) for i in range(100)], pa.list_(pa.list_(pa.uint8(), 3))),
}


@pytest.fixture(scope="module")
def varying(tmp_path_factory: pytest.TempPathFactory) -> ArrowTable:
    """100 rows of every kind whose rows differ, in two files; a struct, and Arrow's file format, too."""
    folder = tmp_path_factory.mktemp("varying")
    members = [VARYING["yes"], VARYING["text"]]
    data = pa.table({**VARYING, "both": pa.StructArray.from_arrays(members, ["yes", "text"])})
    with (
        pa.OSFile(str(folder / "1.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, data.schema) as writer,
    ):
        writer.write_table(data.slice(60), max_chunksize=13)
    return ArrowTable([write_stream(folder / "0.arrow", data.slice(0, 60), 17), folder / "1.arrow"], [60, 40])


def listed(column: Any) -> list[Any]:
    return list(column.tolist())


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 99), max_size=40))
def test_columns_of_varying_rows_hold_what_was_written(varying: ArrowTable, ids: list[int]) -> None:
    gathered = varying.gather(np.array(ids, dtype=np.int64))
    for name, column in VARYING.items():
        expected = [column[i].as_py() for i in ids]
        assert listed(gathered[name]) == expected, name
    assert listed(gathered["both.text"]) == listed(gathered["text"])
    assert listed(gathered["both.yes"]) == listed(gathered["yes"])


def test_dtypes_are_those_stored(varying: ArrowTable) -> None:
    found = varying.gather(np.arange(100))
    assert found["tokens"].values.dtype == np.int32
    assert found["large"].values.dtype == np.float64
    assert found["points"].values.shape[1:] == (2,)
    assert found["bits"].shape == (100, 3)
    assert found["bits"].dtype == np.bool_
    assert found["text"].text is True
    assert found["raw"].text is False
    assert isinstance(found["nested"].values, Ragged)


def test_a_struct_is_chosen_whole_or_by_member(varying: ArrowTable) -> None:
    files = varying._files
    assert ArrowTable(files, [60, 40], ["both"]).columns == ["both.yes", "both.text"]
    assert ArrowTable(files, [60, 40], ["both.text"]).columns == ["both.text"]


@pytest.mark.parametrize("block", [2, 16, 256])
def test_long_spans_copied_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(memory, "_BLOCK_BYTES", block)
    rng = np.random.default_rng(block)
    source = rng.integers(0, 255, 100_000, dtype=np.uint8)
    for dtype in (np.uint8, np.int32, np.float64):
        size = np.dtype(dtype).itemsize
        lengths = rng.integers(0, 1000, 40)
        starts = rng.integers(0, (len(source) - 8000) // 8, 40) * 8
        out = np.empty(lengths.sum(), dtype)
        memory.take_spans(starts + source.ctypes.data, lengths, np.dtype(dtype), 1, out)
        pieces = [source[s : s + n * size] for s, n in zip(starts, lengths, strict=True)]
        assert out.tobytes() == np.concatenate(pieces).tobytes()


def test_spans_at_odd_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.arange(200, dtype=np.uint8)
    out = np.empty(5, np.int32)
    starts = source.ctypes.data + np.array([3, 50])
    memory.take_spans(starts, np.array([2, 3]), np.dtype(np.int32), 1, out)
    assert out.tobytes() == source[3:11].tobytes() + source[50:62].tobytes()


def test_rows_too_large_for_one_array_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.arange(4096, dtype=np.int16)
    monkeypatch.setattr(memory, "_LARGEST_ARRAY", 3000)
    addresses = source.ctypes.data + np.array([0, 2048, 512])
    found = memory.take_rows(addresses, np.dtype(np.int16), (16, 8))
    assert np.array_equal(found.reshape(3, -1), [source[a : a + 128] for a in (0, 1024, 256)])


def test_memory_comes_from_the_callers_function(table: ArrowTable, varying: ArrowTable) -> None:
    made = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        made.append(np.empty(shape, dtype))
        return made[-1]

    ids = np.array([99, 0, 5])
    for name, array in table.gather(ids, allocate).items():
        assert any(array is m for m in made)
        assert np.array_equal(array, COLUMNS[name][ids])
    tokens = varying.gather(ids, allocate)["tokens"]
    assert any(tokens.values is m for m in made)


def test_slices_read_a_part_of_each_row(varying: ArrowTable) -> None:
    found = varying.slices("tokens", np.array([2, 4, 2]), np.array([690, 0, 5]), np.array([700, 3, 5]))
    assert found.tolist() == [list(range(690, 700)), [0, 1, 2], []]
    with pytest.raises(DataError, match="outside its rows"):
        varying.slices("tokens", np.array([0]), np.array([0]), np.array([4]))
    with pytest.raises(DataError, match="rows of one size"):
        varying.slices("yes", np.array([0]), np.array([0]), np.array([1]))


def test_files_are_opened_when_a_row_of_theirs_is_asked_for(tmp_path: Path) -> None:
    files = [write_stream(tmp_path / f"{n}", pa.table({"x": [n, n]}), 10) for n in range(4)]
    rows = ArrowTable(files, [2, 2, 2, 2])
    files[2].unlink()
    assert rows.gather(np.array([7, 0, 3]))["x"].tolist() == [3, 0, 1]
    with pytest.raises(DataError, match=f"cannot read {files[2]}"):
        rows.gather(np.array([4]))
    write_stream(files[2], pa.table({"x": [8, 9]}), 10)
    assert rows.gather(np.array([5, 4]))["x"].tolist() == [9, 8]


def test_threads_that_open_the_same_files_agree(tmp_path: Path) -> None:
    files = [
        write_stream(tmp_path / f"{n}", pa.table({"x": np.arange(n * 9, n * 9 + 9)}), 2) for n in range(40)
    ]
    for seed in range(5):
        rows = ArrowTable(files, [9] * 40)
        ids = [np.random.default_rng((seed, t)).permutation(360) for t in range(8)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i, rows=rows: rows.gather(i)["x"], ids))
        assert all(np.array_equal(f, i) for f, i in zip(found, ids, strict=True))


def test_a_table_pickles_as_its_files(table: ArrowTable) -> None:
    raw = pickle.dumps(table)
    assert len(raw) < 1000
    assert pickle.loads(raw).gather(np.array([7]))["label"].tolist() == [-21]  # noqa: S301 - made above


def test_compressed_buffers_are_refused(tmp_path: Path) -> None:
    data = pa.table({"a": np.zeros(10_000)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(tmp_path / "a"), "wb") as sink,
        pa.ipc.new_stream(sink, data.schema, options=options) as w,
    ):
        w.write_table(data)
    with pytest.raises(DataError, match=r"column 'a' of .*compressed inside the Arrow file"):
        ArrowTable([tmp_path / "a"], [10_000]).gather(np.array([0]))


def test_unknown_columns_list_the_nearest(table: ArrowTable) -> None:
    with pytest.raises(DataError, match=r"no column 'lable'; did you mean 'label'.*Its columns: image, box"):
        ArrowTable(table._files, [37, 0, 63], ["lable"])
    with pytest.raises(DataError, match="without a single Arrow file"):
        ArrowTable([])


@pytest.mark.parametrize("keep", [0, 100, 0.5, -200])
def test_a_cut_file_is_named(tmp_path: Path, keep: float) -> None:
    file = write_stream(tmp_path / "cut.arrow", TABLE, 10)
    data = file.read_bytes()
    file.write_bytes(data[: int(keep) if abs(keep) >= 1 or keep == 0 else int(len(data) * keep)])
    with pytest.raises(DataError, match=str(file)):
        ArrowTable([file], [100]).gather(np.arange(100))


def test_an_index_that_disagrees_with_its_shards_is_named(tmp_path: Path) -> None:
    files = [write_stream(tmp_path / f"{n}", TABLE.slice(0, 60), 10) for n in range(2)]
    with pytest.raises(DataError, match=f"{files[1]} has 60 rows, and the index says 61.*disagrees"):
        ArrowTable(files, [60, 61]).gather(np.array([70]))


def test_files_of_other_columns_are_named(tmp_path: Path) -> None:
    a = write_stream(tmp_path / "a", pa.table({"x": pa.array([1], pa.int32())}), 10)
    b = write_stream(tmp_path / "b", pa.table({"x": pa.array([1], pa.int64())}), 10)
    with pytest.raises(DataError, match=f"column 'x' is int64 in {b} and int32 in {a}"):
        ArrowTable([a, b], [1, 1]).gather(np.array([1]))


@pytest.mark.parametrize("value", [-5, 1000, 2**30])
def test_damaged_offsets_are_found_before_they_are_followed(tmp_path: Path, value: int) -> None:
    offsets = np.array([0, 2, 4, 6, 8], np.int32)
    file = write_stream(
        tmp_path / "x", pa.table({"x": pa.ListArray.from_arrays(offsets, pa.array(range(8)))}), 10
    )
    data = file.read_bytes()
    broken = offsets.copy()
    broken[2] = value
    assert data.count(offsets.tobytes()) == 1
    file.write_bytes(data.replace(offsets.tobytes(), broken.tobytes()))
    with pytest.raises(DataError, match=f"column 'x'.*offsets point outside.*{file}"):
        ArrowTable([file], [4]).gather(np.arange(4))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(0, 2**32 - 1))
def test_the_record_batch_of_a_row_is_found_whatever_their_sizes(sizes: list[int], seed: int) -> None:
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    opened = _Opened(starts[:-1], np.empty((len(sizes), 0), np.int64), np.ones(1, np.bool_), {})
    ids = np.random.default_rng(seed).integers(0, starts[-1], 200)
    assert np.array_equal(opened.batches_of(ids), np.searchsorted(starts, ids, side="right") - 1)
