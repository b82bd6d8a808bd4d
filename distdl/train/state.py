"""`TrainState`: with the recipe, it determines everything that is still to happen."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """Counted at step boundaries, equal on all ranks, saved in every checkpoint.

    `step` counts steps of data trained on, `updates` those that changed the weights; they differ by the steps
    skipped for a non-finite gradient. `evaluated_step` is the last step that an evaluation was finished at.
    """

    step: int = 0
    updates: int = 0
    samples: int = 0
    nonfinite_in_row: int = 0
    evaluated_step: int = 0
    best: float | None = None
    best_step: int | None = None
    evals_without_gain: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return asdict(self)

    def note_metric(self, value: float, mode: str, min_delta: float) -> bool:
        """Take in an evaluation's metric; True where it is a new best by more than `min_delta`."""
        sign = 1.0 if mode == "max" else -1.0
        better = not math.isnan(value) and (self.best is None or sign * (value - self.best) > min_delta)
        if better:
            self.best, self.best_step, self.evals_without_gain = value, self.step, 0
        else:
            self.evals_without_gain += 1
        return better
