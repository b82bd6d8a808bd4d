"""FSDP computes what one process computes, and really holds, and sends, no more than its shards."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from distdl.comm import World
from distdl.engines import Applied, Engine, Group, Pass, build_engine, microstep
from distdl.errors import EngineError
from distdl.keys import key, seed_everything
from distdl.pieces import InMemory
from distdl.plan import Plan, make_plan
from distdl.recipe import Recipe, parse_recipe
from distdl.samples import DataInfo, Field
from distdl.testing import assert_same_bits, run_world, worst
from distdl.testing.whole import gather_whole
from distdl.topology import Topology

ADAMW = {"name": "adamw", "lr": 0.01, "clip_norm": 0.1}
ROWS = 44
"""Steps of 16 rows in microbatches of 4, and a last one of 12: three microbatches for two ranks."""


class Images(nn.Module):
    """Images [N, 1, 8, 8]; the wide convolution and the linear layer are large enough to be units."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([stage(1, 8), stage(8, 96), stage(96, 80)])
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(80, 5)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.stages:
            x = part(x)
        return self.head(self.dropout(x.mean((2, 3))))


def stage(a: int, b: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


class Words(nn.Module):
    """Tokens [N, T]; two recurrent layers, each a unit, and an embedding tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 64)
        self.layers = nn.ModuleList([nn.LSTM(64, 128, batch_first=True), nn.GRU(128, 128, batch_first=True)])
        self.down = nn.Linear(128, 64)
        self.out = nn.Linear(64, 11)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x, _ = layer(x)
        return self.out(self.down(x[:, -1]))


class Dense(nn.Module):
    """The middle layer is a unit that is gathered in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Small(nn.Module):
    """One stage, which is quickly compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([stage(1, 4)])
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages[0](x).mean((2, 3)))


class Sometimes(nn.Module):
    """Uses `rare` for a batch whose first value is positive alone, and `never` never."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.rare, self.never = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + (self.rare(x) if x[0, 0] > 0 else 0)


class Spare(nn.Module):
    """Has a layer that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.never = nn.Linear(6, 5), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "images": Images,
    "small": Small,
    "words": Words,
    "dense": Dense,
    "sometimes": Sometimes,
    "spare": Spare,
}


def rows(model: str, start: int, stop: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(start + 1)
    count = stop - start
    if model == "words":
        x = torch.randint(11, (count, 6), generator=generator)
    else:
        shape = (1, 8, 8) if model in ("images", "small") else (6,)
        x = torch.randn(count, *shape, generator=generator)
    return {"x": x, "y": torch.randint(5, (count,), generator=generator)}


def recipe_of(engine: str, **changes: dict[str, Any]) -> Recipe:
    sections: dict[str, Any] = {
        "task": {"name": "image_classification"},
        "model": {"name": "cnn5"},
        "data": {"name": "fashion_mnist"},
        "batch": {"global": 16, "micro": 4},
        "optim": ADAMW,
        "train": {"epochs": 9, "seed": 3},
        "hardware": {"engine": engine, "device": "cpu", "threads": 1},
    }
    for name, section in changes.items():
        sections[name] = {**sections.get(name, {}), **section}
    if engine != "fsdp":
        sections["hardware"].pop("hybrid_shard", None)
    return parse_recipe(sections)


class Driver:
    """One rank that trains a small model with an engine, without the loop around it."""

    def __init__(
        self, world: World, model: str, engine: str, nodes: int = 1, **changes: dict[str, Any]
    ) -> None:
        self.world, self.name = world, model
        self.recipe = recipe_of(engine, **changes)
        fields = {"x": Field("float32", (8, 8)), "y": Field("int64", (), 5)}
        info = DataInfo("x", {"train": ROWS, "test": 4}, fields, "f")
        self.plan: Plan = dataclasses.replace(
            make_plan(self.recipe, Topology.of(1, world.size), info), nodes=nodes
        )
        self.engine: Engine = build_engine(self.plan, self.recipe, world, torch.device("cpu"))
        seed_everything(1)
        self.engine.setup(MODELS[model]())
        self.step = 0

    def run(self, steps: int, spoil: float = 1.0, lr: float = 0.01) -> list[Applied]:
        """`spoil` multiplies the loss of the last microbatch of a step."""
        return [self._step(spoil, lr) for _ in range(steps)]

    def _step(self, spoil: float, lr: float) -> Applied:
        runs, total = self.plan.microbatches_of(self.step, self.world.rank), self.plan.step_size(self.step)
        last = -(-total // self.plan.micro_batch) - 1
        for i, m in enumerate(runs):
            seed = key(3, "model", self.step, m.number)
            seed_everything(seed)
            batch = self.engine.place(rows(self.name, 100 * self.step + m.start, 100 * self.step + m.stop))
            factor = spoil if m.number == last else 1.0
            group = Group(m.number, m.stop - m.start, m.stop - m.start, seed)
            this = Pass((group,), m.weight, i == len(runs) - 1)
            loss = lambda model, b=batch, f=factor: loss_sum(model, b) * f  # noqa: E731
            microstep(self.engine, loss, this, total)
        applied = self.engine.apply(lr, self.plan.counts(self.step))
        self.step += 1
        return applied

    def state(self) -> dict[str, Tensor]:
        return gather_whole(self.engine.held(), self.world)


def loss_sum(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch["x"]).float(), batch["y"], reduction="sum")


def trained(world: World, model: str, engine: str, changes: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    driver = Driver(world, model, engine, **changes)
    norms = [a.grad_norm for a in driver.run(steps)]
    return {"state": driver.state(), "norms": norms}


class Collectives(TorchDispatchMode):
    """Notes the names of the collectives that are issued, as torch calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def sharded(world: World, model: str, changes: dict[str, Any], nodes: int = 1) -> dict[str, Any]:
    """Three steps; then to ddp and back, and a step that is not finite."""
    driver = Driver(world, model, "fsdp", nodes, **changes)
    with Collectives() as sent:
        norms = [a.grad_norm for a in driver.run(3)]
    state = driver.state()
    parameters = dict(driver.engine.module.named_parameters())
    held = {name: p.to_local().numel() for name, p in parameters.items()}
    adam = driver.engine._optimizer.state  # type: ignore[attr-defined]
    trained = [p for p in parameters.values() if p.requires_grad]
    assert all(adam[p]["exp_avg"].to_local().shape == p.to_local().shape for p in trained)
    other = Driver(world, model, "ddp", **changes)
    other.engine.load(InMemory(state))
    assert_same_bits(other.state(), state)
    driver.run(1)
    driver.engine.load(InMemory(other.state()))
    assert_same_bits(driver.state(), state)
    (spoilt,) = driver.run(1, spoil=float("nan"))
    assert not spoilt.updated
    assert_same_bits(driver.state(), state)
    with driver.engine.evaluating() as module, torch.no_grad():
        logits = module(rows(model, 0, 3)["x"])
    other.step = driver.step
    driver.run(1), other.run(1)  # nothing of the evaluation is left in what was gathered
    assert worst(driver.state(), other.state())[1] < 1e-5
    return {"state": state, "norms": norms, "held": held, "sent": sent.names, "logits": logits}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes", "nodes"),
    [
        ("images", {"train": {"ema_decay": 0.9}}, 1),
        ("words", {"hardware": {"gradient_checkpointing": True}, "optim": {"freeze": ["down.*"]}}, 1),
        ("words", {"hardware": {"hybrid_shard": True}}, 2),
    ],
)
def test_what_one_process_computes_in_shards(model: str, changes: dict[str, Any], nodes: int) -> None:
    (alone,) = run_world(trained, 1, model, "ddp", changes)
    ranks = run_world(sharded, 2 * nodes, model, changes, nodes)
    name, error = worst(ranks[0]["state"], alone["state"])
    assert error < 1e-5, name
    assert ranks[0]["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    for rank in ranks:
        assert_same_bits(rank["state"], ranks[0]["state"])
        assert rank["norms"] == ranks[0]["norms"]
        assert torch.equal(rank["logits"], ranks[0]["logits"])
    for name, mine in ranks[0]["held"].items():
        size = alone["state"][f"model/{name}"].numel()
        assert mine + ranks[1]["held"][name] == size
        assert mine <= size * 0.6  # a first dimension of 5 is cut into 3 and 2
    # A unit is gathered in forward and again in backward, the root once; each is reduced in each backward.
    passes, units = 6 // nodes, {"images": 1, "words": 2}[model]
    found = Counter(ranks[0]["sent"])
    assert found["_allgather_base_"] == passes * (2 * units + 1)
    assert found["_reduce_scatter_base_"] == passes * (units + 1)
    reduced_over_nodes = passes * (units + 1) if nodes > 1 else 0
    assert found["allreduce_"] == 3 + reduced_over_nodes  # the norm, once a step


PRECISIONS = [("images", "bf16"), ("words", "bf16"), ("dense", "bf16"), ("dense", "fp16")]
"""torch has no LSTM in fp16 on a CPU, and is slow at convolutions."""


def in_precisions(world: World, engine: str) -> list[dict[str, Any]]:
    return [trained(world, m, engine, {"train": {"precision": p}}) for m, p in PRECISIONS]


def overflowing(world: World) -> tuple[bool, float, float]:
    """fp16: too large a loss lowers the scale on all ranks; the next step updates."""
    driver = Driver(world, "dense", "fsdp", train={"precision": "fp16"})
    (first,) = driver.run(1, spoil=1e6)
    (second,) = driver.run(1)
    assert (first.updated, first.rescaled, second.updated) == (False, True, True)
    return second.updated, second.grad_norm, float(driver.state()["scaler/scale"])


@pytest.mark.slow
def test_half_precision_is_that_of_ddp() -> None:
    (alone,) = run_world(in_precisions, 1, "ddp")
    ranks = run_world(in_precisions, 2, "fsdp")
    for found, want in zip(ranks[0], alone, strict=True):
        assert found["norms"] == pytest.approx(want["norms"], rel=2e-3)
        models = [{k: t for k, t in s["state"].items() if k.startswith("model/")} for s in (found, want)]
        name, error = worst(*models)
        assert error < 0.02, name
    one, other = run_world(overflowing, 2)
    assert one == other
    assert one[2] == 2.0**15


def sometimes(world: World, engine: str) -> dict[str, Any]:
    return trained(world, "sometimes", engine, {"hardware": {"unused_parameters": True}})


def refused(world: World) -> str:
    try:
        trained(world, "spare", "fsdp", {})
    except EngineError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_parameters_that_some_ranks_or_all_do_not_use() -> None:
    """What no microbatch used is left alone by the optimiser, as with one process: not decayed either."""
    (alone,) = run_world(sometimes, 1, "ddp")
    assert "optim/exp_avg/rare.weight" in alone["state"]
    assert "optim/exp_avg/never.weight" not in alone["state"]
    for rank in run_world(sometimes, 2, "fsdp"):
        name, error = worst(rank["state"], alone["state"])
        assert error < 1e-5, name
    for text in run_world(refused, 2):
        assert "got no gradient in this step: never.weight, never.bias" in text


def recomputing(world: World, engine: str) -> None:
    for model in ("images", "words"):
        plain = trained(world, model, engine, {}, steps=2)
        again = trained(world, model, engine, {"hardware": {"gradient_checkpointing": True}}, steps=2)
        assert_same_bits(again["state"], plain["state"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_recomputation_changes_no_bit(engine: str) -> None:
    run_world(recomputing, 2, engine)


def compiling(world: World) -> dict[str, Any]:
    """A block that is compiled and recomputed; with the other engine the compiler finds its work done."""
    changes = {"hardware": {"compile": True, "gradient_checkpointing": True}}
    return {engine: trained(world, "small", engine, changes) for engine in ("ddp", "fsdp")}


@pytest.mark.slow
@pytest.mark.campaign
def test_compiled_is_what_plain_code_computes(tmp_path: Path) -> None:
    """BatchNorm's statistics too."""
    env = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    (plain,) = run_world(trained, 1, "small", "ddp", {})
    for rank in run_world(compiling, 2, env=env, deadline_s=200):
        for engine, found in rank.items():
            name, error = worst(found["state"], plain["state"])
            assert error < 1e-5, (engine, name)
    assert list(tmp_path.rglob("*.so"))
