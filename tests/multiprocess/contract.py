"""What the engine contract drives: four networks on made data, a plain loop, and the same steps by an engine.

The plain loop knows nothing of distdl but the keys that seed a microbatch: one process, one microbatch after
another, `loss_sum / total` backward, clip, a torch optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.comm import World
from distdl.data import Full
from distdl.engines import Engine, Group, Pass, build_engine, microstep
from distdl.keys import key, seed_everything
from distdl.models.lstm import Recurrent
from distdl.pieces import InMemory
from distdl.plan import Plan, make_plan
from distdl.recipe import Recipe, parse_recipe
from distdl.samples import DataInfo
from distdl.testing.whole import gather_whole
from distdl.topology import Topology
from distdl.train.schedule import learning_rate
from tests.multiprocess.own_models import Smooth

ROWS, MICRO, GLOBAL, STEPS, SEED = 212, 8, 64, 20, 8
"""8 microbatches a step; the fourth and last step of an epoch has 20 rows, in microbatches of 8, 8 and 4.
The networks have no kink (ReLU, max-pooling): where an activation lies within rounding of one, a gradient
moves by 1e-4 and more, and the comparison would be one of luck."""

Batch = dict[str, Tensor]


class Tied(nn.Module):
    """A language model whose embedding is its output layer, with a frozen layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.frozen = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.frozen(self.recurrent(self.embedding(tokens))[0]))
        return logits


@dataclass(frozen=True)
class Case:
    """A network, how it is trained, the batch of some sample ids, its count and its loss."""

    build: Callable[[], nn.Module]
    optim: dict[str, Any]
    batch: Callable[[Tensor], Batch]
    count: Callable[[Batch], int]
    loss_sum: Callable[[nn.Module, Batch], Tensor]
    ema: float | None = None


_made = torch.Generator().manual_seed(1)
_LABELS = torch.randint(10, (ROWS,), generator=_made)
_IMAGES = torch.randn(ROWS, 1, 12, 12, generator=_made) + _LABELS[:, None, None, None] / 5
_LENGTHS = torch.randint(1, 15, (ROWS,), generator=_made)
_TOKENS = torch.randint(1, 40, (ROWS, 15), generator=_made)


def _pictures(ids: Tensor) -> Batch:
    return {"images": _IMAGES[ids], "labels": _LABELS[ids]}


def _ragged(ids: Tensor) -> Batch:
    lengths = _LENGTHS[ids]
    longest = int(lengths.max())
    real = torch.arange(longest) < lengths[:, None]
    return {"tokens": _TOKENS[ids, :longest] * real, "lengths": lengths, "labels": _LABELS[ids]}


def _language(ids: Tensor) -> Batch:
    lengths = _LENGTHS[ids]
    longest = int(lengths.max())
    real = torch.arange(longest) < lengths[:, None]
    targets = torch.where(real, _TOKENS[ids, 1 : longest + 1], -100)
    return {"tokens": _TOKENS[ids, :longest] * real, "targets": targets}


def _rows(batch: Batch) -> int:
    return batch["labels"].shape[0]


def _image_loss(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch["images"]).float(), batch["labels"], reduction="sum")


def _text_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["tokens"], batch["lengths"]).float()
    return functional.cross_entropy(logits, batch["labels"], reduction="sum")


def _token_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["tokens"]).float().flatten(0, 1)
    return functional.cross_entropy(logits, batch["targets"].flatten(), reduction="sum", ignore_index=-100)


SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "clip_norm": 0.5}
ADAMW = {"name": "adamw", "lr": 0.003, "clip_norm": 0.5}

CASES: dict[str, Case] = {
    "cnn_batchnorm": Case(
        lambda: Smooth(1, 10, norm="batch", dropout=0.2), SGD, _pictures, _rows, _image_loss
    ),
    "cnn_groupnorm": Case(
        lambda: Smooth(1, 10, norm="group", dropout=0.0), ADAMW, _pictures, _rows, _image_loss, ema=0.9
    ),
    "lstm_ragged": Case(
        lambda: Recurrent(40, 10, embedding=8, hidden=12, layers=2, bidirectional=True, dropout=0.2),
        ADAMW,
        _ragged,
        _rows,
        _text_loss,
    ),
    "tied": Case(
        Tied,
        {**SGD, "freeze": ["frozen.*"]},
        _language,
        lambda batch: int((batch["targets"] >= 0).sum()),
        _token_loss,
    ),
}


def recipe_for(case: Case, engine: dict[str, Any], train: dict[str, Any] | None = None) -> Recipe:
    return parse_recipe(
        {
            "task": {"name": "image_classification"},
            "model": {"name": "cnn5"},
            "data": {"name": "fashion_mnist"},
            "batch": {"global": GLOBAL, "micro": MICRO},
            "optim": case.optim,
            "schedule": {"name": "cosine", "warmup_steps": 3},
            "train": {"max_steps": STEPS, "seed": SEED, "ema_decay": case.ema, **(train or {})},
            "hardware": {"threads": 1, "device": "cpu", "fuse": 1, **engine},
        }
    )


def plan_for(recipe: Recipe, size: int) -> Plan:
    info = DataInfo("made", {"train": ROWS, "test": 8}, {}, "f")
    gpus = size if recipe.hardware.device == "cuda" else 0
    return make_plan(recipe, Topology.of(1, size, gpus=gpus), info)


def ids_of(plan: Plan, step: int, start: int, stop: int) -> Tensor:
    return torch.from_numpy(Full(SEED, ROWS).ids(plan.epoch_of(step), start, stop))


def total_of(case: Case, plan: Plan, step: int) -> int:
    """The count of a whole step, from the sample ids alone."""
    alone = [m for r in range(plan.world_size) for m in plan.microbatches_of(step, r) if m.weight]
    return sum(case.count(case.batch(ids_of(plan, step, m.start, m.stop))) for m in alone)


def build(case: Case) -> nn.Module:
    seed_everything(key(SEED, "init"))
    return case.build()


def by_hand(name: str, steps: int = STEPS) -> dict[str, Tensor]:
    """Parameters ("model/..."), averages ("ema/...") after `steps` of the plain loop; of each step the rate,
    norm and sample ids.
    """
    case = CASES[name]
    recipe = recipe_for(case, {})
    plan, model = plan_for(recipe, 1), build(case)
    for pattern in case.optim.get("freeze", ()):
        model.get_submodule(pattern.removesuffix(".*")).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = case.optim.get("weight_decay", 0.01)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    sgd = case.optim["name"] == "sgd"
    optimizer = torch.optim.SGD(groups, lr=1, momentum=0.9) if sgd else torch.optim.AdamW(groups, lr=1)
    averages = {n: p.detach().clone() for n, p in model.named_parameters()}
    facts: dict[str, Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        total = total_of(case, plan, step)
        seen = []
        for m in plan.microbatches_of(step, 0):
            seed_everything(key(SEED, "model", step, m.number))
            seen.append(ids_of(plan, step, m.start, m.stop))
            loss = case.loss_sum(model, case.batch(seen[-1]))
            (loss / total).backward()
        norm = nn.utils.clip_grad_norm_(trained, case.optim["clip_norm"])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, plan, step)
        optimizer.step()
        facts[f"norm/{step}"] = norm.detach()
        facts[f"lr/{step}"] = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)
        facts[f"ids/{step}"] = torch.cat(seen)
        if case.ema is not None:
            for n, p in model.named_parameters():
                averages[n] += (1 - case.ema) * (p.detach() - averages[n])
    facts |= {f"model/{n}": p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    return facts | ({f"ema/{n}": a for n, a in averages.items()} if case.ema is not None else {})


@dataclass
class Driven:
    """A run by an engine: its state at the end, and the facts of its steps."""

    engine: Engine
    plan: Plan
    case: Case
    recipe: Recipe
    world: World
    facts: dict[str, Tensor]
    updates: int = 0
    ids: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Of each step, the sample ids of this rank's microbatches by their number; no repeats."""
    loss: float = math.nan
    """This rank's part of the loss of the last step."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Take a state that `state` returned."""
        self.engine.load(InMemory(state))

    def step(self, step: int, factor: float = 1.0) -> Any:
        """One step as `train.loop.train_step` makes it; `factor` multiplies the last rank's loss."""
        mine = self.plan.microbatches_of(step, self.world.rank)
        ids = [ids_of(self.plan, step, m.start, m.stop) for m in mine]
        batches = [self.case.batch(rows) for rows in ids]
        self.ids[f"ids/{step}"] = {m.number: rows for m, rows in zip(mine, ids, strict=True) if m.weight}
        count = sum(self.case.count(b) for b, m in zip(batches, mine, strict=True) if m.weight)
        total = self.world.sum_ints([count])[0]
        self.loss = 0.0
        for i, (m, batch) in enumerate(zip(mine, batches, strict=True)):
            seed = key(SEED, "model", step, m.number)
            group = Group(m.number, self.case.count(batch), next(iter(batch.values())).shape[0], seed)
            seed_everything(seed)
            placed = self.engine.place(batch)
            scale = factor if self.world.rank == self.world.size - 1 else 1.0
            loss_sum = microstep(
                self.engine,
                lambda model, placed=placed, scale=scale: self.case.loss_sum(model, placed) * scale,
                Pass((group,), m.weight, i == len(mine) - 1, sum(self.plan.counts(step))),
                total,
            )
            self.loss += m.weight * float(loss_sum) / total
        rate = learning_rate(self.recipe, self.plan, self.updates)
        applied = self.engine.apply(rate, self.plan.counts(step))
        self.updates += applied.updated
        self.facts[f"norm/{step}"] = torch.tensor(applied.grad_norm)
        optimizer: torch.optim.Optimizer = self.engine._optimizer  # type: ignore[attr-defined]
        (used,) = {float(group["lr"]) for group in optimizer.param_groups}
        self.facts[f"lr/{step}"] = torch.tensor(used, dtype=torch.float64)
        return applied

    def state(self) -> dict[str, Tensor]:
        """Collective. The whole state, a copy."""
        return gather_whole(self.engine.held(), self.world)


def drive(world: World, name: str, engine: dict[str, Any], train: dict[str, Any] | None = None) -> Driven:
    """An engine set up for a case, no step taken."""
    case = CASES[name]
    recipe = recipe_for(case, engine, train)
    plan = plan_for(recipe, world.size)
    device = torch.device("cuda", world.rank) if plan.device == "cuda" else torch.device("cpu")
    built = build_engine(plan, recipe, world, device)
    built.setup(build(case))
    return Driven(built, plan, case, recipe, world, {})


def finite(applied: Any) -> bool:
    return bool(applied.updated and math.isfinite(applied.grad_norm))
