"""`lstm_autoencoder`: what it sees, what filling does, a code back to a sequence, a classifier begun so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distdl.checkpoint.convert.build import write_checkpoint
from distdl.checkpoint.manifest import Facts
from distdl.comm import World
from distdl.data.table.ragged import Ragged
from distdl.errors import DataError, Incompatible, RecipeError
from distdl.models import model_factory
from distdl.models.sequence_autoencoder import SequenceAutoencoder
from distdl.recipe.schema import Init
from distdl.samples import DataInfo, Field
from distdl.tasks import build_task
from distdl.testing import assert_same_bits
from distdl.train.warm_start import warm_start

KEYS = {"embedding": 6, "hidden": 16}
DATA = DataInfo("lines", {"train": 1}, {"text": Field("int32", (None,), None, 9)}, "f")
ROWS = {"text": Ragged(np.array([5, 6, 7, 8, 3, 4, 3, 4]), np.array([3, 1, 4]))}


def task(**keys: Any) -> Any:
    make = model_factory("lstm_autoencoder", {**KEYS, **keys})
    return build_task("sequence_reconstruction", {}, make, DATA)


def test_the_loss_is_of_real_tokens_and_ends() -> None:
    torch.manual_seed(0)
    mine = task(code=5, layers=2, bidirectional=True, pooling="mean")
    model, batch = mine.build_model().requires_grad_(False), mine.collate(ROWS)
    assert batch["sequence"].tolist() == [[5, 6, 7, 0, 0], [8, 0, 0, 0, 0], [3, 4, 3, 4, 0]]
    assert mine.count(batch) == 8 + 3
    logits = model(batch["sequence"], batch["lengths"]).log_softmax(2).detach()
    assert logits.shape == (3, 5, 9)
    pairs = [(n, t) for n, length in enumerate([3, 1, 4]) for t in range(length + 1)]
    by_hand = -sum(float(logits[n, t, batch["sequence"][n, t]]) for n, t in pairs)
    assert float(mine.loss_sum(model, batch)) == pytest.approx(by_hand, rel=1e-5)
    parts = [mine.collate({"text": ROWS["text"].rows(i, i + 1)}) for i in range(3)]
    apart = sum(float(mine.loss_sum(model, p)) for p in parts)
    assert apart == pytest.approx(by_hand, rel=1e-5)
    assert mine.predict(model, batch)[1]["loss"] == pytest.approx(float(mine.loss_sum(model, parts[1])) / 2)


def test_a_step_sees_the_code_and_the_steps_before_alone() -> None:
    torch.manual_seed(0)
    model: Any = task().build_model()
    code, before = torch.randn(1, 128), torch.tensor([[0, 5, 6, 7]])
    changed = torch.tensor([[0, 5, 8, 7]])
    one, other = model.decoder(code, before), model.decoder(code, changed)
    assert torch.equal(one[:, :2], other[:, :2])
    assert not torch.allclose(one[:, 2], other[:, 2])
    assert not torch.allclose(one, model.decoder(code + 1, before))


def trained(steps: int = 150) -> tuple[Any, SequenceAutoencoder]:
    torch.manual_seed(0)
    mine = task(code=8)
    model = mine.build_model()
    batch = mine.collate(ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        (mine.loss_sum(model, batch) / mine.count(batch)).backward()
        optimizer.step()
    return mine, model.eval()


def test_it_learns_to_give_back_what_it_was_given() -> None:
    mine, model = trained()
    batch = mine.collate(ROWS)
    with torch.no_grad():
        assert mine.metric_sums(model, batch)["accuracy"] == (11, 11)
        code = model.encoder(batch["sequence"], batch["lengths"])
        found = mine.predict(model, batch)
    made = model.generate(code, 6)
    assert made.tolist() == [[5, 6, 7, 0, 0, 0], [8, 0, 0, 0, 0, 0], [3, 4, 3, 4, 0, 0]]
    assert [one["tokens"] for one in found] == [[5, 6, 7], [8], [3, 4, 3, 4]]
    assert [one["steps"] for one in found] == [3, 1, 4]


@torch.no_grad()
def test_what_comes_back_does_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(0)
    mine = task()
    model = mine.build_model().eval()
    model.decoder.head.bias[0] = -99.0  # it never ends a row
    short, long = [5, 6], [3, 4] * 6
    alone = mine.predict(model, mine.collate({"text": Ragged(np.array(short), np.array([2]))}))
    both = mine.predict(model, mine.collate({"text": Ragged(np.array(short + long), np.array([2, 12]))}))
    assert both[0]["tokens"] == alone[0]["tokens"]
    assert len(alone[0]["tokens"]) == 3


def test_numbers_too() -> None:
    torch.manual_seed(0)
    model: Any = model_factory("lstm_autoencoder", KEYS)(features=2)
    assert model(torch.randn(3, 5, 2), torch.tensor([5, 2, 1])).shape == (3, 5, 2)
    assert model.generate(torch.randn(3, 128), 4).shape == (3, 4, 2)


@pytest.mark.parametrize("steps", [None, 6])
def test_series_come_back_from_their_code(steps: int | None) -> None:
    torch.manual_seed(0)
    waves = [
        np.sin(np.arange(n) * speed).astype(np.float32)[:, None]
        for n, speed in ((6, 0.5), (6, 2.0), (4, 1.0))
    ]
    waves = waves if steps is None else waves[:2]
    rows = {"wave": np.stack(waves) if steps else Ragged(np.concatenate(waves), np.array([6, 6, 4]))}
    data = DataInfo("waves", {"train": 3}, {"wave": Field("float", (steps, 1))}, "f")
    mine: Any = build_task("sequence_reconstruction", {}, model_factory("lstm_autoencoder", KEYS), data)
    model, batch = mine.build_model(), mine.collate(rows)
    assert mine.count(batch) == (12 if steps else 16)
    first = float(mine.loss_sum(model, batch).detach())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        (mine.loss_sum(model, batch) / mine.count(batch)).backward()
        optimizer.step()
    with torch.no_grad():
        found = mine.predict(model.eval(), batch)
        assert mine.metric_sums(model, batch)["loss"][0] < 0.02 * first
    for wave, one in zip(waves, found, strict=True):
        assert one["steps"] == len(one["series"]) == len(wave)
        assert np.abs(np.array(one["series"]) - wave).mean() < 0.2


def test_a_classifier_begins_with_the_encoder(tmp_path: Path) -> None:
    """`init` as configs/r8_from_autoencoder.yaml has it."""
    _, model = trained(1)
    tensors = {f"model/{n}": t for n, t in model.state_dict().items()}
    facts = Facts(5, "ab" * 8, {}, "f00d", {"step": 5}, "ddp")
    place = write_checkpoint(str(tmp_path / "checkpoints"), tensors, facts)
    init = {"from": str(place), "map": {"encoder.*": "*"}, "ignore": ["head.*", "decoder.*"]}
    start = warm_start(Init.model_validate(init), World(), lambda: True)
    assert start is not None
    torch.manual_seed(9)
    classifier: Any = model_factory("lstm", KEYS)(vocabulary=9, num_outputs=3)
    head = classifier.head.weight.clone()
    start(classifier)
    assert_same_bits(classifier.embedding.state_dict(), model.encoder.embedding.state_dict())
    assert_same_bits(classifier.layers.state_dict(), model.encoder.layers.state_dict())
    assert torch.equal(classifier.head.weight, head)
    wider = model_factory("lstm", {**KEYS, "hidden": 7})(vocabulary=9, num_outputs=3)
    with pytest.raises(Incompatible, match="other shapes"):
        start(wider)


def test_a_token_that_would_be_an_end_is_refused() -> None:
    for tokens in ([5, 0, 7], [5, 9]):
        with pytest.raises(DataError, match=r"column 'text' has tokens .* expected 1 to 8, as 0 is the end"):
            task().collate({"text": Ragged(np.array(tokens), np.array([len(tokens)]))})


def test_language_models_and_autoencoders_are_not_taken_for_each_other() -> None:
    with pytest.raises(RecipeError, match=r"'lstm_lm' does not read.*Models that do: lstm_autoencoder$"):
        build_task("sequence_reconstruction", {}, model_factory("lstm_lm", KEYS), DATA).build_model()
    with pytest.raises(RecipeError, match=r"'lstm_autoencoder' does not read.*Models that do: lstm_lm$"):
        build_task("language_modelling", {}, model_factory("lstm_autoencoder", KEYS), DATA).build_model()
