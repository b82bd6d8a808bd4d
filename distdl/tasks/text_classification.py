"""Text classification: tokens of varying length to one of N classes; cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.errors import DataError
from distdl.samples import DataInfo
from distdl.tasks.base import Batch, Prediction, Rows
from distdl.tasks.classes import class_predictions, labels_of
from distdl.tasks.columns import words
from distdl.tasks.tokens import check_tokens, token_columns, vocabulary_of


class TextClassification:
    """Rows with one column of token ids (integers, varying length) and one class-label column.

    The model is called with token ids [N, longest] (int64, short rows filled up with 0) and lengths [N]
    (int64).
    """

    image_field: str | None = None

    padding: Mapping[str, int] = {"tokens": 0}
    """Tensor of a batch -> what fills up its dimension 1: how batches of different widths are joined."""

    def __init__(
        self,
        make_model: Callable[..., nn.Module],
        data_info: DataInfo,
        label_smoothing: float = 0.0,
        vocabulary: int | None = None,
    ) -> None:
        self._make_model = make_model
        self._smoothing = label_smoothing
        self._token_field, self._label_field = _columns(data_info)
        self._num_classes = data_info.fields[self._label_field].num_classes or 0
        self._classes = data_info.fields[self._label_field].classes
        self.inputs = (self._token_field,)
        self._vocabulary = vocabulary_of(data_info, self._token_field, vocabulary)

    def build_model(self) -> nn.Module:
        return self._make_model(vocabulary=self._vocabulary, num_outputs=self._num_classes)

    def collate(self, rows: Rows) -> Batch:
        ragged = rows[self._token_field]
        check_tokens(ragged.values, self._token_field, self._vocabulary)
        longest = max(int(ragged.lengths.max(initial=1)), 1)
        return {
            "tokens": torch.from_numpy(ragged.padded(0, longest).astype(np.int64)),
            "lengths": torch.from_numpy(ragged.lengths.astype(np.int64)),
            "labels": labels_of(rows[self._label_field], self._label_field, self._num_classes),
        }

    def count(self, batch: Batch) -> int:
        return batch["labels"].shape[0]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["tokens"], batch["lengths"])
        return functional.cross_entropy(
            logits.float(), batch["labels"], reduction="sum", label_smoothing=self._smoothing
        )

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        logits, labels = model(batch["tokens"], batch["lengths"]).float(), batch["labels"]
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(1) == labels).sum()
        n = labels.shape[0]
        return {"accuracy": (int(correct), n), "loss": (float(loss), n)}

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        return class_predictions(model(batch["tokens"], batch["lengths"]), self._classes)


def _columns(data: DataInfo) -> tuple[str, str]:
    tokens = token_columns(data)
    labels = [n for n, f in data.fields.items() if f.num_classes and not f.shape]
    if len(tokens) == 1 and len(labels) == 1:
        return tokens[0], labels[0]
    raise DataError(
        "task text_classification needs one column of token ids, lists of integers of varying length, and "
        f"one ClassLabel column; dataset {data.name!r} has {words(data)}. `distdl data prepare` with "
        "--tokenize and --classes makes them; data.columns chooses among several"
    )
