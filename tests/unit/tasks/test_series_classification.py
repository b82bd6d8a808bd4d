"""Series classification: columns, padding, standardisation, and learning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from distdl.data.table.ragged import Ragged
from distdl.errors import DataError
from distdl.models import model_factory
from distdl.samples import DataInfo, Field
from distdl.tasks import build_task
from distdl.tasks.series_classification import standardised

LABEL = Field("int64", (), 3)


def task(shape: tuple[int | None, ...], model: str = "gru", **keys: Any) -> Any:
    data = DataInfo("s", {"train": 1}, {"series": Field("float", shape), "label": LABEL}, "f")
    options = {"width": 4} if model == "fcn1d" else {"hidden": 4, "embedding": 3}
    return build_task("series_classification", keys, model_factory(model, options), data)


def ragged(*lengths: int, channels: int = 2) -> Ragged:
    values = np.random.default_rng(0).normal(3, 2, (sum(lengths), channels)).astype(np.float32)
    return Ragged(values, np.array(lengths, np.int64))


@pytest.mark.parametrize(
    ("shape", "model", "features"),
    [((6,), "fcn1d", 1), ((6, 2), "fcn1d", 2), ((6,), "gru", 1), ((6, 2), "gru", 2)],
)
def test_series_of_one_length(shape: tuple[int, ...], model: str, features: int) -> None:
    mine = task(shape, model)
    stored = np.random.default_rng(0).normal(size=(5, *shape))
    batch = mine.collate({"series": stored, "label": np.array([0, 1, 2, 0, 1])})
    assert set(batch) == {"series", "labels"}
    assert (batch["series"].shape, batch["series"].dtype) == ((5, 6, features), torch.float32)
    np.testing.assert_array_equal(batch["series"].numpy(), stored.reshape(5, 6, features).astype(np.float32))
    assert torch.isfinite(mine.loss_sum(mine.build_model(), batch))


def test_what_fills_up_short_rows_changes_nothing() -> None:
    torch.manual_seed(0)
    mine = task((None, 2))
    model, rows, labels = mine.build_model(), ragged(4, 1, 6), np.array([0, 2, 1])
    together = mine.collate({"series": rows, "label": labels})
    assert together["series"].shape == (3, 6, 2)
    assert together["lengths"].tolist() == [4, 1, 6]
    assert not together["series"][1, 1:].any()
    parts = [mine.collate({"series": rows.rows(i, i + 1), "label": labels[i : i + 1]}) for i in range(3)]
    torch.testing.assert_close(
        sum(mine.loss_sum(model, p) for p in parts), mine.loss_sum(model, together), atol=1e-6, rtol=0
    )
    together["series"] = functional.pad(together["series"], (0, 0, 0, 3), value=mine.padding["series"])
    torch.testing.assert_close(
        sum(mine.loss_sum(model, p) for p in parts), mine.loss_sum(model, together), atol=1e-6, rtol=0
    )


def test_one_channel_of_varying_length_and_rows_without_a_step() -> None:
    batch = task((None,)).collate(
        {"series": Ragged(np.array([1.0, 2.0]), np.array([2, 0])), "label": np.array([0, 1])}
    )
    assert batch["series"].tolist() == [[[1.0], [2.0]], [[0.0], [0.0]]]
    none = Ragged(np.zeros((0, 2), np.float32), np.array([0]))
    assert task((None, 2)).collate({"series": none, "label": np.array([0])})["series"].shape == (1, 1, 2)


def test_standardised_over_real_steps_alone() -> None:
    rows = ragged(4, 1, 6)
    batch = task((None, 2), standardise=True).collate({"series": rows, "label": np.array([0, 1, 2])})
    for row, one in zip(batch["series"].numpy(), rows.tolist(), strict=True):
        own = np.array(one)
        expected = (own - own.mean(0)) / np.where(own.std(0) > 0, own.std(0), np.inf)
        np.testing.assert_allclose(row[: len(own)], expected, atol=1e-5)
        assert not row[len(own) :].any()
    assert not standardised(np.full((1, 3, 1), 7, np.float32), np.ones((1, 3), bool)).any()


def test_losses_and_metrics_are_sums() -> None:
    torch.manual_seed(0)
    mine = task((6, 2), label_smoothing=0.1)
    model = mine.build_model()
    batch = mine.collate(
        {"series": np.random.default_rng(0).normal(size=(3, 6, 2)), "label": np.array([0, 2, 1])}
    )
    with torch.no_grad():
        logits = model(batch["series"]).numpy().astype(float)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        target = np.full((3, 3), 0.1 / 3) + 0.9 * np.eye(3)[[0, 2, 1]]
        assert float(mine.loss_sum(model, batch)) == pytest.approx(-(target * log_p).sum(), rel=1e-5)
        found = mine.metric_sums(model, batch)
    assert mine.count(batch) == 3
    assert found["accuracy"] == ((logits.argmax(1) == [0, 2, 1]).sum(), 3)
    assert found["loss"] == (pytest.approx(-log_p[[0, 1, 2], [0, 2, 1]].sum(), rel=1e-5), 3)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"series": Field("float", (None,))},
        {"series": Field("int32", (None,)), "label": LABEL},
        {"series": Field("float", (5, None)), "label": LABEL},
        {"a": Field("float", (5,)), "b": Field("double", (5,)), "label": LABEL},
    ],
)
def test_columns_that_do_not_suit(fields: dict[str, Field]) -> None:
    data = DataInfo("s", {"train": 1}, fields, "f")
    with pytest.raises(DataError, match="one column of real numbers over time") as caught:
        build_task("series_classification", {}, model_factory("gru", {}), data)
    assert all(name in str(caught.value) for name in fields)


@pytest.mark.parametrize("model", ["fcn1d", "gru"])
def test_it_learns(model: str) -> None:
    """Slow waves from fast ones."""
    torch.manual_seed(0)
    mine = task((12,), model)
    net, rng = mine.build_model(), np.random.default_rng(0)
    labels = rng.integers(0, 2, 32)
    waves = np.sin(np.arange(12) * np.where(labels, 2.0, 0.5)[:, None] + rng.uniform(0, 6, (32, 1)))
    batch = mine.collate({"series": waves, "label": labels})
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.03)
    for _ in range(40):
        optimizer.zero_grad()
        (mine.loss_sum(net, batch) / mine.count(batch)).backward()
        optimizer.step()
    with torch.no_grad():
        assert mine.metric_sums(net, batch)["accuracy"][0] >= 31


@pytest.mark.parametrize("level", [1e-12, 1.0, 1e12])
def test_the_unit_of_a_series_does_not_matter_to_a_standardised_one(level: float) -> None:
    real = np.ones((1, 50), bool)
    wave = np.sin(np.arange(50, dtype=np.float32))[None, :, None]
    expected = standardised(wave, real)
    assert standardised(wave * np.float32(level), real) == pytest.approx(expected, abs=1e-5)
    assert not standardised(np.full((1, 50, 1), level * 0.1, np.float32), real).any()
