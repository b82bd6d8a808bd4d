"""`ShardedDataset` and what the loader makes of its columns."""

from __future__ import annotations

import functools
import io
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from stream_support import FlakyStore, write_prepared

from distdl.data import ArrayRows, Batch, Concatenated, Ragged, ShardedDataset, loader, make_order
from distdl.data.loading.images import decode
from distdl.data.loading.tensors import to_tensors
from distdl.data.order.kinds import Block
from distdl.errors import DataError


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTDL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return ShardedDataset("fashion_mnist", split="test")


def test_rows_for_a_person(fashion: ShardedDataset) -> None:
    assert len(fashion) == sum(fashion.shard_rows) == 2000
    assert fashion[-1]["image"].shape == (28, 28)
    assert fashion[5:8]["label"].tolist() == [fashion[i]["label"] for i in (5, 6, 7)]
    assert fashion[[3, -1]]["label"].tolist() == [fashion[3]["label"], fashion[1999]["label"]]
    assert fashion[10:0:-4]["label"].tolist() == [fashion[i]["label"] for i in (10, 6, 2)]
    with pytest.raises(IndexError, match="row 2000 of 2000"):
        fashion[2000]
    assert "rows=2000" in repr(fashion)


def test_it_pickles_as_its_files(fashion: ShardedDataset) -> None:
    raw = pickle.dumps(fashion)
    assert len(raw) < 4000
    assert pickle.loads(raw)[7]["label"] == fashion[7]["label"]  # noqa: S301 - made above


def test_no_lengths_where_there_are_none(fashion: ShardedDataset) -> None:
    assert fashion.sequence_columns == []
    with pytest.raises(DataError, match="no stored offsets"):
        fashion.offsets("image")
    with pytest.raises(DataError, match="length_bucketed"):
        loader(fashion, 8, order="length_bucketed")


def test_an_epoch_in_tensors(fashion: ShardedDataset) -> None:
    with loader(fashion, 300) as batches:
        found = list(batches)
    assert [len(b["label"]) for b in found] == [300] * 6 + [200]
    assert found[0]["image"].dtype == torch.uint8
    labels = torch.cat([b["label"] for b in found]).bincount()
    assert labels.tolist() == [200] * 10


def test_varying_columns_are_padded() -> None:
    inner = Ragged(np.arange(6, dtype=np.int32), np.array([1, 3, 0, 2]))
    batch = {
        "x": Ragged(np.array([1.0, 2.0, 3.0]), np.array([1, 0, 2])),
        "y": Ragged(inner, np.array([2, 0, 2])),
        "s": Ragged(np.frombuffer(b"ab\xc3\xa9", np.uint8), np.array([2, 0, 2]), True),
    }
    found = to_tensors(batch, {"x": -1, "y": 9})
    assert found["x"].tolist() == [[1, -1], [-1, -1], [2, 3]]
    assert found["x_lengths"].tolist() == [1, 0, 2]
    assert found["y"].tolist() == [[[0, 9, 9], [1, 2, 3]], [[9] * 3] * 2, [[9] * 3, [4, 5, 9]]]
    assert found["y_item_lengths"].tolist() == [[1, 3], [0, 0], [0, 2]]
    assert found["y"].dtype == torch.int32
    assert found["s"] == ["ab", "", "é"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_column_called_like_the_lengths_of_another_is_refused(nested: bool, first: bool) -> None:
    column = Ragged(np.arange(3), np.array([1, 0, 2]))
    name = "text_lengths"
    if nested:
        column, name = Ragged(column, np.array([1, 0, 2])), "text_item_lengths"
    batch = {name: np.zeros(3), "text": column} if first else {"text": column, name: np.zeros(3)}
    with pytest.raises(DataError, match=f"'text'.*'{name}'|'{name}'.*'text'"):
        to_tensors(batch)
    with loader(ArrayRows(batch), 2) as batches, pytest.raises(DataError, match=f"{name}"):
        next(iter(batches))
    text = Ragged(np.zeros(3, np.uint8), np.array([1, 0, 2]), True)
    assert list(to_tensors({"text": text, name: np.zeros(3)})) == ["text", name]


def png(size: int, value: int) -> bytes:
    image = pytest.importorskip("PIL.Image").new("RGB", (size, size), (value, 0, 0))
    raw = io.BytesIO()
    image.save(raw, "png")
    return raw.getvalue()


def test_images_are_decoded() -> None:
    files = [png(4, 10), png(6, 20)]
    column = Ragged(np.frombuffer(b"".join(files), np.uint8), np.array([len(f) for f in files]), False)
    rows = ArrayRows({"image.bytes": column, "label": np.array([1, 2])})
    with loader(rows, 2, order="sequential", transform=functools.partial(decode, size=(5, 3))) as batches:
        (batch,) = batches
    assert batch["image"].shape == (2, 5, 3, 3)
    assert batch["image"][:, 0, 0, 0].tolist() == [10, 20]
    with pytest.raises(DataError, match="give a size"):
        decode(rows.gather(np.array([0, 1])), 0)
    with pytest.raises(DataError, match="does not hold encoded images"):
        decode({"label": np.zeros(2)}, 0)


UNFIT: list[dict[str, object]] = [
    {"batch_size": 0},
    {"batch_size": 99, "drop_last": True},
    {"workers": -1},
    {"prefetch": 1.5},
    {"rank": 2, "world_size": 2},
    {"rank": 0},
    {"order": "ful"},
    {"order_options": {"windw": 3}},
]


@pytest.mark.parametrize("given", UNFIT, ids=str)
def test_arguments_that_do_not_fit_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(DataError):
        loader(ArrayRows({"x": np.zeros(9)}), **{"batch_size": 4, **given})


class Hanging(ArrayRows):
    """Rows that do not come before they are closed."""

    def __init__(self) -> None:
        super().__init__({"x": np.zeros(9)})
        self.asked, self.closed = threading.Event(), threading.Event()

    def gather(self, ids: np.ndarray, allocate: object = None) -> Batch:
        self.asked.set()
        assert self.closed.wait(60), "nobody closed the rows"
        raise RuntimeError("closed")

    def close(self) -> None:
        self.closed.set()


def test_closing_a_loader_ends_the_wait_of_its_rows() -> None:
    rows = Hanging()
    batches = loader(rows, 4, prefetch=1)

    def read() -> None:
        with pytest.raises(RuntimeError, match="closed"):
            next(iter(batches))

    waiting = threading.Thread(target=read)
    waiting.start()
    assert rows.asked.wait(30)
    batches.close()
    waiting.join(30)
    assert not waiting.is_alive()
    assert rows.closed.is_set()


@pytest.mark.parametrize("view", [False, True])
def test_a_dead_server_does_not_keep_a_loader_from_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: bool
) -> None:
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))
    FlakyStore.reset()
    write_prepared(tmp_path / "far", 4)
    data = ShardedDataset(f"flaky://{tmp_path / 'far'}", retry_s=15)
    asked, alive = threading.Event(), threading.Event()

    def fault(self: FlakyStore, path: str, local: str = "") -> None:
        if "data-00003" in path and not alive.is_set():
            asked.set()
            raise ConnectionError("the server is gone")

    monkeypatch.setattr(FlakyStore, "_fault", fault)
    rows = Concatenated([data]) if view else data
    with loader(rows, 100, order="sequential", prefetch=2) as batches:
        steps = iter(batches)
        assert next(steps)["id"][0] == 0  # the others are gathered together, ahead
        assert asked.wait(10)
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    alive.set()
    assert data[399]["id"] == 399  # the dataset itself is open still
    with loader(rows, 100, order="sequential") as batches:
        assert sum(len(batch["id"]) for batch in batches) == 400
    data.close()


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def test_threads_are_those_that_were_asked_for_and_end() -> None:
    rows, before = ArrayRows({"x": np.zeros(9)}), threads()
    for given, extra in (({"prefetch": 0}, 0), ({"prefetch": 2}, 2), ({}, None)):
        with loader(rows, 4, **given) as batches:
            state = batches.state_dict()
            next(iter(batches))
            assert extra is None or len(threads() - before) == extra
            batches.load_state_dict(state)
            assert threads() == before
            next(iter(batches))
        assert threads() == before


def test_a_window_of_block_is_that_of_recipes() -> None:
    from distdl.recipe.schema import Data

    order = make_order("block", seed=0, rows=9, shard_rows=[9])
    assert order.window == Data.model_fields["block_window"].default == Block(0, [9]).window
