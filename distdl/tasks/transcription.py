"""Transcription: an image to a string of symbols of any length; connectionist temporal classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.errors import DataError
from distdl.samples import DataInfo
from distdl.tasks.base import Batch, Prediction, Rows
from distdl.tasks.columns import words
from distdl.tasks.pictures import Pictures, is_image
from distdl.tasks.tokens import token_columns, vocabulary_of


class Transcription:
    """Rows with one image column and one column of symbols (token ids, varying length).

    The loss of a row is the negative log-probability of its whole string (Graves et al., 2006), and the count
    is rows. The model gives logits [N, steps, symbols + 1], the last of which is the blank. `accuracy` is the
    share of strings that are right throughout, `error_rate` the edits (Levenshtein, 1966) that turn what was
    found into what was wanted, for each wanted symbol; greedy: the best symbol of each step.
    """

    def __init__(self, make_model: Callable[..., nn.Module], data_info: DataInfo) -> None:
        self._make_model = make_model
        images = [n for n, f in data_info.fields.items() if is_image(f)]
        symbols = token_columns(data_info)
        if len(images) != 1 or len(symbols) != 1:
            raise DataError(
                "task transcription needs one uint8 image column of two or three dimensions, all of one "
                f"size, and one column of token ids; dataset {data_info.name!r} has {words(data_info)}. "
                "`distdl data prepare` with --image-size and --tokenize makes them; data.columns chooses "
                "among several"
            )
        self.image_field: str | None = images[0]
        self.inputs = (images[0],)
        self._decode = data_info.decode
        self._symbols = symbols[0]
        self._blank = vocabulary_of(data_info, self._symbols, None)
        self._pictures = Pictures(data_info.fields[images[0]])

    def build_model(self) -> nn.Module:
        shape = self._pictures.input_shape
        return self._make_model(in_channels=shape[0], num_symbols=self._blank + 1, input_shape=shape)

    def collate(self, rows: Rows) -> Batch:
        assert self.image_field is not None
        symbols = rows[self._symbols]
        longest = max(int(symbols.lengths.max(initial=0)), 1)
        return {
            "images": self._pictures(rows[self.image_field]).mul_(2 / 255).sub_(1),
            "symbols": torch.from_numpy(symbols.padded(0, longest).astype(np.int64)),
            "lengths": torch.from_numpy(symbols.lengths.astype(np.int64)),
        }

    def count(self, batch: Batch) -> int:
        return batch["lengths"].shape[0]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._loss_sum(model(batch["images"]), batch)

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        logits, n = model(batch["images"]), self.count(batch)
        found = self._found(logits)
        padded, lengths = batch["symbols"].tolist(), batch["lengths"].tolist()
        wanted = [row[:length] for row, length in zip(padded, lengths, strict=True)]
        edits = [edit_distance(a, b) for a, b in zip(found, wanted, strict=True)]
        return {
            "accuracy": (sum(e == 0 for e in edits), n),
            "error_rate": (sum(edits), sum(lengths)),
            "loss": (float(self._loss_sum(logits, batch)), n),
        }

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """The `symbols` of each row, and where the dataset has its tokenizer their `text`."""
        found = self._found(model(batch["images"]))
        decode = self._decode
        return [{"symbols": one} | ({"text": decode(one)} if decode else {}) for one in found]

    def draw(self, axes: Any, row: dict[str, Any], prediction: Prediction) -> None:
        axes.imshow(self._pictures.shown(row[self.inputs[0]]), cmap="gray")
        axes.set_title(prediction.get("text", str(prediction["symbols"])))
        axes.set_axis_off()

    def _found(self, logits: Tensor) -> list[list[int]]:
        return [self._collapsed(row) for row in logits.argmax(2).tolist()]

    def _loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        steps = batch["lengths"].new_full((len(logits),), logits.shape[1])
        return functional.ctc_loss(
            logits.float().log_softmax(2).transpose(0, 1),
            batch["symbols"],
            steps,
            batch["lengths"],
            blank=self._blank,
            reduction="sum",
        )

    def _collapsed(self, best: list[int]) -> list[int]:
        """The best symbol of each step without repeats, then without blanks."""
        once = [s for s, before in zip(best, [None, *best], strict=False) if s != before]
        return [s for s in once if s != self._blank]


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """How many insertions, deletions and replacements turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
