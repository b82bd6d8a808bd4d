"""Translation: a column of tokens to another; cross-entropy of target tokens, perplexity, BLEU, chrF."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.errors import DataError, RecipeError, nearest
from distdl.samples import DataInfo
from distdl.tasks.base import Batch, Prediction, Rows
from distdl.tasks.bleu import bleu_and_chrf, check_sacrebleu
from distdl.tasks.columns import words
from distdl.tasks.tokens import check_tokens, token_columns, vocabulary_of

_NO_TARGET = -100


class Translation:
    """Rows with two columns of token ids (integers, varying length), `source` and `target`.

    Counts target tokens, the end of the sentence being one. Two ids are added to the vocabularies, for the
    begin and the end of a sentence: a tokenizer from elsewhere may have none. In evaluation sentences are
    found by beam search, at most `max_tokens` long, and compared as text, of which the tokenizer's token for
    unknown words is no part where it was found; `beam` 0 measures the loss alone.

    The model is called with source ids [N, S], lengths [N] and target ids [N, T], for logits; and without
    target, with the keys beam, steps, bos, eos and length_penalty, for the ids [N, steps] that it finds.
    """

    image_field: str | None = None

    def __init__(
        self,
        make_model: Callable[..., nn.Module],
        data_info: DataInfo,
        source: str,
        target: str,
        source_vocabulary: int | None = None,
        target_vocabulary: int | None = None,
        label_smoothing: float = 0.0,
        beam: int = 1,
        max_tokens: int = 80,
        length_penalty: float = 1.0,
    ) -> None:
        """Raises DataError for columns that are no tokens, EnvironmentProblem where sacrebleu is missing."""
        self._make_model = make_model
        self._source, self._target, self._smoothing = source, target, label_smoothing
        self.inputs = (source,)
        for column in (source, target):
            able = token_columns(data_info)
            if column not in able:
                raise DataError(
                    f"task translation: {column!r} is no column of token ids{nearest(column, able) or '.'} "
                    f"Dataset {data_info.name!r} has {words(data_info)}; `distdl data prepare --tokenize "
                    f"{source} --tokenize {target}` makes them"
                )
        self._vocabulary = {
            source: vocabulary_of(data_info, source, source_vocabulary, "source_vocabulary"),
            target: vocabulary_of(data_info, target, target_vocabulary, "target_vocabulary"),
        }
        self._sizes = [self._vocabulary[column] + 2 for column in (source, target)]
        self._bos, self._eos = self._sizes[1] - 2, self._sizes[1] - 1
        self._search = {
            "beam": beam,
            "steps": max_tokens,
            "bos": self._bos,
            "eos": self._eos,
            "length_penalty": length_penalty,
        }
        self._decode, self._unknown = data_info.decode, data_info.unknown
        if beam:
            check_sacrebleu()
            if self._decode is None:
                raise DataError(
                    f"dataset {data_info.name!r} has no tokenizer to make text of tokens with, which BLEU "
                    "compares: prepare it with --tokenize, or set task.beam=0, which measures the loss alone"
                )

    def build_model(self) -> nn.Module:
        source, target = self._sizes
        return self._make_model(source_vocabulary=source, target_vocabulary=target)

    def collate(self, rows: Rows) -> Batch:
        source, target = rows[self._source], rows[self._target]
        check_tokens(source.values, self._source, self._vocabulary[self._source], "source_vocabulary")
        check_tokens(target.values, self._target, self._vocabulary[self._target], "target_vocabulary")
        lengths = torch.from_numpy(target.lengths.astype(np.int64))
        ids = torch.from_numpy(target.padded(0, max(int(target.lengths.max(initial=0)), 1)).astype(np.int64))
        begins = functional.pad(ids, (1, 0), value=self._bos)
        at = torch.arange(begins.shape[1])
        ends = functional.pad(ids, (0, 1)).masked_fill(at == lengths[:, None], self._eos)
        longest = max(int(source.lengths.max(initial=0)), 1)
        return {
            "source": torch.from_numpy(source.padded(0, longest).astype(np.int64)),
            "lengths": torch.from_numpy(source.lengths.astype(np.int64)),
            "inputs": begins.masked_fill(at > lengths[:, None], 0),
            "targets": ends.masked_fill(at > lengths[:, None], _NO_TARGET),
        }

    def count(self, batch: Batch) -> int:
        return int((batch["targets"] != _NO_TARGET).sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._loss_sum(model, batch, self._smoothing)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """The summed loss, the tokens counted, and what was found beside what was wanted, as text."""
        found = {"loss": float(self._loss_sum(model, batch, 0.0)), "count": self.count(batch)}
        if not self._search["beam"]:
            return found
        wanted = [[token for token in row if token != _NO_TARGET] for row in batch["targets"].tolist()]
        # What is unknown in both is not the same word for that.
        unknown = self._unknown() if self._unknown else None
        hypotheses = self._found(model, batch, without=unknown)
        return {**found, "hypotheses": hypotheses, "references": self._texts(wanted)}

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """The translation of each row, as `text`. Raises RecipeError where `beam` is 0."""
        if not self._search["beam"]:
            raise RecipeError("task.beam is 0, which searches for no translation: set task.beam=1 or more")
        return [{"text": text} for text in self._found(model, batch)]

    def _found(self, model: nn.Module, batch: Batch, without: int | None = None) -> list[str]:
        ids: Tensor = model(batch["source"], batch["lengths"], **self._search)
        return self._texts([[token for token in row if token != without] for row in ids.tolist()])

    def metrics(self, found: list[dict[str, Any]]) -> dict[str, float]:
        loss = math.fsum(f["loss"] for f in found) / max(sum(f["count"] for f in found), 1)
        metrics = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        if self._search["beam"]:
            texts = ([text for f in found for text in f[key]] for key in ("hypotheses", "references"))
            metrics |= bleu_and_chrf(*texts)
        return metrics

    def _loss_sum(self, model: nn.Module, batch: Batch, smoothing: float) -> Tensor:
        logits = model(batch["source"], batch["lengths"], batch["inputs"])
        return functional.cross_entropy(
            logits.flatten(0, 1).float(),
            batch["targets"].flatten(),
            reduction="sum",
            ignore_index=_NO_TARGET,
            label_smoothing=smoothing,
        )

    def _texts(self, rows: Sequence[list[int]]) -> list[str]:
        assert self._decode is not None, "checked when the task was made"
        cut = [row[: row.index(self._eos)] if self._eos in row else row for row in rows]
        return [self._decode([token for token in row if token < self._bos]) for row in cut]
