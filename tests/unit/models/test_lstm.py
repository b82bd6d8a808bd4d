"""`lstm`, `gru`, `rnn`: the packed reference, whatever the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from distdl.errors import RecipeError
from distdl.models import model_factory
from distdl.models.cells import CELLS
from distdl.models.lstm import Recurrent, mirrored
from distdl.recipe.models import Recurrent as RecurrentSection

LENGTHS = torch.tensor([5, 1, 7, 3])


def tokens(lengths: Tensor, width: int, seed: int = 0) -> Tensor:
    drawn = torch.randint(0, 20, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    return drawn.masked_fill(torch.arange(width) >= lengths[:, None], 0)


def packed(model: Recurrent, ids: Tensor, lengths: Tensor, cell: str, pooling: str) -> Tensor:
    """The same network with torch's own stacked module over packed sequences."""
    layers, two = len(model.layers), model.layers[0].reverse is not None
    whole = CELLS[cell](model.embedding.embedding_dim, model.layers[0].onward.hidden_size, layers,
                        batch_first=True, bidirectional=two)  # fmt: skip
    whole.load_state_dict(
        {
            name.replace("_l0", f"_l{i}{suffix}"): value
            for i, layer in enumerate(model.layers)
            for part, suffix in ((layer.onward, ""), (layer.reverse, "_reverse"))
            if part is not None
            for name, value in part.state_dict().items()
        }
    )
    sequence = pack_padded_sequence(model.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
    packed_outputs, state = whole(sequence)
    outputs, _ = pad_packed_sequence(packed_outputs, batch_first=True)
    if pooling == "last":
        final = state[0] if isinstance(state, tuple) else state
        pooled = torch.cat([final[-2], final[-1]], 1) if two else final[-1]
    else:
        rows = [row[:n] for row, n in zip(outputs, lengths, strict=True)]
        pooled = torch.stack([row.mean(0) if pooling == "mean" else row.amax(0) for row in rows])
    return model.head(pooled)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize(("cell", "two", "layers"), [("lstm", True, 2), ("lstm", False, 2), ("gru", True, 1),
                                                     ("rnn", False, 1)])  # fmt: skip
def test_equals_packed_sequences_whatever_the_padding(
    cell: str, two: bool, layers: int, pooling: str
) -> None:
    torch.manual_seed(0)
    model = Recurrent(20, 3, cell, 6, 5, layers, two, pooling=pooling)
    ids = tokens(LENGTHS, 7)
    expected = packed(model, ids, LENGTHS, cell, pooling)
    wide = nn.functional.pad(ids, (0, 9), value=0)
    junk = wide.masked_fill(torch.arange(16) >= LENGTHS[:, None], 13)
    gradients = []
    for batch in (ids, wide, junk):
        logits = model(batch, LENGTHS)
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)
        model.zero_grad()
        logits.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert len(gradients[0]) == sum(p.numel() for p in model.parameters())
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-5)


def test_attention_weighs_real_steps_alone() -> None:
    torch.manual_seed(0)
    model = Recurrent(20, 3, "lstm", 6, 5, 1, True, pooling="attention")
    ids = tokens(LENGTHS, 7)
    states = model.layers[0](model.embedding(ids), mirrored(LENGTHS, 7))
    rows = [row[:n] for row, n in zip(states, LENGTHS, strict=True)]
    pooled = [(model.attention.score(row).softmax(0) * row).sum(0) for row in rows]  # type: ignore[union-attr]
    expected = model.head(torch.stack(pooled))
    for batch in (ids, functional.pad(ids, (0, 9), value=13)):
        torch.testing.assert_close(model(batch, LENGTHS), expected, atol=1e-6, rtol=0)
    model(ids, LENGTHS).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.attention.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("dropped", [0.0, 0.5])
def test_a_projection_is_what_the_next_step_and_layer_see(dropped: float) -> None:
    torch.manual_seed(0)
    model = Recurrent(20, 3, "lstm", 6, 5, 2, True, projection=2, weight_drop=dropped)
    whole = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True, proj_size=2)
    whole.load_state_dict(
        {
            name.replace("_l0", f"_l{i}{suffix}"): value
            for i, layer in enumerate(model.layers)
            for part, suffix in ((layer.onward, ""), (layer.reverse, "_reverse"))
            for name, value in part.state_dict().items()
        }
    )
    model.eval()
    ids = tokens(torch.full((4,), 7), 7)
    ends, (state, _) = whole(model.embedding(ids))
    assert ends.shape == (4, 7, 4)
    expected = model.head(torch.cat([state[-2], state[-1]], 1))
    torch.testing.assert_close(model(ids), expected, atol=1e-6, rtol=0)
    model.train()
    assert (not torch.equal(model(ids), model(ids))) == bool(dropped)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_layer_norm_and_weight_drop(cell: str) -> None:
    torch.manual_seed(0)
    model = Recurrent(20, 3, cell, 6, 5, 2, layer_norm=True, weight_drop=0.5)
    seen: list[Tensor] = []
    for norm in model.norms:
        norm.register_forward_hook(lambda m, given, made: seen.append(made))
    ids = tokens(LENGTHS, 7)
    assert not torch.equal(model(ids, LENGTHS), model(ids, LENGTHS))
    assert len(seen) == 4
    for made in seen:
        assert made.mean(2).abs().max() < 1e-6
    model(ids, LENGTHS).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert torch.equal(model(ids, LENGTHS), model(ids, LENGTHS))


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"name": "gru", "projection": 8}, "lstm alone, not of gru"), ({"projection": 128}, "not below")],
)
def test_a_projection_that_cannot_be(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RecurrentSection(**{"name": "lstm", **keys})


def test_mirrored_within_each_length() -> None:
    index = mirrored(torch.tensor([3, 1, 4]), 4)
    assert index.tolist() == [[2, 1, 0, 3], [0, 1, 2, 3], [3, 2, 1, 0]]
    assert torch.equal(index.gather(1, index), torch.arange(4).expand(3, 4))


def test_a_row_without_tokens_is_finite_and_learns() -> None:
    model = Recurrent(20, 3, hidden=4, embedding=4, bidirectional=True, pooling="max")
    logits = model(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0, 1]))
    assert torch.equal(logits[0], logits[1])
    logits.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_dropout_acts_between_all_parts_and_in_training_only() -> None:
    torch.manual_seed(0)
    model = Recurrent(20, 3, hidden=4, embedding=4, layers=3, dropout=0.5)
    seen: list[torch.Size] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda m, given, made: seen.append(made.shape))
    ids = tokens(LENGTHS, 7)
    assert not torch.equal(model(ids, LENGTHS), model(ids, LENGTHS))
    assert seen[:4] == [(4, 7, 4)] * 3 + [(4, 4)]
    model.eval()
    assert torch.equal(model(ids, LENGTHS), model(ids, LENGTHS))


def test_layers_are_single_so_that_engines_can_shard_them() -> None:
    model = model_factory("lstm", {"layers": 3, "hidden": 4, "embedding": 6, "bidirectional": True})(
        vocabulary=9, num_outputs=2
    )
    cells = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    assert [(c.num_layers, c.bidirectional, c.input_size) for c in cells] == [(1, False, 6)] * 2 + [
        (1, False, 8)
    ] * 4


def test_a_model_that_does_not_read_what_the_task_has() -> None:
    with pytest.raises(RecipeError, match=r"'cnn5' does not read.*in_channels.*vocabulary.*lstm, gru, rnn"):
        model_factory("cnn5", {})(vocabulary=9, num_outputs=2)
    with pytest.raises(RecipeError, match=r"'gru' does not read.*vocabulary.*says num_outputs, boxes"):
        model_factory("gru", {})(num_outputs=2, boxes=4)
    with pytest.raises(RecipeError, match=r"'rnn' reads tokens, series or images.*says none"):
        model_factory("rnn", {})(num_outputs=2)


@pytest.mark.parametrize("keys", [{}, {"bidirectional": True, "pooling": "mean", "layers": 2}])
def test_numbers_are_read_as_tokens_are(keys: dict[str, Any]) -> None:
    """What stands beyond a row's length changes nothing; without lengths every row is full."""
    torch.manual_seed(0)
    model = model_factory("gru", {"hidden": 5, "embedding": 4, **keys})(features=3, steps=None, num_outputs=2)
    series, width = torch.randn(4, 7, 3), torch.arange(7)
    other = torch.where((width < LENGTHS[:, None])[:, :, None], series, torch.randn(4, 7, 3))
    assert model(series, LENGTHS).shape == (4, 2)
    assert torch.equal(model(series, LENGTHS), model(other, LENGTHS))
    assert torch.equal(model(series), model(series, torch.full((4,), 7)))
    torch.testing.assert_close(model(series, LENGTHS)[3:], model(series[3:, :3]))


def test_an_image_is_read_a_row_a_step() -> None:
    torch.manual_seed(0)
    keys = {"hidden": 5, "embedding": 4}
    model = model_factory("lstm", keys)(in_channels=3, num_outputs=2, input_shape=(3, 6, 4))
    images = torch.randn(2, 3, 6, 4)
    assert model(images).shape == (2, 2)
    steps = torch.stack([images[:, :, row].reshape(2, 12) for row in range(6)], 1)
    torch.testing.assert_close(model(images), model.recurrent(steps))  # type: ignore[operator]
