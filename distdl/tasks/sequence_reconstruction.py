"""Sequence reconstruction: tokens, or numbers over time, through a code and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.errors import DataError
from distdl.samples import DataInfo
from distdl.tasks.base import Batch, Prediction, Rows
from distdl.tasks.columns import words
from distdl.tasks.series_classification import is_series


class SequenceReconstruction:
    """Rows with one column of token ids, or where there is none one of real numbers over time, [T] or
    [T, channels]; of any length. Other columns are not read.

    Of tokens the model is called with ids [N, longest + 1] (int64, filled up with 0) and lengths [N] (int64),
    and gives logits [N, longest + 1, vocabulary]. The loss is the cross-entropy, in nats a token, of the
    tokens of each row and of one 0, its end; metrics: accuracy (of tokens) and loss.

    Of numbers it is called with series [N, longest, channels] (float, filled up with 0) and lengths, and
    gives as many numbers. The loss is the squared error of a number; metric: loss.
    """

    image_field: str | None = None

    padding: Mapping[str, float] = {"sequence": 0}
    """Tensor of a batch -> what fills up its dimension 1: how batches of different widths are joined."""

    def __init__(self, make_model: Callable[..., nn.Module], data_info: DataInfo) -> None:
        self._make_model = make_model
        self._field = _column(data_info)
        field = data_info.fields[self._field]
        self._vocabulary, self._decode = field.vocabulary, data_info.decode
        self._wide = len(field.shape) == 2
        self._channels = (field.shape[1] if self._wide else None) or 1
        self.inputs = (self._field,)
        self.draw = None if self._vocabulary else self._draw

    def build_model(self) -> nn.Module:
        if self._vocabulary:
            # Said in any case: a language model has no place for it, and is no model for this task.
            return self._make_model(vocabulary=self._vocabulary, features=None)
        return self._make_model(features=self._channels)

    def collate(self, rows: Rows) -> Batch:
        found = rows[self._field]
        alike = isinstance(found, np.ndarray)
        lengths = np.full(len(found), found.shape[1]) if alike else found.lengths
        longest = max(int(lengths.max(initial=0)) + bool(self._vocabulary), 1)
        sequence = found if alike else found.padded(0, longest)
        if self._vocabulary:
            self._check(found)
            sequence = torch.from_numpy(sequence.astype(np.int64))
        else:
            sequence = torch.from_numpy(sequence.astype(np.float32))
            sequence = sequence.reshape(*sequence.shape[:2], self._channels)
        return {"sequence": sequence, "lengths": torch.from_numpy(lengths.astype(np.int64))}

    def _check(self, found: Any) -> None:
        values = np.asarray(getattr(found, "values", found))
        if values.size and not 0 < values.min() <= values.max() < (self._vocabulary or 0):
            raise DataError(
                f"column {self._field!r} has tokens from {values.min()} to {values.max()}; expected 1 to "
                f"{(self._vocabulary or 0) - 1}, as 0 is the end of a row here. A tokenizer that `distdl "
                "data prepare` trains leaves 0 to padding"
            )

    def count(self, batch: Batch) -> int:
        """Tokens and ends, or numbers."""
        lengths = batch["lengths"]
        if self._vocabulary:
            return int(lengths.sum()) + len(lengths)
        return int(lengths.sum()) * self._channels

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._losses(*self._real(model, batch)).sum()

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        outputs, targets = self._real(model, batch)
        n = targets.numel()
        found: dict[str, tuple[float, int]] = {"loss": (float(self._losses(outputs, targets).sum()), n)}
        if self._vocabulary:
            found["accuracy"] = (int((outputs.argmax(1) == targets).sum()), n)
        return found

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Of each row its `loss`, how unlike the training rows it is, and `steps`; and from its code alone,
        where the model can (`given_back`), what comes back: `text` or `tokens`, or numbers, `series`.
        """
        outputs, targets = self._real(model, batch)
        lengths = batch["lengths"].tolist()
        parts = [length + bool(self._vocabulary) for length in lengths]
        losses = self._losses(outputs, targets).split(parts)
        found: list[Prediction] = [
            {"steps": n, "loss": float(loss.sum()) / max(loss.numel(), 1)}
            for n, loss in zip(lengths, losses, strict=True)
        ]
        give_back: Any = getattr(model, "given_back", None)
        if give_back is not None:
            made = give_back(batch["sequence"], batch["lengths"]).tolist()
            found = [one | self._shown(row, n) for one, row, n in zip(found, made, lengths, strict=True)]
        return found

    def _draw(self, axes: Any, row: dict[str, Any], prediction: Prediction) -> None:
        """Numbers, and what comes back."""
        axes.plot(row[self._field], label="given")
        if "series" in prediction:
            axes.plot(np.array(prediction["series"]), "--", label="given back")
            axes.legend()
        axes.set_title(f"loss {prediction['loss']:.4g}")

    def _shown(self, made: list[Any], length: int) -> Prediction:
        if not self._vocabulary:
            return {"series": [step if self._wide else step[0] for step in made[:length]]}
        made = made[: length + 1]  # further goes the longest row of the microbatch alone
        tokens = made[: made.index(0)] if 0 in made else made
        return {"text": self._decode(tokens)} if self._decode else {"tokens": tokens}

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[n], or of numbers [n, channels]."""
        if self._vocabulary:
            return functional.cross_entropy(outputs, targets, reduction="none")
        return (outputs - targets).square()

    def _real(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of all steps that are no filling: logits [n, vocabulary] and tokens [n], ends being among them; or
        outputs and numbers [n, channels].
        """
        sequence, lengths = batch["sequence"], batch["lengths"]
        steps = torch.arange(sequence.shape[1], device=sequence.device)
        real = steps < (lengths + bool(self._vocabulary))[:, None]
        return model(sequence, lengths)[real].float(), sequence[real]


def _column(data: DataInfo) -> str:
    """The column of tokens, or of numbers."""
    tokens = [n for n, f in data.fields.items() if f.shape == (None,) and f.vocabulary]
    found = tokens or [n for n, f in data.fields.items() if is_series(f)]
    if len(found) == 1:
        return found[0]
    raise DataError(
        "task sequence_reconstruction needs one column of tokens, or one of real numbers over time, [T] or "
        f"[T, channels] with any T; dataset {data.name!r} has {words(data)}. `distdl data prepare "
        "--tokenize` makes the first, of .ts files it makes the second; data.columns chooses among several"
    )
