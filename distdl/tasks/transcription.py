"""Transcription: an image or a sound to a string of symbols of any length; connectionist temporal
classification (CTC).
"""

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
from distdl.tasks.series_classification import is_series, standardised
from distdl.tasks.tokens import check_tokens, token_columns, vocabulary_of


class Transcription:
    """Rows with one image column, or one of numbers over time [T, features] with any T (log-mel, say), and
    one column of symbols (token ids, varying length).

    The loss of a row is the negative log-probability of its whole string (Graves et al., 2006), and the count
    is rows. The model is called with images [N, C, H, W] and gives logits [N, steps, symbols + 1], the last
    of which is the blank; or with series [N, T, features], each feature of each row with mean 0 and deviation
    1 over its own T (unless `standardise` is false), and lengths [N] (int64), and gives the logits and how
    many steps of them each row has [N].

    `accuracy` is the share of strings that are right throughout, `error_rate` the edits (Levenshtein, 1966)
    that turn what was found into what was wanted, for each wanted symbol; greedy: the best symbol of each
    step.
    """

    def __init__(
        self,
        make_model: Callable[..., nn.Module],
        data_info: DataInfo,
        standardise: bool = True,
        vocabulary: int | None = None,
    ) -> None:
        self._make_model = make_model
        self._standardise = standardise
        fields = data_info.fields
        images = [n for n, f in fields.items() if is_image(f)]
        series = [] if images else [n for n, f in fields.items() if is_series(f) and len(f.shape) == 2]
        symbols = token_columns(data_info)
        if len(images) + len(series) != 1 or len(symbols) != 1:
            raise DataError(
                "task transcription needs one uint8 image column of two or three dimensions, all of one "
                "size, or one column of numbers over time [T, features], and one column of token ids; "
                f"dataset {data_info.name!r} has {words(data_info)}. `distdl data prepare --tokenize` makes "
                "them of images (with --image-size) and of sounds; data.columns chooses among several"
            )
        self._input = (images or series)[0]
        self.image_field: str | None = images[0] if images else None
        self.inputs = (self._input,)
        self._decode = data_info.decode
        self._symbols = symbols[0]
        self._blank = vocabulary_of(data_info, self._symbols, vocabulary)
        self._pictures = Pictures(fields[self._input]) if images else None
        self._features = fields[self._input].shape[-1]
        self._inputs_per_step = 1

    def build_model(self) -> nn.Module:
        symbols = self._blank + 1
        if self._pictures is None:
            model = self._make_model(features=self._features, num_symbols=symbols)
        else:
            shape = self._pictures.input_shape
            model = self._make_model(in_channels=shape[0], num_symbols=symbols, input_shape=shape)
        self._inputs_per_step = getattr(model, "inputs_per_step", 1)
        return model

    def collate(self, rows: Rows) -> Batch:
        symbols = rows[self._symbols]
        check_tokens(symbols.values, self._symbols, self._blank)
        batch = self._inputs(rows[self._input]) | {
            "symbols": torch.from_numpy(
                symbols.padded(0, max(int(symbols.lengths.max(initial=0)), 1))
            ).long(),
            "lengths": torch.from_numpy(symbols.lengths).long(),
        }
        self._check_room(batch)
        return batch

    def collate_inputs(self, rows: Rows) -> Batch:
        return self._inputs(rows[self._input])

    def count(self, batch: Batch) -> int:
        return batch["lengths"].shape[0]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._loss_sum(*self._called(model, batch), batch)

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        logits, steps = self._called(model, batch)
        found, n = self._found(logits, steps), self.count(batch)
        padded, lengths = batch["symbols"].tolist(), batch["lengths"].tolist()
        wanted = [row[:length] for row, length in zip(padded, lengths, strict=True)]
        edits = [edit_distance(a, b) for a, b in zip(found, wanted, strict=True)]
        return {
            "accuracy": (sum(e == 0 for e in edits), n),
            "error_rate": (sum(edits), sum(lengths)),
            "loss": (float(self._loss_sum(logits, steps, batch)), n),
        }

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """The `symbols` of each row, and where the dataset has its tokenizer their `text`."""
        found = self._found(*self._called(model, batch))
        decode = self._decode
        return [{"symbols": one} | ({"text": decode(one)} if decode else {}) for one in found]

    def draw(self, axes: Any, row: dict[str, Any], prediction: Prediction) -> None:
        if self._pictures is None:
            axes.imshow(np.asarray(row[self._input], np.float32).T, origin="lower", aspect="auto")
        else:
            axes.imshow(self._pictures.shown(row[self._input]), cmap="gray")
        axes.set_title(prediction.get("text", str(prediction["symbols"])))
        axes.set_axis_off()

    def _inputs(self, found: Any) -> Batch:
        if self._pictures is not None:
            return {"images": self._pictures(found).mul_(2 / 255).sub_(1)}
        alike = isinstance(found, np.ndarray)
        series = found if alike else found.padded(0, max(int(found.lengths.max(initial=0)), 1))
        lengths = np.full(len(found), found.shape[1]) if alike else found.lengths
        series = series.astype(np.float32)
        if self._standardise:
            series = standardised(series, np.arange(series.shape[1]) < lengths[:, None])
        return {"series": torch.from_numpy(series), "series_lengths": torch.from_numpy(lengths).long()}

    def _check_room(self, batch: Batch) -> None:
        """CTC needs a step for each symbol, and one between two that are alike; else the loss is infinite."""
        symbols, lengths = batch["symbols"], batch["lengths"]
        alike = (symbols[:, 1:] == symbols[:, :-1]) & (torch.arange(1, symbols.shape[1]) < lengths[:, None])
        needs = lengths + alike.sum(1)
        has = batch["series_lengths"] if "series" in batch else lengths.new_tensor(batch["images"].shape[3])
        steps = (has // self._inputs_per_step).clamp(min=1).expand_as(needs)
        for row in (needs > steps).nonzero()[:1, 0].tolist():
            raise DataError(
                f"a row of column {self._input!r} is too short for its string: it is {int(steps[row])} steps "
                f"of the model ({self._inputs_per_step} of its columns or frames each), and the "
                f"{int(lengths[row])} symbols in column {self._symbols!r}, one step each and one between two "
                f"that are alike, need {int(needs[row])}: {self._shown(symbols[row, : lengths[row]])}. "
                "Leave such rows out of the files that the dataset is prepared from"
            )

    def _shown(self, symbols: Tensor) -> str:
        """For a person to find the row by."""
        return repr(self._decode(symbols.tolist())) if self._decode else str(symbols.tolist()[:20])

    @staticmethod
    def _called(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logits [N, steps, symbols + 1], steps of each row [N])."""
        if "series" in batch:
            logits, steps = model(batch["series"], batch["series_lengths"])
            return logits, steps
        logits = model(batch["images"])
        return logits, torch.full((len(logits),), logits.shape[1], device=logits.device)

    def _found(self, logits: Tensor, steps: Tensor) -> list[list[int]]:
        best = zip(logits.argmax(2).tolist(), steps.tolist(), strict=True)
        return [self._collapsed(row[:its]) for row, its in best]

    def _loss_sum(self, logits: Tensor, steps: Tensor, batch: Batch) -> Tensor:
        chances = logits.float().log_softmax(2).transpose(0, 1)
        device = chances.device
        if device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
            device = torch.device("cpu")  # on CUDA it has no gradient with the same bits each time
        symbols, lengths = batch["symbols"].to(device), batch["lengths"].to(device)
        loss = functional.ctc_loss(
            chances.to(device), symbols, steps.to(device), lengths, blank=self._blank, reduction="sum"
        )
        return loss.to(chances.device)

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
