"""Views: the same rows as their parts hold; packed rows against a plain loop over the tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl.data.order.kinds import Block
from distdl.data.table.ragged import Ragged
from distdl.data.table.rows import ArrayRows, Batch, check_ids, close, fingerprint
from distdl.data.table.views import Concatenated, Packed
from distdl.errors import DataError


class RaggedRows:
    """Rows of lists in memory, beside columns of arrays."""

    def __init__(self, lists: dict[str, list[list[int]]], arrays: dict[str, np.ndarray]) -> None:
        self.lists, self.arrays = lists, arrays
        self.gathered: list[int] = []
        self.shard_rows: list[int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.lists.values())))

    def gather(self, ids: np.ndarray, allocate: Callable[..., Any] | None = None) -> Batch:
        check_ids(ids, len(self))
        self.gathered += ids.tolist()
        found: Batch = {name: array[ids] for name, array in self.arrays.items()}
        for name, lists in self.lists.items():
            chosen = [lists[i] for i in ids.tolist()]
            values = np.array([x for row in chosen for x in row], dtype=np.uint16)
            found[name] = Ragged(values, np.array([len(row) for row in chosen], dtype=np.int64))
        return found


class SliceableRows(RaggedRows):
    """The same, able to hand out parts of a row; notes how many tokens were read."""

    read = 0

    def slices(self, column: str, ids: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Ragged:
        chosen = [self.lists[column][i][b:e] for i, b, e in zip(ids, begins, ends, strict=True)]
        self.read += sum(map(len, chosen))
        values = np.array([x for row in chosen for x in row], dtype=np.uint16)
        return Ragged(values, ends - begins)


def documents(lengths: list[int], kind: type[RaggedRows] = RaggedRows) -> tuple[RaggedRows, np.ndarray]:
    ends = np.cumsum([0, *lengths]).astype(np.int64)
    lists = [list(range(a + 1, b + 1)) for a, b in itertools.pairwise(ends)]
    return kind({"tokens": lists}, {}), ends


def expected_rows(lengths: list[int], length: int) -> list[tuple[list[int], int, list[int]]]:
    """(tokens, targets, segments) of each packed row, one token after another."""
    stream = [(n, t) for n, size in enumerate(lengths) for t in range(size)]
    rows = []
    for start in range(0, len(stream) - 1, length):
        part = list(range(start, min(start + length + 1, len(stream))))
        order = list(dict.fromkeys(stream[i][0] for i in part))
        filling = [0] * (length + 1 - len(part))
        segments = [order.index(stream[i][0]) + 1 for i in part]
        rows.append(([i + 1 for i in part] + filling, len(part) - 1, segments + filling))
    return rows


@settings(max_examples=150)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=20),
    length=st.integers(1, 15),
    kind=st.sampled_from([RaggedRows, SliceableRows]),
    data=st.data(),
)
def test_packed_rows_are_the_stream_cut_up(
    lengths: list[int], length: int, kind: type[RaggedRows], data: st.DataObject
) -> None:
    rows, offsets = documents(lengths, kind)
    packed = Packed(rows, "tokens", offsets, length)
    expected = expected_rows(lengths, length)
    assert len(packed) == len(expected)
    ids = data.draw(st.lists(st.integers(0, len(packed) - 1), max_size=9)) if len(packed) else []
    found = packed.gather(np.array(ids, dtype=np.int64))
    assert list(found) == ["tokens", "tokens_count", "tokens_segments"]
    assert [found[name].dtype for name in found] == [np.uint16, np.int64, np.int32]
    assert found["tokens"].shape == found["tokens_segments"].shape == (len(ids), length + 1)
    for i, tokens, count, segments in zip(ids, *found.values(), strict=True):
        assert (tokens.tolist(), count, segments.tolist()) == expected[i]


def test_every_token_but_the_first_is_a_target_once() -> None:
    rows, offsets = documents([5, 0, 40, 1, 9])
    found = Packed(rows, "tokens", offsets, 7).gather(np.arange(8))
    targets = [
        t for row, n in zip(found["tokens"], found["tokens_count"], strict=True) for t in row[1 : n + 1]
    ]
    assert targets == list(range(2, 56))
    assert found["tokens_count"].sum() == 54


def test_packed_reads_no_more_than_it_returns_where_rows_can_be_sliced() -> None:
    rows, offsets = documents([60_000, 3], SliceableRows)
    found = Packed(rows, "tokens", offsets, 128).gather(np.array([5, 400]))
    assert found["tokens"][0, 0] == 5 * 128 + 1
    assert rows.read == 2 * 129
    assert rows.gathered == []


def test_packed_gathers_each_document_once_where_they_cannot() -> None:
    rows, offsets = documents([4, 30, 5])
    Packed(rows, "tokens", offsets, 4).gather(np.array([2, 3, 8]))
    assert rows.gathered == [1, 2]


def test_packed_writes_into_the_memory_it_is_given() -> None:
    rows, offsets = documents([9, 4])
    made = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        made.append(np.full(shape, 99, dtype))
        return made[-1]

    found = Packed(rows, "tokens", offsets, 5).gather(np.arange(3), allocate)
    assert found["tokens"] is made[0]
    assert found["tokens_segments"] is made[1]
    assert found["tokens"][2].tolist() == [11, 12, 13, 0, 0, 0]


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(0, 12), max_size=20), length=st.integers(1, 9), cut=st.integers(0, 20))
def test_packed_rows_of_a_shard_begin_in_it(lengths: list[int], length: int, cut: int) -> None:
    rows, offsets = documents(lengths)
    packed = Packed(rows, "tokens", offsets, length)
    cut = min(cut, len(lengths))
    assert packed.shard_rows is None
    rows.shard_rows = [cut, 0, len(lengths) - cut]
    shards = packed.shard_rows
    assert shards is not None
    assert sum(shards) == len(packed)
    assert shards[1] == 0
    begins = np.arange(len(packed)) * length
    assert shards[0] == np.count_nonzero(begins < offsets[cut])
    assert Block(1, shards).rows == len(packed)


def test_packed_refuses() -> None:
    rows, offsets = documents([3, 4])
    with pytest.raises(DataError, match="length of packed rows is 0"):
        Packed(rows, "tokens", offsets, 0)
    with pytest.raises(DataError, match=r"int64 \[2\]; 2 documents need int64 \[3\]"):
        Packed(rows, "tokens", offsets[:-1], 4)
    with pytest.raises(DataError, match="no column 'token'; did you mean 'tokens'"):
        Packed(rows, "token", offsets, 4)
    with pytest.raises(DataError, match="is int64; packing needs one list of tokens"):
        Packed(ArrayRows({"x": np.arange(2)}), "x", offsets, 4)
    with pytest.raises(DataError, match="row ids 0 to 2"):
        Packed(rows, "tokens", offsets, 4).gather(np.arange(3))
    with pytest.raises(DataError, match="the index disagrees with its shards"):
        Packed(rows, "tokens", np.array([0, 4, 7]), 4).gather(np.arange(1))


def parts() -> list[RaggedRows]:
    def part(start: int, rows: int) -> RaggedRows:
        ids = range(start, start + rows)
        arrays = {"x": np.array([[i, i] for i in ids], dtype=np.int16).reshape(rows, 2)}
        return RaggedRows({"words": [[i] * (i % 4) for i in ids]}, arrays)

    return [part(0, 5), part(5, 0), part(5, 9), part(14, 3)]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 16), max_size=30))
def test_concatenated_rows_are_those_of_the_parts_in_the_order_asked_for(ids: list[int]) -> None:
    whole = Concatenated(parts())
    assert (len(whole), whole.part_rows) == (17, [5, 0, 9, 3])
    found = whole.gather(np.array(ids, dtype=np.int64))
    assert list(found) == ["x", "words"]
    assert found["x"].dtype == np.int16
    assert found["x"].tolist() == [[i, i] for i in ids]
    assert found["words"].tolist() == [[i] * (i % 4) for i in ids]


def test_concatenated_gathers_once_in_each_part_touched() -> None:
    three = parts()
    whole = Concatenated(three)
    for part in three:
        part.gathered.clear()
    whole.gather(np.array([16, 0, 15, 1]))
    assert [part.gathered for part in three] == [[0, 1], [], [], [2, 1]]


def test_concatenated_lists_of_lists() -> None:
    class Nested:
        def __init__(self, start: int) -> None:
            self.start = start

        def __len__(self) -> int:
            return 2

        def gather(self, ids: np.ndarray) -> Batch:
            inner = Ragged(np.repeat(ids + self.start, 3), np.tile([1, 2], len(ids)).astype(np.int64))
            return {"n": Ragged(inner, np.full(len(ids), 2, dtype=np.int64))}

    found = Concatenated([Nested(0), Nested(2)]).gather(np.array([3, 0, 2]))["n"]
    assert isinstance(found, Ragged)
    assert found.lengths.tolist() == [2, 2, 2]
    assert isinstance(found.values, Ragged)
    assert found.values.tolist() == [[3], [3, 3], [0], [0, 0], [2], [2, 2]]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"x": np.zeros((2, 3), np.int16)}, r"'x' is int16 \[2\] in dataset 0 and int16 \[3\] in dataset 1"),
        ({"x": np.zeros((2, 2), np.int32)}, r"'x' is int16 \[2\] in dataset 0 and int32 \[2\] in dataset 1"),
        ({"y": np.zeros((2, 2), np.int16)}, r"'x' is int16 \[2\] in dataset 0 and missing in dataset 1"),
        (
            {"x": np.zeros((2, 2), np.int16), "y": np.zeros(2)},
            r"'y' is missing in dataset 0 and float64 in dataset 1",
        ),
    ],
)
def test_parts_that_differ_are_refused(other: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Concatenated([ArrayRows({"x": np.zeros((4, 2), np.int16)}), ArrayRows(other)])


def test_fingerprints_tell_views_of_equal_size_apart() -> None:
    def array(rows: int, dtype: type = np.int16, name: str = "x") -> ArrayRows:
        return ArrayRows({name: np.zeros(rows, dtype)})

    rows, offsets = documents([8, 8, 8])
    named = NamedRows("a"), NamedRows("b")
    different = [
        array(6),
        array(6, np.int32),
        array(6, name="y"),
        ArrayRows({"x": np.zeros((6, 1), np.int16)}),
        Concatenated([array(2), array(4)]),
        Concatenated([array(4), array(2)]),
        Concatenated(named),
        Concatenated(named[::-1]),
        Packed(rows, "tokens", offsets, 4),
        Packed(rows, "tokens", offsets, 5),
        Packed(NamedRows("a"), "tokens", np.array([0, 2, 4, 6]), 4),
        Packed(NamedRows("b"), "tokens", np.array([0, 2, 4, 6]), 4),
    ]
    found = [fingerprint(view) for view in different]
    assert len(set(found)) == len(found)
    assert max(map(len, found)) < 100
    assert fingerprint(array(6)) == fingerprint(array(6))
    assert fingerprint(Concatenated(named)) == fingerprint(Concatenated([NamedRows("a"), NamedRows("b")]))


class NamedRows(ArrayRows):
    """Three documents of two tokens, as a dataset called `name` has them."""

    def __init__(self, name: str) -> None:
        super().__init__({"tokens": Ragged(np.arange(6, dtype=np.int32), np.full(3, 2))})
        self.name, self.closed = name, 0

    @property
    def fingerprint(self) -> str:
        return self.name

    def close(self) -> None:
        self.closed += 1


def test_closing_a_view_closes_its_parts() -> None:
    named = [NamedRows("a"), NamedRows("b")]
    close(Packed(Concatenated([*named, ArrayRows(named[0]._columns)]), "tokens", np.arange(0, 20, 2), 4))
    assert [part.closed for part in named] == [1, 1]


def test_no_parts_and_ids_outside_are_refused() -> None:
    with pytest.raises(DataError, match="no parts"):
        Concatenated([])
    with pytest.raises(DataError, match="row ids 0 to 17"):
        Concatenated(parts()).gather(np.arange(18))
