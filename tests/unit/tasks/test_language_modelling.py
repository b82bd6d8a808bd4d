"""Language modelling: targets, perplexity, and a model whose state goes on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from distdl.data.table.ragged import Ragged
from distdl.errors import DataError, RecipeError
from distdl.models import model_factory
from distdl.models.lstm_lm import LstmLm
from distdl.samples import DataInfo, Field
from distdl.tasks import build_task
from distdl.tasks.language_modelling import _WINDOW

FIELDS = {"text": Field("int32", (None,), None, 9)}
SMALL = {"embedding": 5, "hidden": 6, "layers": 2}


def task(fields: dict[str, Field] | None = None, name: str = "lstm_lm", **keys: Any) -> Any:
    info = DataInfo("lines", {"train": 1}, FIELDS if fields is None else fields, "f")
    return build_task("language_modelling", keys, model_factory(name, SMALL), info)


def rows(n: int, length: int, filled: int = 0) -> dict[str, Any]:
    tokens = np.random.default_rng(n).integers(0, 9, (n, length + 1), dtype=np.int32)
    count = np.full(n, length)
    count[-1] -= filled
    return {"text": tokens, "text_count": count}


def test_every_token_but_the_first_is_a_target_and_padding_is_none() -> None:
    packed = rows(2, 4, filled=3)
    batch = task().collate(packed)
    assert batch["inputs"].tolist() == packed["text"][:, :4].tolist()
    first, last = packed["text"].tolist()
    assert batch["targets"].tolist() == [first[1:], [last[1], -100, -100, -100]]
    assert task().count(batch) == 5


def test_perplexity_is_over_all_tokens_and_long_rows_are_read_in_windows() -> None:
    torch.manual_seed(0)
    mine = task()
    model = mine.build_model().eval()
    batches = [mine.collate(rows(2, 2 * _WINDOW + 3)), mine.collate(rows(1, 2 * _WINDOW + 3, filled=_WINDOW))]
    with torch.no_grad():
        found = [mine.measure(model, batch) for batch in batches]
        logits = [model(batch["inputs"])[0] for batch in batches]
    whole = (
        torch.cat([one.flatten(0, 1) for one in logits]),
        torch.cat([b["targets"].flatten() for b in batches]),
    )
    metrics = mine.metrics(found)
    assert metrics["loss"] == pytest.approx(float(functional.cross_entropy(*whole)), rel=1e-5)
    assert metrics["perplexity"] == math.exp(metrics["loss"])
    assert sum(count for _, count in found) == 3 * (2 * _WINDOW + 3) - _WINDOW
    with torch.no_grad():
        first = mine.loss_sum(model, batches[0])
    assert float(first) == pytest.approx(found[0][0], rel=1e-5)


@pytest.mark.parametrize("weight_drop", [0.0, 0.5])
def test_a_model_goes_on_where_it_stood(weight_drop: float) -> None:
    torch.manual_seed(0)
    model = LstmLm(9, **SMALL, weight_drop=weight_drop).eval()
    tokens = torch.randint(0, 9, (3, 8))
    whole, end = model(tokens)
    _, state = model(tokens[:, :5])
    rest, after = model(tokens[:, 5:], state)
    torch.testing.assert_close(rest, whole[:, 5:])
    assert {name: tuple(t.shape[1:]) for name, t in after.items()} == model.state_shapes
    for name in after:
        torch.testing.assert_close(after[name], end[name])
        assert not after[name].requires_grad


def test_the_embedding_is_tied_unless_told() -> None:
    tied, apart = ({n for n, _ in LstmLm(9, **SMALL, tied=t).named_parameters()} for t in (True, False))
    assert apart - tied == {"head.weight"}
    assert LstmLm(9, **SMALL).layers[-1].hidden_size == 5
    assert LstmLm(9, **SMALL, tied=False).layers[-1].hidden_size == 6


def test_a_dropped_channel_is_dropped_for_the_whole_sequence() -> None:
    torch.manual_seed(0)
    model = LstmLm(9, **SMALL, dropout=0.5)
    seen: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randint(1, 9, (4, 7)))
    for x in seen:
        dropped = x == 0
        assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
        assert dropped[:, 0].any()
        assert not dropped[:, 0].all(1).all()


def test_data_that_do_not_suit() -> None:
    with pytest.raises(DataError, match=r"needs one column of token ids.*'lines' has label"):
        task({"label": Field("int64", (), 3)})
    with pytest.raises(DataError, match=r"set data\.order to lanes or packed"):
        task().collate({"text": Ragged(np.arange(3, dtype=np.int32), np.array([3]))})
    with pytest.raises(RecipeError, match=r"'lstm_lm' does not read.*Models that do: lstm, gru, rnn$"):
        model_factory("lstm_lm", SMALL)(vocabulary=9, num_outputs=3)


@torch.no_grad()
def test_a_row_is_continued_with_the_likeliest_token_each_time() -> None:
    """Going on from the state finds what reading all of the text again finds."""
    torch.manual_seed(5)
    mine = task(continuation=6)
    model = mine.build_model().eval()
    prompts = [[3, 1, 4], [], [5]]
    values = np.array([token for row in prompts for token in row], np.int32)
    batch = mine.collate_inputs({"text": Ragged(values, np.array([3, 0, 1], np.int64))})
    for prompt, found in zip(prompts, mine.predict(model, batch), strict=True):
        text = prompt or [0]
        for _ in range(6):
            text = [*text, int(model(torch.tensor([text]))[0][0, -1].argmax())]
        assert found == {"tokens": text[-6:]}


@torch.no_grad()
def test_a_long_row_is_continued_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, and no logits of all of it at once."""
    torch.manual_seed(5)
    mine = task(continuation=4)
    model = mine.build_model().eval()
    row = torch.randint(0, 9, (1, 11))
    batch = {"inputs": row, "lengths": torch.tensor([11])}
    whole, seen = mine.predict(model, batch), []
    monkeypatch.setattr("distdl.tasks.language_modelling._WINDOW", 4)
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    assert mine.predict(model, batch) == whole
    assert seen == [4, 4, 3, 1, 1, 1]


def test_a_size_that_no_layer_would_have_is_refused() -> None:
    make = model_factory("lstm_lm", {"layers": 1, "hidden": 65, "embedding": 20})
    with pytest.raises(RecipeError, match=r"model\.hidden = 65: .* set hidden = 20"):
        make(vocabulary=9)
    for keys in ({"hidden": 20}, {"tied": False}, {"layers": 2}):
        model_factory("lstm_lm", {"layers": 1, "hidden": 65, "embedding": 20} | keys)(vocabulary=9)
