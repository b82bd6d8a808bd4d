"""`ShardedDataset` and what the loader makes of its columns."""

from __future__ import annotations

import functools
import io
import pickle

import numpy as np
import pytest
import torch

from distdl.data import ArrayRows, Ragged, ShardedDataset, loader
from distdl.data.loading.images import decode
from distdl.data.loading.tensors import to_tensors
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
