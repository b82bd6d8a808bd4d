"""Optimisers: what is decayed, and a state that travels by name or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_support import recipe_with
from torch import Tensor, nn

from distdl.engines.optim import build_optimizer, load_by_name, state_by_name
from distdl.errors import Incompatible
from distdl.pieces import InMemory

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"name": "adamw", "lr": 0.1, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.02}


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.last = nn.Linear(width, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.frozen(self.last(self.norm(self.first(x)).mean((2, 3)))) * self.scale
        return result


def make(optim: dict[str, Any], width: int = 4, seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net(width)
    return model, build_optimizer(model, recipe_with(optim=optim).optim)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 6, 6, generator=generator)).square().sum().backward()
        optimizer.step()


def cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


def names_by_decay(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[float, set[str]]:
    names = {p: n for n, p in model.named_parameters()}
    return {g["weight_decay"]: {names[p] for p in g["params"]} for g in optimizer.param_groups}


@pytest.mark.parametrize("optim", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_norms_and_biases_are_not_decayed(optim: dict[str, Any]) -> None:
    decay = optim["weight_decay"]
    assert names_by_decay(*make(optim)) == {
        decay: {"first.weight", "last.weight"},
        0.0: {"first.bias", "norm.weight", "norm.bias", "last.bias", "scale"},
    }
    everything = names_by_decay(*make({**optim, "decay_norms_and_biases": True}))
    assert everything[decay] >= {"first.weight", "first.bias", "norm.bias", "scale"}
    assert 0.0 not in everything
    assert all("frozen" not in n for group in everything.values() for n in group)


def test_every_key_reaches_the_optimiser() -> None:
    _, sgd = make({**SGD, "nesterov": True})
    assert isinstance(sgd, torch.optim.SGD)
    assert [(g["lr"], g["momentum"], g["nesterov"]) for g in sgd.param_groups] == [(0.1, 0.9, True)] * 2
    _, adamw = make(ADAMW)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [(g["lr"], g["betas"], g["eps"]) for g in adamw.param_groups] == [(0.1, (0.8, 0.95), 1e-6)] * 2


@pytest.mark.parametrize("optim", [SGD, ADAMW, {**SGD, "momentum": 0.0}], ids=["sgd", "adamw", "no momentum"])
def test_a_state_comes_back_to_the_bit(optim: dict[str, Any]) -> None:
    model, optimizer = make(optim)
    train(model, optimizer, 3)
    state = cloned(state_by_name(model, optimizer))
    train(model, optimizer, 2, seed=6)

    other, other_optimizer = make(optim, seed=99)
    train(other, other_optimizer, 1)  # something to overwrite
    load_by_name(other, other_optimizer, InMemory(state))
    loaded = state_by_name(other, other_optimizer)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[n], state[n]) for n in state)
    train(other, other_optimizer, 2, seed=6)
    for name, value in state_by_name(model, optimizer).items():
        assert torch.equal(value, state_by_name(other, other_optimizer)[name]), name


def test_names() -> None:
    model, optimizer = make(ADAMW)
    assert state_by_name(model, optimizer).keys() == {f"model/{n}" for n in model.state_dict()}
    train(model, optimizer, 1)
    slots = {n for n in state_by_name(model, optimizer) if n.startswith("optim/")}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert slots == {f"optim/{s}/{n}" for s in ("step", "exp_avg", "exp_avg_sq") for n in trained}


def test_loading_copies_and_the_state_does_not() -> None:
    model, optimizer = make(SGD)
    train(model, optimizer, 1)
    state = state_by_name(model, optimizer)
    assert state["model/last.weight"].data_ptr() == model.last.weight.data_ptr()
    kept = cloned(state)
    other, other_optimizer = make(SGD)
    load_by_name(other, other_optimizer, InMemory(kept))
    train(other, other_optimizer, 1)
    assert all(torch.equal(kept[n], state[n]) for n in kept)


def test_a_scalar_parameter_has_its_state_beside_it() -> None:
    """Step counters stay on the CPU; the momentum of a parameter of no dimension does not."""
    model, optimizer = make(ADAMW)
    train(model, optimizer, 1)
    state = cloned(state_by_name(model, optimizer))
    elsewhere = Net().to("meta")
    optimizer = build_optimizer(elsewhere, recipe_with(optim=ADAMW).optim)
    load_by_name(elsewhere, optimizer, InMemory(state))
    slots = optimizer.state[elsewhere.scale]
    assert {name: t.device.type for name, t in slots.items()} == {
        "step": "cpu",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }


@pytest.mark.parametrize(("before", "after"), [(SGD, ADAMW), (ADAMW, SGD)], ids=["to adamw", "to sgd"])
def test_another_optimiser_begins_afresh(before: dict[str, Any], after: dict[str, Any]) -> None:
    """`--allow-changed` with another optim.name: the weights are kept, the momentum means nothing now."""
    model, optimizer = make(before)
    train(model, optimizer, 2)
    state = cloned(state_by_name(model, optimizer))
    other, other_optimizer = make(after, seed=99)
    load_by_name(other, other_optimizer, InMemory(state))
    assert all(torch.equal(t, state[f"model/{n}"]) for n, t in other.state_dict().items())
    fresh, fresh_optimizer = make(after)
    fresh.load_state_dict(other.state_dict())
    train(other, other_optimizer, 2)
    train(fresh, fresh_optimizer, 2)
    for name, value in state_by_name(fresh, fresh_optimizer).items():
        assert torch.equal(value, state_by_name(other, other_optimizer)[name]), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model/last.weight": None}, ["missing from the checkpoint: last.weight"]),
        ({"model/norm.running_var": None, "model/scale": None}, ["norm.running_var, scale"]),
        ({"model/extra.weight": torch.ones(1)}, ["unknown to the model: extra.weight"]),
        (
            {"model/last.weight": torch.ones(2, 5)},
            ["last.weight: (2, 5) in the checkpoint, (2, 4) in the model"],
        ),
        (
            {"model/scale": None, "model/scales": torch.ones(()), "model/last.bias": torch.ones(3)},
            ["missing from the checkpoint: scale;", "unknown to the model: scales", "last.bias: (3,)"],
        ),
        ({"optim/momentum_buffer/gone": torch.ones(1)}, ["parameters the model lacks: ['gone']"]),
        (
            {"optim/momentum_buffer/last.bias": torch.ones(3)},
            ["momentum_buffer of last.bias: (3,) for a parameter of (2,)"],
        ),
        ({"optim/momentum_buffer/last.bias": torch.ones(1)}, ["momentum_buffer of last.bias: (1,)"]),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_is_touched(
    change: dict[str, Tensor | None], says: list[str]
) -> None:
    model, optimizer = make(SGD)
    train(model, optimizer, 2)
    state = cloned(state_by_name(model, optimizer))
    for name, value in change.items():
        if value is None:
            del state[name]
        else:
            state[name] = value

    other, other_optimizer = make(SGD, seed=99)
    train(other, other_optimizer, 1)
    before = cloned(state_by_name(other, other_optimizer))
    with pytest.raises(Incompatible) as caught:
        load_by_name(other, other_optimizer, InMemory(state))
    assert all(text in str(caught.value) for text in says), str(caught.value)
    after = state_by_name(other, other_optimizer)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
