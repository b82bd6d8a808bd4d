"""Class predictions, for every task that has classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distdl.errors import DataError
from distdl.tasks.base import Prediction


def labels_of(column: npt.NDArray[np.integer], name: str, classes: int) -> Tensor:
    """The labels of a batch, int64 [N]. Raises DataError for one that is no class."""
    if column.size and not 0 <= column.min() <= column.max() < classes:
        raise DataError(
            f"column {name!r} has labels from {column.min()} to {column.max()}, and {classes} classes, 0 to "
            f"{classes - 1}. Many datasets have -1 where the label is kept secret: name a split that has "
            "labels (data.eval_split), or prepare the data without such rows"
        )
    return torch.from_numpy(column.astype(np.int64))


def class_predictions(logits: Tensor, names: Sequence[str]) -> list[Prediction]:
    """Logits [N, K] -> of each row the likeliest `class`, by name or number, and its `probability`.

    Outputs beyond the names are no classes: a model may have more than it is trained to use.
    """
    logits = logits[:, : len(names) or None]
    chances, numbers = logits.float().softmax(1).max(1)
    return [
        {"class": names[k] if names else k, "probability": p}
        for k, p in zip(numbers.tolist(), chances.tolist(), strict=True)
    ]


def class_title(prediction: Prediction) -> str:
    """What a drawing says of such a prediction."""
    return f"{prediction['class']} ({prediction['probability']:.3f})"
