"""Sequence reconstruction: token sequences through a code and back; cross-entropy of every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.errors import DataError
from distdl.samples import DataInfo
from distdl.tasks.base import Batch, Prediction, Rows


class SequenceReconstruction:
    """Rows with one column of token ids (integers, varying length); other columns are not read.

    The model is called with token ids [N, longest + 1] (int64, filled up with 0) and lengths [N] (int64), and
    gives logits [N, longest + 1, vocabulary]. The loss counts the tokens of each row and one 0, its end.
    Metrics: accuracy (of tokens) and loss, in nats a token.
    """

    image_field: str | None = None

    padding: Mapping[str, int] = {"tokens": 0}
    """Tensor of a batch -> what fills up its dimension 1: how batches of different widths are joined."""

    def __init__(self, make_model: Callable[..., nn.Module], data_info: DataInfo) -> None:
        self._make_model = make_model
        self._token_field, self._vocabulary = _column(data_info)
        self.inputs = (self._token_field,)

    def build_model(self) -> nn.Module:
        return self._make_model(vocabulary=self._vocabulary)

    def collate(self, rows: Rows) -> Batch:
        ragged = rows[self._token_field]
        longest = int(ragged.lengths.max(initial=0)) + 1
        return {
            "tokens": torch.from_numpy(ragged.padded(0, longest).astype(np.int64)),
            "lengths": torch.from_numpy(ragged.lengths.astype(np.int64)),
        }

    def count(self, batch: Batch) -> int:
        return int(batch["lengths"].sum()) + len(batch["lengths"])

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, targets = _real(model, batch)
        return functional.cross_entropy(logits, targets, reduction="sum")

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        logits, targets = _real(model, batch)
        loss = functional.cross_entropy(logits, targets, reduction="sum")
        correct, n = (logits.argmax(1) == targets).sum(), len(targets)
        return {"accuracy": (int(correct), n), "loss": (float(loss), n)}

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Of each row the loss a token: how unlike the training rows it is."""
        found = []
        for i, length in enumerate(batch["lengths"].tolist()):
            row = {name: t[i : i + 1] for name, t in batch.items()}
            total = float(self.loss_sum(model, row))
            found.append({"tokens": length, "loss": total / (length + 1)})
        return found


def _real(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary] and targets [n] of all real tokens and ends."""
    tokens, lengths = batch["tokens"], batch["lengths"]
    real = torch.arange(tokens.shape[1], device=tokens.device) <= lengths[:, None]
    return model(tokens, lengths)[real].float(), tokens[real]


def _column(data: DataInfo) -> tuple[str, int]:
    """The column of tokens, and how many different ones it has."""
    found = [n for n, f in data.fields.items() if f.shape == (None,) and f.vocabulary]
    if len(found) == 1:
        return found[0], data.fields[found[0]].vocabulary or 0
    raise DataError(
        f"task sequence_reconstruction needs one column of tokens; dataset {data.name!r} has "
        f"{', '.join(found) or 'none'} among {', '.join(data.fields)}. `distdl data prepare --tokenize` "
        "makes it; data.columns chooses among several"
    )
