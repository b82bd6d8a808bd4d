"""Tasks on sequences of different lengths: a class for each, or the next token at every place.

Both count what is real and never what is padding, so a mean over an epoch is the same in every order, and at
any number of processes. docs/bring-your-own.md runs them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.samples import DataInfo
from distdl.tasks import Batch, Rows


class Classify:
    """Rows with tokens of varying length and a class label. Metrics: accuracy, loss."""

    image_field = None

    def __init__(
        self,
        make_model: Callable[..., nn.Module],
        data_info: DataInfo,
        tokens: str = "tokens",
        label: str = "label",
    ) -> None:
        self._make_model, self._tokens, self._label = make_model, tokens, label
        self._classes = data_info.fields[label].num_classes

    def build_model(self) -> nn.Module:
        return self._make_model(num_outputs=self._classes)

    def collate(self, rows: Rows) -> Batch:
        found = rows[self._tokens]  # a Ragged: all tokens end to end in .values, int64 [n] in .lengths
        return {
            "tokens": torch.from_numpy(found.padded(0).astype(np.int64)),
            "lengths": torch.from_numpy(found.lengths.copy()),
            "labels": torch.from_numpy(rows[self._label].astype(np.int64)),
        }

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["tokens"], batch["lengths"])
        return functional.cross_entropy(logits.float(), batch["labels"], reduction="sum")

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        logits, labels = model(batch["tokens"], batch["lengths"]).float(), batch["labels"]
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        return {
            "accuracy": (int((logits.argmax(1) == labels).sum()), len(labels)),
            "loss": (float(loss), len(labels)),
        }


class NextToken:
    """Rows with tokens, packed or not. Metric: loss, in nats a token.

    What begins a document is no target: nothing before it says what it is. So packed rows, which do not lose
    the tokens at their ends, have the same targets as whole documents.
    """

    image_field = None

    def __init__(self, make_model: Callable[..., nn.Module], vocab_size: int, tokens: str = "tokens") -> None:
        self._make_model, self._vocab_size, self._tokens = make_model, vocab_size, tokens

    def build_model(self) -> nn.Module:
        return self._make_model(num_outputs=self._vocab_size)

    def collate(self, rows: Rows) -> Batch:
        found = rows[self._tokens]
        if f"{self._tokens}_segments" in rows:  # packed: which document each token is of, 0 where filled up
            tokens, segments = found, rows[f"{self._tokens}_segments"]
            real = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        else:
            tokens = found.padded(0, max(int(found.lengths.max()), 2))  # an LSTM needs a place to stand at
            real = np.arange(1, tokens.shape[1]) < found.lengths[:, None]
        return {
            "tokens": torch.from_numpy(tokens.astype(np.int64)),
            "real": torch.from_numpy(np.ascontiguousarray(real)),
        }

    def count(self, batch: Batch) -> int:
        return int(batch["real"].sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens, real = batch["tokens"], batch["real"]
        logits = model(tokens[:, :-1]).float()
        return functional.cross_entropy(logits[real], tokens[:, 1:][real], reduction="sum")

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        return {"loss": (float(self.loss_sum(model, batch)), self.count(batch))}


class Pooled(nn.Module):
    """Mean of the embeddings of a row's tokens -> logits."""

    def __init__(self, num_outputs: int, vocab_size: int, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        total = (self.embed(tokens) * real[:, :, None]).sum(1)
        logits: Tensor = self.head(total / lengths[:, None].clamp(min=1))
        return logits


class Recurrent(nn.Module):
    """An LSTM over tokens -> logits at every place. With `layers` 0, a place sees its own token alone."""

    def __init__(self, num_outputs: int, width: int = 16, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_outputs, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True) if layers else None
        self.head = nn.Linear(width, num_outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.embed(tokens)
        if self.lstm is not None:
            found, _ = self.lstm(found)
        logits: Tensor = self.head(found)
        return logits
