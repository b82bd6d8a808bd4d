"""Contract 3: a loss is a sum and a count; and a task of a user's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_support import images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from distdl.errors import DataError, RecipeError
from distdl.samples import DataInfo, Field
from distdl.tasks import Task, build_task


class Asked:
    """A model factory that notes what it is asked for; the model flattens and multiplies."""

    def __call__(self, in_channels: int, num_outputs: int, input_shape: tuple[int, ...]) -> nn.Module:
        self.seen = (in_channels, num_outputs, input_shape)
        return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(input_shape)), num_outputs))


def classification(shape: tuple[int, ...], **keys: Any) -> tuple[Task, Asked]:
    asked = Asked()
    return build_task("image_classification", keys, asked, images(shape)), asked


@pytest.mark.parametrize(
    ("stored", "seen"),
    [
        ((6, 5), (1, 6, 5)),
        ((6, 5, 1), (1, 6, 5)),
        ((6, 5, 3), (3, 6, 5)),
        ((1, 6, 5), (1, 6, 5)),
        ((3, 6, 5), (3, 6, 5)),
        ((4, 6, 7), (4, 6, 7)),
    ],
)
def test_images_arrive_as_channels_height_width(stored: tuple[int, ...], seen: tuple[int, ...]) -> None:
    task, asked = classification(stored)
    task.build_model()
    assert asked.seen == (seen[0], 10, seen)
    pixels = np.random.default_rng(0).integers(0, 256, (7, *stored), dtype=np.uint8)
    batch = task.collate({"image": pixels, "label": np.arange(7)})
    assert batch["images"].shape == (7, *seen)
    assert batch["images"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    channels_first = pixels
    if len(stored) == 2:
        channels_first = pixels[:, None]
    elif stored[-1] == seen[0] and stored[0] != seen[0]:
        channels_first = pixels.transpose(0, 3, 1, 2)
    expected = torch.tensor(channels_first / 127.5 - 1, dtype=torch.float32)
    torch.testing.assert_close(batch["images"], expected)


def test_pixels_fill_minus_one_to_one() -> None:
    task, _ = classification((1, 2))
    rows = {"image": np.array([[[0, 255]]], np.uint8), "label": np.array([3])}
    assert task.collate(rows)["images"].flatten().tolist() == [-1.0, 1.0]
    assert rows["image"].tolist() == [[[0, 255]]]


def some_batch(task: Task, n: int, seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return task.collate(
        {"image": rng.integers(0, 256, (n, 4, 3), dtype=np.uint8), "label": rng.integers(0, 10, n)}
    )


@settings(max_examples=25)
@given(n=st.integers(1, 20), cut=st.integers(1, 19), smoothing=st.sampled_from([0.0, 0.1]))
def test_losses_and_metrics_are_sums(n: int, cut: int, smoothing: float) -> None:
    task, _ = classification((4, 3), label_smoothing=smoothing)
    torch.manual_seed(n)
    model = task.build_model()
    batch = some_batch(task, n, cut)
    assert task.count(batch) == n
    loss = task.loss_sum(model, batch)
    assert loss.shape == ()
    mean = functional.cross_entropy(model(batch["images"]), batch["labels"], label_smoothing=smoothing)
    torch.testing.assert_close(loss, mean * n)

    parts = [{k: t[:cut] for k, t in batch.items()}, {k: t[cut:] for k, t in batch.items()}]
    parts = [p for p in parts if task.count(p)]
    assert sum(task.count(p) for p in parts) == n
    torch.testing.assert_close(torch.stack([task.loss_sum(model, p) for p in parts]).sum(), loss)
    with torch.no_grad():
        whole, pieces = task.metric_sums(model, batch), [task.metric_sums(model, p) for p in parts]
        right = int((model(batch["images"]).argmax(1) == batch["labels"]).sum())
        plain = float(functional.cross_entropy(model(batch["images"]), batch["labels"], reduction="sum"))
    assert whole["accuracy"] == (right, n)
    assert whole["loss"][0] == pytest.approx(plain, rel=1e-5)  # what is reported is not smoothed
    for name, (total, count) in whole.items():
        assert sum(p[name][0] for p in pieces) == pytest.approx(total, rel=1e-5)
        assert sum(p[name][1] for p in pieces) == count == n


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"label": Field("int64", (), 10)},
        {"image": Field("uint8", (4, 4))},
        {"image": Field("float32", (4, 4)), "label": Field("int64", (), 10)},
        {"image": Field("uint8", (16,)), "label": Field("int64", (), 10)},
        {"image": Field("uint8", (4, 4)), "label": Field("int64", ())},
        {"a": Field("uint8", (4, 4)), "b": Field("uint8", (4, 4)), "label": Field("int64", (), 10)},
        {"image": Field("uint8", (4, 4)), "label": Field("int64", (), 10), "fine": Field("int64", (), 99)},
    ],
)
def test_columns_that_do_not_suit(fields: dict[str, Field]) -> None:
    data = DataInfo("pictures", {"train": 1}, fields, "f")
    with pytest.raises(DataError, match="one uint8 image column") as caught:
        build_task("image_classification", {}, Asked(), data)
    assert all(name in str(caught.value) for name in fields)


TASKS = """
import torch

class Whole:
    def __init__(self, make_model, alpha=1.0):
        self.make_model, self.alpha = make_model, alpha
    def build_model(self): return self.make_model(in_channels=1, num_outputs=1, input_shape=(1,))
    def collate(self, rows): return {}
    def count(self, batch): return 0
    def loss_sum(self, model, batch): return torch.zeros(())
    def metric_sums(self, model, batch): return {}

class WithImages(Whole):
    image_field = "photo"

class Halfway:
    def __init__(self): pass
    def build_model(self): ...
    count = 3
    def loss_sum(self, model, batch): ...

class KnowsItsData(Whole):
    def __init__(self, make_model, data_info):
        super().__init__(make_model)
        self.rows = data_info.rows["train"]
"""


@pytest.fixture
def user_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "core_user_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "core_user_tasks", raising=False)


@pytest.mark.usefixtures("user_tasks")
def test_a_users_own() -> None:
    asked = Asked()
    task: Any = build_task("core_user_tasks:Whole", {"alpha": 0.5}, asked, images())
    assert (task.alpha, task.make_model, task.image_field) == (0.5, asked, None)
    assert build_task("core_user_tasks:WithImages", {}, asked, images()).image_field == "photo"
    task = build_task("core_user_tasks:KnowsItsData", {}, asked, images(rows=77))
    assert task.rows == 77


@pytest.mark.usefixtures("user_tasks")
@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("core_user_tasks:Halfway", {}, "a task needs collate, count, metric_sums"),
        ("core_user_tasks:Whole", {"beta": 1}, r"calling it with \['beta'\] of the recipe failed.*'beta'"),
        ("core_user_tasks:Hole", {}, "did you mean 'Whole'"),
        ("core_user_absent:Whole", {}, "ModuleNotFoundError"),
    ],
)
def test_a_users_own_that_is_wrong(name: str, keys: dict[str, int], says: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s)task.name = '{name}'.*{says}"):
        build_task(name, keys, Asked(), images())
