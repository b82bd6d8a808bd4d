"""Forecasting: MASE, sMAPE and the baselines against plain numpy; windows by time."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from distdl.data.description import describe_data
from distdl.errors import DataError, RecipeError
from distdl.models import model_factory
from distdl.recipe.schema import Data
from distdl.samples import DataInfo, Field
from distdl.tasks import build_task, forecasting
from distdl.tasks.forecasting import lagged

ROOT = Path(__file__).resolve().parents[3]
RNG = np.random.default_rng(0)
ROWS = {
    "history": RNG.normal(50, 20, (4, 6)),
    "future": RNG.normal(50, 20, (4, 3)),
    "scale": np.array([2.0, 3.0, 2.0, 5.0]),
}


class Drift(nn.Module):
    """Outputs that depend on the last step alone."""

    def __init__(self, horizon: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.1, 0.3, horizon))

    def forward(self, series: Tensor) -> Tensor:
        return series[:, -1] * self.weight


def task(history: int = 6, horizon: int = 3, make: Any = None, **keys: Any) -> Any:
    fields = {
        "history": Field("float", (history,)),
        "future": Field("float", (horizon,)),
        "scale": Field("float"),
    }
    return build_task(
        "forecasting", keys, make or (lambda **_: Drift()), DataInfo("s", {"train": 1}, fields, "f")
    )


def by_hand(forecast: Any) -> tuple[float, float]:
    future = ROWS["future"]
    error = np.abs(forecast - future)
    mase = (error / ROWS["scale"][:, None]).mean()
    return float(mase), float((200 * error / (np.abs(forecast) + np.abs(future))).mean())


def test_metrics_are_those_of_plain_numpy() -> None:
    mine = task(period=4, lags=[2])
    model, history = mine.build_model(), ROWS["history"]
    batch = mine.collate(ROWS)
    with torch.no_grad():
        sums = mine.metric_sums(model, batch)
        loss = float(mine.loss_sum(model, batch))
    found = {name: total / count for name, (total, count) in sums.items()}
    spread = history.std(1, keepdims=True)
    last = ((history - history.mean(1, keepdims=True)) / spread)[:, -1:]
    forecast = history[:, -1:] + spread * last * np.array([0.1, 0.2, 0.3])
    expected = {
        "": forecast,
        "naive_": history[:, [5, 5, 5]],
        "seasonal_": history[:, [2, 3, 4]],
        "lag2_": history[:, [4, 5, 4]],
    }
    for name, values in expected.items():
        assert (found[f"{name}mase"], found[f"{name}smape"]) == pytest.approx(by_hand(values), rel=1e-5)
    assert len(found) == 9
    assert mine.count(batch) == 12
    assert loss == pytest.approx((np.abs(forecast - ROWS["future"]) / spread).sum(), rel=1e-5)
    assert found["loss"] == pytest.approx(loss / 12)


def test_a_history_that_does_not_vary_and_values_of_zero() -> None:
    mine = task()
    zeros = {"history": np.zeros((1, 6)), "future": np.zeros((1, 3)), "scale": np.ones(1)}
    batch = mine.collate(zeros)
    with torch.no_grad():
        assert all(total == 0 for total, _ in mine.metric_sums(mine.build_model(), batch).values())
    batch = mine.collate({**zeros, "scale": np.zeros(1)})
    with pytest.raises(DataError, match="'scale' has values that are not above 0"):
        mine.metric_sums(mine.build_model(), batch)


def test_a_prediction_is_in_the_units_of_the_history() -> None:
    mine = task()
    model = mine.build_model()
    with torch.no_grad():
        found = mine.predict(model, mine.collate({**ROWS, "future": np.zeros((4, 3)), "scale": np.zeros(4)}))
        nothing = mine.predict(lambda series: torch.zeros(len(series), 3), mine.collate(ROWS))
    history = ROWS["history"]
    drift = (history[:, -1] - history.mean(1))[:, None] * [0.1, 0.2, 0.3]
    np.testing.assert_allclose([p["forecast"] for p in found], history[:, -1:] + drift, rtol=1e-5)
    np.testing.assert_allclose([p["forecast"] for p in nothing], history[:, [5, 5, 5]], rtol=1e-6)


def test_a_forecast_moves_and_stretches_with_its_history() -> None:
    mine = task()
    model, moved = mine.build_model(), {**ROWS, **{n: 3 * ROWS[n] + 7 for n in ("history", "future")}}
    torch.testing.assert_close(
        mine.loss_sum(model, mine.collate(moved)), mine.loss_sum(model, mine.collate(ROWS)), rtol=1e-4, atol=0
    )


def test_a_lag_repeats_where_the_horizon_is_longer() -> None:
    assert lagged(torch.arange(5.0)[None], 6, 2).tolist() == [[3, 4, 3, 4, 3, 4]]
    assert lagged(torch.arange(5.0)[None], 3, 5).tolist() == [[0, 1, 2]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"look back 7 steps.*'history'.* has 6"):
        task(period=7)
    fields = {"history": Field("float", (None,)), "future": Field("float", (3,)), "scale": Field("float")}
    with pytest.raises(DataError, match="each a list of one length"):
        build_task("forecasting", {}, model_factory("lstm", {}), DataInfo("s", {"train": 1}, fields, "f"))


def test_it_learns_a_wave_better_than_the_last_value() -> None:
    torch.manual_seed(0)
    wave = np.sin(np.arange(140) * 2 * np.pi / 12)
    at = np.arange(12, 136)
    rows = {
        "history": wave[at[:, None] + np.arange(-12, 0)],
        "future": wave[at[:, None] + np.arange(3)],
        "scale": np.full(len(at), 0.3),
    }
    mine = task(12, 3, model_factory("lstm", {"hidden": 12, "embedding": 4}))
    model, batch = mine.build_model(), mine.collate(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        (mine.loss_sum(model, batch) / mine.count(batch)).backward()
        optimizer.step()
    with torch.no_grad():
        found = mine.metric_sums(model, batch)
    assert found["mase"][0] < 0.3 * found["naive_mase"][0]


def test_windows_of_a_later_part_are_never_trained_on(tmp_path: Path) -> None:
    series = np.arange(40.0) ** 2
    (tmp_path / "s.csv").write_text("day,value\n" + "".join(f"{i},{v}\n" for i, v in enumerate(series)))
    script = runpy.run_path(str(ROOT / "benchmarks" / "windows.py"))
    sizes = [
        "--history",
        "5",
        "--horizon",
        "3",
        "--validation",
        "8",
        "--test",
        "10",
        "--out",
        str(tmp_path / "w"),
    ]
    given = ["--series", str(tmp_path / "s.csv"), "--column", "value"]
    assert script["main"]([*given, *sizes]) == 0
    found = {
        s: pq.read_table(tmp_path / "w" / f"{s}.parquet").to_pydict() for s in ("train", "validation", "test")
    }
    assert {s: len(rows["future"]) for s, rows in found.items()} == {"train": 15, "validation": 6, "test": 8}
    assert max(max(f) for f in found["train"]["future"]) == 21**2
    assert found["validation"]["history"][0] == [17**2, 18**2, 19**2, 20**2, 21**2]
    assert found["test"]["future"][-1] == [37**2, 38**2, 39**2]
    assert set(found["test"]["scale"]) == {np.float32(np.diff(series[:22]).mean())}
    fields = describe_data(Data(path=str(tmp_path / "w"))).fields
    assert (fields["history"].shape, fields["future"].shape, fields["scale"].shape) == ((5,), (3,), ())
    assert script["main"]([*given, *sizes[:6], "--test", "40", "--out", str(tmp_path / "x")]) == 5
    holes = script["filled"](np.array([1.0, np.nan, 3.0]))
    assert holes.tolist() == [1, 2, 3]


@pytest.mark.parametrize("level", [21.7, 1013.2, 100_000.3, 1e-9])
def test_a_history_that_does_not_vary_is_not_scaled_by_its_rounding(level: float) -> None:
    history = torch.full((1, 132), level)
    assert forecasting._spread(history).item() == 1
    wave = level * (1 + 0.1 * torch.sin(torch.arange(132.0)))[None]
    assert forecasting._spread(wave).item() == pytest.approx(level * 0.0708, rel=0.02)
