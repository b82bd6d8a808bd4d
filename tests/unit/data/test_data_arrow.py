"""Gathering rows from Arrow files: the values, shapes and dtypes that were written, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl.data.arrow import ArrowTable, open_split
from distdl.data.prepare import Prepared, prepare
from distdl.data.rows import ArrayRows
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
        ]
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
        (pa.array(["a", "b"]), "column 'bad' has type string"),
        (pa.array([[1], [2, 3]]), r"column 'bad' has type list<.*convert it"),
        (pa.array([True, False]), "column 'bad' has type bool"),
        (pa.array([1, None]), "column 'bad' has 1 or more nulls"),
        (pa.array([[1, 2], None], pa.list_(pa.int8(), 2)), "column 'bad' has 1 or more nulls"),
        (pa.array([[1, 2], [3, None]], pa.list_(pa.int8(), 2)), "column 'bad' has 1 or more nulls"),
    ],
)
def test_unsuitable_columns_are_named_unless_left_out(tmp_path: Path, column: pa.Array, words: str) -> None:
    file = write_stream(tmp_path / "a.arrow", pa.table({"good": [1, 2], "bad": column}), 10)
    with pytest.raises(DataError, match=words):
        ArrowTable([file])
    assert ArrowTable([file], ["good"]).gather(np.array([1]))["good"].tolist() == [2]


def test_compressed_buffers_are_refused(tmp_path: Path) -> None:
    data = pa.table({"a": np.zeros(10_000)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(tmp_path / "a"), "wb") as sink,
        pa.ipc.new_stream(sink, data.schema, options=options) as w,
    ):
        w.write_table(data)
    with pytest.raises(DataError, match="column 'a' is compressed"):
        ArrowTable([tmp_path / "a"])


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """A small prepared dataset with splits train (100) and test (10)."""
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "d").mkdir()
    pq.write_table(TABLE.drop_columns("half"), tmp_path / "d" / "train.parquet")
    pq.write_table(TABLE.drop_columns("half").slice(0, 10), tmp_path / "d" / "test.parquet")
    return prepare(None, tmp_path / "d")


def test_what_was_in_parquet_comes_out(prepared: Prepared) -> None:
    ids = np.arange(99, -1, -1)
    gathered = open_split(prepared, "train").gather(ids)
    for name in ("image", "box", "label", "flag"):
        assert gathered[name].dtype == COLUMNS[name].dtype
        assert np.array_equal(gathered[name], COLUMNS[name][::-1])


def test_unknown_splits_and_columns_list_the_nearest(prepared: Prepared) -> None:
    with pytest.raises(DataError, match="no split 'tset'; did you mean 'test'"):
        open_split(prepared, "tset")
    with pytest.raises(DataError, match=r"no column 'lable'; did you mean 'label'.*Its columns: image, box"):
        open_split(prepared, "train", ["lable"])


@pytest.mark.parametrize("keep", [0, 100, 0.5, -200])
def test_a_truncated_arrow_file_is_reported(prepared: Prepared, keep: float) -> None:
    file = prepared.split_folder("train") / "data-00000-of-00001.arrow"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep) if abs(keep) >= 1 or keep == 0 else int(len(data) * keep)])
    with pytest.raises(DataError, match=rf"Delete {prepared.folder}"):
        open_split(prepared, "train")


def test_an_arrow_file_that_lost_whole_batches_is_reported(prepared: Prepared) -> None:
    file = prepared.split_folder("train") / "data-00000-of-00001.arrow"
    write_stream(file, TABLE.slice(0, 60), 10)
    with pytest.raises(DataError, match="has 60 rows, and its source 100"):
        open_split(prepared, "train")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"_data_files": []}', '{"_data_files": [{"filename": "x"}]}']
)
def test_a_damaged_index_is_reported(prepared: Prepared, text: str) -> None:
    (prepared.split_folder("train") / "state.json").write_text(text)
    with pytest.raises(DataError, match="is damaged"):
        open_split(prepared, "train")
