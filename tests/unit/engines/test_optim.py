"""Lion, LAMB, Adafactor and optimisers of a user's own: what they compute; their state comes back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distdl.engines.optim import build_optimizer, known_slots, load_by_name, state_by_name
from distdl.engines.optimisers import Lamb, Lion
from distdl.errors import Incompatible, PlanError, RecipeError
from distdl.pieces import InMemory
from distdl.plan import make_plan
from distdl.recipe import Recipe, parse_recipe
from distdl.samples import DataInfo, Field
from distdl.topology import Topology

LION = {"name": "lion", "lr": 0.01, "weight_decay": 0.1}
LAMB = {"name": "lamb", "lr": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.1}
ADAFACTOR = {"name": "adafactor", "lr": 0.01, "weight_decay": 0.1}
ADAMW = {"name": "adamw", "lr": 0.01}
OWN = {"name": "own_optimisers:Counting", "lr": 0.01, "weight_decay": 0.1, "pull": 0.5}

OWN_FILE = """
import torch
from torch.optim import Optimizer

class Counting(Optimizer):
    '''Numbers in the state and in the group, a tensor of another shape, and None.'''
    def __init__(self, params, lr, weight_decay=0.0, pull=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "pull": pull})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["rounds"] = group.get("rounds", 0) + 1
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s.update(times=0, rate=1 / 3, odd=torch.zeros(7), mean=torch.zeros_like(p), extra=None)
                s["times"] += 1
                s["rate"] *= 0.9
                s["odd"] += p.grad.sum()
                s["mean"].lerp_(p.grad, s["rate"])
                assert s["extra"] is None
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(s["mean"] + s["odd"][0] * 1e-3, alpha=group["lr"] / s["times"] / group["rounds"])

class Bare(Counting):
    def __init__(self, params, lr):
        super().__init__(params, lr)

class Listing(Bare):
    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["history"] = [1]

class Global(Bare):
    calls = 0
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.calls = 0
    def step(self):
        super().step()
        self.calls += 1

class NeedsClosure(Bare):
    def step(self, closure):
        return closure()
"""


@pytest.fixture(autouse=True)
def own_optimisers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_optimisers.py").write_text(OWN_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "own_optimisers", raising=False)


def recipe(optim: dict[str, Any], engine: str = "ddp") -> Recipe:
    return parse_recipe(
        {
            "task": {"name": "image_classification"},
            "model": {"name": "cnn5"},
            "data": {"name": "fashion_mnist"},
            "batch": {"global": 12, "micro": 4},
            "optim": optim,
            "train": {"epochs": 1},
            "hardware": {"device": "cpu", "engine": engine},
        }
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.norm(self.first(x))) * self.scale
        return result


def make(optim: dict[str, Any], seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    return model, build_optimizer(model, recipe(optim).optim)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=generator)).square().sum().backward()
        optimizer.step()


def cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


@pytest.mark.parametrize("optim", [LION, LAMB, ADAFACTOR, OWN], ids=lambda o: o["name"])
def test_a_state_comes_back_to_the_bit(optim: dict[str, Any]) -> None:
    model, optimizer = make(optim)
    train(model, optimizer, 3)
    state = cloned(state_by_name(model, optimizer))
    train(model, optimizer, 2, seed=6)
    other, other_optimizer = make(optim, seed=99)
    train(other, other_optimizer, 1)
    load_by_name(other, other_optimizer, InMemory(state))
    loaded = state_by_name(other, other_optimizer)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[n], state[n]) for n in state)
    train(other, other_optimizer, 2, seed=6)
    for name, value in state_by_name(model, optimizer).items():
        assert torch.equal(value, state_by_name(other, other_optimizer)[name]), name


def test_names_of_a_users_own_state() -> None:
    model, optimizer = make(OWN)
    train(model, optimizer, 2)
    state = state_by_name(model, optimizer)
    slots = {"number.times", "number.rate", "group.rounds", "odd", "mean"}
    assert {n for n in state if n.startswith("optim/")} == {
        f"optim/{s}/{n}" for s in slots for n, _ in model.named_parameters()
    }
    assert state["optim/number.times/scale"].item() == state["optim/group.rounds/scale"].item() == 2
    assert state["optim/number.rate/scale"].item() == 1 / 3 * 0.9 * 0.9
    assert known_slots(optimizer) == {"odd", "mean"}
    assert {g["weight_decay"]: len(g["params"]) for g in optimizer.param_groups} == {0.1: 2, 0.0: 5}
    assert {g["pull"] for g in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize(("before", "after"), [(ADAMW, LION), (LION, ADAMW), (ADAFACTOR, LION), (LION, OWN),
                                               (OWN, ADAMW)], ids=lambda o: o["name"])  # fmt: skip
def test_another_optimiser_begins_afresh(before: dict[str, Any], after: dict[str, Any]) -> None:
    model, optimizer = make(before)
    train(model, optimizer, 2)
    other, other_optimizer = make(after, seed=99)
    load_by_name(other, other_optimizer, InMemory(cloned(state_by_name(model, optimizer))))
    assert not any(other_optimizer.state.values())
    train(other, other_optimizer, 1)


def test_state_of_other_shapes_is_refused() -> None:
    model, optimizer = make(ADAFACTOR)
    train(model, optimizer, 1)
    state = cloned(state_by_name(model, optimizer))
    assert state["optim/row_var/first.weight"].shape == (4, 1)
    state["optim/col_var/first.weight"] = torch.ones(1, 4)
    state["optim/row_var/first.bias"] = torch.ones(1)
    with pytest.raises(Incompatible) as caught:
        load_by_name(*make(ADAFACTOR), InMemory(state))
    assert "col_var of first.weight: (1, 4) for a parameter of (4, 3)" in str(caught.value)
    assert "row_var of first.bias: (1,) for a parameter of (4,)" in str(caught.value)


def test_lion_is_the_papers() -> None:
    model, optimizer = make(LION)
    assert isinstance(optimizer, Lion)
    parameter, momentum = model.first.weight.detach().clone(), torch.zeros(4, 3)
    for seed in range(3):
        before = model.first.weight.detach().clone()
        torch.testing.assert_close(before, parameter)
        train(model, optimizer, 1, seed)
        assert model.first.weight.grad is not None
        grad = model.first.weight.grad
        update = (0.9 * momentum + 0.1 * grad).sign() + 0.1 * parameter
        parameter = parameter - 0.01 * update
        momentum = 0.99 * momentum + 0.01 * grad
    torch.testing.assert_close(model.first.weight.detach(), parameter)


def test_lamb_is_the_papers() -> None:
    """AdamW's direction at the norm of the weights; norms and biases as AdamW has them."""
    model, optimizer = make(LAMB)
    assert isinstance(optimizer, Lamb)
    weight, bias = model.first.weight.detach().clone(), model.first.bias.detach().clone()
    mean, square, bias_mean, bias_square = (torch.zeros_like(t) for t in (weight, weight, bias, bias))
    for step in range(1, 4):
        train(model, optimizer, 1, step)
        grad, bias_grad = model.first.weight.grad, model.first.bias.grad
        assert grad is not None
        assert bias_grad is not None
        for m, v, g in ((mean, square, grad), (bias_mean, bias_square, bias_grad)):
            m.mul_(0.8).add_(g, alpha=0.2)
            v.mul_(0.95).addcmul_(g, g, value=0.05)
        corrected = (1 - 0.8**step, 1 - 0.95**step)
        update = mean / corrected[0] / ((square / corrected[1]).sqrt() + 1e-6) + 0.1 * weight
        weight = weight - 0.01 * weight.norm() / update.norm() * update
        bias = bias - 0.01 * bias_mean / corrected[0] / ((bias_square / corrected[1]).sqrt() + 1e-6)
    torch.testing.assert_close(model.first.weight.detach(), weight)
    torch.testing.assert_close(model.first.bias.detach(), bias)


def test_lamb_leaves_zeros_finite() -> None:
    weight = nn.Parameter(torch.zeros(3, 2))
    optimizer = Lamb([weight], lr=0.1)
    weight.grad = torch.zeros(3, 2)
    optimizer.step()
    assert torch.equal(weight, torch.zeros(3, 2))


def test_fused_is_for_those_that_have_it() -> None:
    model = Net()
    assert build_optimizer(model, recipe(ADAMW).optim, fused=True).defaults["fused"]
    assert not build_optimizer(model, recipe(ADAMW).optim).defaults["fused"]
    assert "fused" not in build_optimizer(model, recipe(LION).optim, fused=True).defaults


@pytest.mark.parametrize(
    ("optim", "says"),
    [
        ({"name": "own_optimisers:Listing"}, "Listing keeps history, which no checkpoint could hold"),
        ({"name": "own_optimisers:Global"}, "Global keeps calls, which"),
        ({"name": "own_optimisers:NeedsClosure"}, "one step of NeedsClosure failed.*closure"),
        ({"name": "own_optimisers:Bare", "pull": 1}, r"making it with lr and \['pull'\].*'pull'"),
        ({"name": "own_optimisers:torch"}, "expected a subclass of torch.optim.Optimizer"),
        ({"name": "own_optimisers:Bear"}, "did you mean 'Bare'"),
    ],
)
def test_a_users_own_that_is_wrong(optim: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){says}"):
        make({"lr": 0.1, "weight_decay": None, **optim})


DATA = DataInfo(
    "pictures",
    {"train": 900, "test": 90},
    {"image": Field("uint8", (8, 8)), "label": Field("int64", (), 3)},
    "fingerprint",
)


@pytest.mark.parametrize("engine", ["fsdp", "zero1", "zero2", "zero3"])
def test_slices_are_refused_to_who_looks_at_whole_parameters(engine: str) -> None:
    here = Topology.of(1, 2)
    for optim in (LAMB, ADAFACTOR, OWN):
        refused = "cannot save" if optim is OWN and engine != "fsdp" else "hands"
        with pytest.raises(PlanError, match=rf"'{engine}' {refused}.*'{optim['name']}'.*: ddp, .*accelerate"):
            make_plan(recipe(optim, engine=engine), here, DATA)
        make_plan(recipe(optim, engine="zero0"), here, DATA)
    if engine == "fsdp":
        make_plan(recipe({**OWN, "elementwise": True}, engine=engine), here, DATA)
    make_plan(recipe(LION, engine=engine), here, DATA)
