"""Forecasting: the next values of a series from those before, beside the simplest forecasts there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distdl.errors import DataError, RecipeError
from distdl.samples import DataInfo
from distdl.tasks.base import Batch, Prediction, Rows

HISTORY, FUTURE, SCALE = "history", "future", "scale"


class Forecasting:
    """Rows with columns `history` [H], `future` [horizon] and `scale`, real numbers; metrics MASE and sMAPE.

    The model is called with histories [N, H, 1] (float), each with mean 0 and deviation 1, and gives
    [N, horizon]: how far the future is from the last value, in deviations of the history. The loss is the
    absolute error in those units, over all steps of the horizon.

    `scale` is the error that errors are measured in: the mean absolute error of the naive forecast on the
    training part of the row's series (Hyndman and Koehler, 2006, doi:10.1016/j.ijforecast.2006.03.001).

    Measured on the same rows: `naive_*`, the last value; with `period`, `seasonal_*`, the value one period
    before; and for each of `lags` the value so many steps before, `lag12_*`.
    """

    image_field: str | None = None

    inputs = (HISTORY,)
    recent = True

    def __init__(
        self,
        make_model: Callable[..., nn.Module],
        data_info: DataInfo,
        period: int | None = None,
        lags: Sequence[int] = (),
    ) -> None:
        self._make_model = make_model
        self._steps, self._horizon = _sizes(data_info)
        seasonal = {"seasonal": period} if period else {}
        self._baselines = {"naive": 1, **seasonal, **{f"lag{k}": k for k in lags}}
        longest = max(self._baselines.values())
        if longest > self._steps:
            raise RecipeError(
                f"task.period and task.lags look back {longest} steps, and column {HISTORY!r} of dataset "
                f"{data_info.name!r} has {self._steps}: cut longer histories, or look back less far"
            )

    def build_model(self) -> nn.Module:
        return self._make_model(features=1, steps=self._steps, num_outputs=self._horizon)

    def collate(self, rows: Rows) -> Batch:
        return {name: torch.from_numpy(rows[name].astype(np.float32)) for name in (HISTORY, FUTURE, SCALE)}

    def count(self, batch: Batch) -> int:
        return batch[FUTURE].numel()

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        history = batch[HISTORY]
        return ((_forecast(model, history) - batch[FUTURE]).abs() / _spread(history)).sum()

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        history, future, scale = batch[HISTORY], batch[FUTURE], batch[SCALE]
        n = future.numel()
        if not (scale > 0).all():
            raise DataError(
                f"column {SCALE!r} has values that are not above 0; it is the mean absolute error of the "
                "naive forecast on the training part"
            )
        forecasts = {"": _forecast(model, history)}
        forecasts |= {f"{name}_": lagged(history, n // len(future), k) for name, k in self._baselines.items()}
        found = {"loss": (float(self.loss_sum(model, batch)), n)}
        for name, forecast in forecasts.items():
            found[f"{name}mase"] = (float(((forecast - future).abs() / scale[:, None]).double().sum()), n)
            found[f"{name}smape"] = (float(smape(forecast, future).double().sum()), n)
        return found

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        return [{"forecast": values} for values in _forecast(model, batch[HISTORY]).tolist()]

    def draw(self, axes: Any, row: dict[str, Any], prediction: Prediction) -> None:
        known, values = row[HISTORY], prediction["forecast"]
        after = np.arange(len(known), len(known) + len(values))
        axes.plot(known, label="history")
        if row[FUTURE].any():  # zeros stand for a future that is not known
            axes.plot(after, row[FUTURE], label="future")
        axes.plot(after, values, label="forecast")
        axes.legend()


def lagged(history: Tensor, horizon: int, lag: int) -> Tensor:
    """[N, H] -> [N, horizon]: at each step the last known value that is a multiple of `lag` steps before."""
    steps = torch.arange(horizon, device=history.device) % lag
    return history[:, history.shape[1] - lag + steps]


def smape(forecast: Tensor, future: Tensor) -> Tensor:
    """|error| over the mean of the two sizes, in percent, element by element; 0 where both are 0.

    As the M4 competition has it (Makridakis et al., 2020, doi:10.1016/j.ijforecast.2019.04.014).
    """
    size = forecast.abs() + future.abs()
    return 200 * (forecast - future).abs() / torch.where(size > 0, size, torch.ones_like(size))


def _forecast(model: nn.Module, history: Tensor) -> Tensor:
    """[N, H] -> [N, horizon], in the units of the history."""
    spread = _spread(history)
    outputs = model(((history - history.mean(1, keepdim=True)) / spread)[:, :, None]).float()
    forecast: Tensor = history[:, -1:] + spread * outputs
    return forecast


def _spread(history: Tensor) -> Tensor:
    """The deviation of each history, [N, 1]; 1 where it does not vary but for the rounding of its mean."""
    spread = history.std(1, correction=0, keepdim=True)
    largest = history.abs().amax(1, keepdim=True)
    return torch.where(spread > 5e-7 * largest, spread, torch.ones_like(spread))


def _sizes(data: DataInfo) -> tuple[int, int]:
    """(H, horizon)."""
    shapes = {n: data.fields[n].shape for n in (HISTORY, FUTURE, SCALE)}
    history, future = shapes[HISTORY], shapes[FUTURE]
    fixed = len(history) == len(future) == 1 and shapes[SCALE] == ()
    if not fixed or history[0] is None or future[0] is None:
        raise DataError(
            f"task forecasting needs columns {HISTORY} and {FUTURE}, each a list of one length in all rows, "
            f"and a number {SCALE}; dataset {data.name!r} has {shapes}. benchmarks/windows.py makes them"
        )
    return history[0], future[0]
