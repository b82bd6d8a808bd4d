"""Class predictions, for every task that has classes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distdl.tasks.base import Prediction


def class_predictions(logits: Tensor, names: Sequence[str]) -> list[Prediction]:
    """Logits [N, K] -> of each row the likeliest `class`, by name or number, and its `probability`."""
    chances, numbers = logits.float().softmax(1).max(1)
    return [
        {"class": names[k] if names else k, "probability": p}
        for k, p in zip(numbers.tolist(), chances.tolist(), strict=True)
    ]


def class_title(prediction: Prediction) -> str:
    """What a drawing says of such a prediction."""
    return f"{prediction['class']} ({prediction['probability']:.3f})"
