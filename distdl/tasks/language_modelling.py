"""Language modelling: the next token at every place; cross-entropy, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.errors import DataError
from distdl.samples import DataInfo
from distdl.tasks.base import Batch, Prediction, Rows
from distdl.tasks.columns import words
from distdl.tasks.tokens import check_tokens, token_columns, vocabulary_of

_NO_TARGET = -100
_WINDOW = 256
"""Tokens of a row to evaluate or to continue that the model sees at once: logits of long rows would fill the
memory."""


class LanguageModelling:
    """Rows of tokens of one length, as `data.order` lanes and packed make them: N inputs, each with a target.

    Counts targets. In order lanes the state of the model goes on from each window to the next and no gradient
    goes back (truncated back-propagation through time; Mikolov et al., 2010); in order packed each row begins
    with zeros, as each evaluation row does.

    The model is called with tokens [N, T] (int64), with or without the state that it returned beside the
    logits [N, T, vocabulary]: a dict of [N, ...] tensors whose `state_shapes` it knows. `continuation` is how
    many tokens a prediction adds to its row.
    """

    image_field: str | None = None

    def __init__(
        self,
        make_model: Callable[..., nn.Module],
        data_info: DataInfo,
        vocabulary: int | None = None,
        continuation: int = 50,
    ) -> None:
        self._make_model = make_model
        found = token_columns(data_info)
        if len(found) != 1:
            raise DataError(
                "task language_modelling needs one column of token ids, lists of integers of varying length; "
                f"dataset {data_info.name!r} has {words(data_info)}. `distdl data prepare` with --tokenize "
                "makes it; data.columns chooses among several"
            )
        self._field = found[0]
        self.inputs = (found[0],)
        self._continuation, self._decode = continuation, data_info.decode
        self._vocabulary = vocabulary_of(data_info, self._field, vocabulary)

    def build_model(self) -> nn.Module:
        return self._make_model(vocabulary=self._vocabulary)

    def collate(self, rows: Rows) -> Batch:
        tokens = rows[self._field]
        if not isinstance(tokens, np.ndarray):
            raise DataError(
                "task language_modelling reads rows of one length: set data.order to lanes or packed, and "
                "data.pack_length to the tokens of a row"
            )
        check_tokens(tokens, self._field, self._vocabulary)
        whole = torch.from_numpy(tokens.astype(np.int64))
        real = torch.from_numpy(np.arange(whole.shape[1] - 1) < rows[f"{self._field}_count"][:, None])
        return {
            "inputs": whole[:, :-1].contiguous(),
            "targets": whole[:, 1:].masked_fill(~real, _NO_TARGET),
        }

    def count(self, batch: Batch) -> int:
        return int((batch["targets"] != _NO_TARGET).sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return _loss_sum(model(batch["inputs"])[0], batch["targets"])

    def state_shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = model.state_shapes  # type: ignore[assignment]
        return shapes

    def loss_and_state(
        self, model: nn.Module, batch: Batch, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, after = model(batch["inputs"], state)
        return _loss_sum(logits, batch["targets"]), after

    def measure(self, model: nn.Module, batch: Batch) -> tuple[float, int]:
        """The summed negative log-likelihood in nats, and how many tokens it is of."""
        state: tuple[dict[str, Tensor], ...] = ()
        total = 0.0
        for inputs, targets in zip(
            batch["inputs"].split(_WINDOW, 1), batch["targets"].split(_WINDOW, 1), strict=True
        ):
            logits, after = model(inputs, *state)
            state = (after,)
            total += float(_loss_sum(logits, targets))
        return total, self.count(batch)

    def collate_inputs(self, rows: Rows) -> Batch:
        """Rows of any length, to be continued."""
        tokens = rows[self._field]
        longest = max(int(tokens.lengths.max(initial=0)), 1)
        return {
            "inputs": torch.from_numpy(tokens.padded(0, longest).astype(np.int64)),
            "lengths": torch.from_numpy(tokens.lengths.astype(np.int64)),
        }

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """The likeliest `tokens` after each row, each the likeliest after those before it, and where the
        dataset has its tokenizer their `text`.
        """
        found = [
            self._continued(model, row[:length])
            for row, length in zip(batch["inputs"], batch["lengths"].tolist(), strict=True)
        ]
        decode = self._decode
        return [{"tokens": one} | ({"text": decode(one)} if decode else {}) for one in found]

    def _continued(self, model: nn.Module, row: Tensor) -> list[int]:
        state: tuple[dict[str, Tensor], ...] = ()
        # A row of nothing is continued from token 0.
        *begin, given = (row if len(row) else row.new_zeros(1))[None].split(_WINDOW, 1)
        tokens = []
        for window in begin:
            state = (model(window, *state)[1],)
        for _ in range(self._continuation):
            logits, after = model(given, *state)
            given, state = logits[:, -1:].argmax(2), (after,)
            tokens.append(int(given))
        return tokens

    def metrics(self, found: list[tuple[float, int]]) -> dict[str, float]:
        loss = math.fsum(total for total, _ in found) / max(sum(count for _, count in found), 1)
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf, "loss": loss}


def _loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="sum", ignore_index=_NO_TARGET
    )
