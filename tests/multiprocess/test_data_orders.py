"""Every order, augmentation and transform, and mixtures: the same run at any world size and after a stop."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from distdl.data import Feed
from distdl.data.description import describe_data
from distdl.plan import Plan, make_plan
from distdl.recipe import Recipe, parse_recipe
from distdl.samples import packed_rows
from distdl.tasks import Batch, Task, build_task
from distdl.testing import assert_same_bits, run_world
from distdl.topology import Topology
from distdl.train.batches import Batches
from tests.commands import distdl
from tests.multiprocess.sequences import ROWS, VOCABULARY, make_sequences
from tests.multiprocess.test_parity import results
from tests.runs import train_rank

# Two and three processes for each case: a minute and a half in all.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.multiprocess.sequences"
EXAMPLE = "examples.own_sequences.task"
STEPS = 14
BATCH = {"global": 24, "micro": 4}
MIX = {"a": 0.3, "b": 0.7}

CLASSIFY = {
    "task": {"name": f"{HERE}:Ids"},
    "model": {"name": f"{EXAMPLE}:Pooled", "vocab_size": VOCABULARY},
}
NEXT = {
    "task": {"name": f"{HERE}:Next", "vocab_size": VOCABULARY},
    "model": {"name": f"{EXAMPLE}:Recurrent"},
    "eval": {"metric": "loss", "mode": "min"},
}
CURVE = {"model": {"name": f"{HERE}:Waves"}}
IMAGES = {
    "task": {"name": "image_classification"},
    "model": {"name": "cnn5", "width": 4, "norm": "group", "hidden": 16},
}
DROPOUT = {"augment": {"token_dropout": 0.1}, "sequence": "tokens"}

CASES: dict[str, dict[str, Any]] = {
    "full": {**CLASSIFY, "data": {"path": "a", **DROPOUT}},
    "block": {**CLASSIFY, "data": {"path": "a", "order": "block", "block_window": 50, **DROPOUT}},
    "sequential": {
        **CLASSIFY,
        "data": {"path": "a", "order": "sequential", "transform": f"{HERE}:swap_tokens"},
    },
    "length_bucketed": {
        **CLASSIFY,
        "data": {
            "path": "a", "order": "length_bucketed", "bucket_batches": 3,
            "transform": f"{HERE}:swap_tokens", **DROPOUT,
        },
    },
    "next token": {**NEXT, "data": {"path": "a", "order": "length_bucketed", "sequence": "tokens"}},
    "packed": {**NEXT, "data": {"path": "a", "order": "packed", "sequence": "tokens", "pack_length": 9}},
    "packed, dropout": {**NEXT, "data": {"path": "a", "order": "packed", "pack_length": 9, **DROPOUT}},
    "mixture": {**CLASSIFY, "data": {"mixture": MIX, **DROPOUT}},
    "jitter": {
        "task": {"name": f"{HERE}:Curve", "tokens": "series"},
        **CURVE,
        "data": {"path": "a", "augment": {"jitter": 0.3}, "sequence": "series", "order": "length_bucketed"},
    },
    "jitter of one length": {
        "task": {"name": f"{HERE}:Curve", "tokens": "fixed"},
        **CURVE,
        "data": {"path": "a", "augment": {"jitter": 0.3}, "sequence": "fixed"},
    },
    "cutout": {
        **IMAGES,
        "data": {
            "name": "fashion_mnist", "order": "block", "augment": {"cutout": 6, "flip": True},
            "transform": f"{HERE}:roll_images",
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_sequences(tmp_path_factory.mktemp("sequences"))


def sections_for(
    case: str, folders: dict[str, str], run: Path = Path("unused"), **changes: Any
) -> dict[str, Any]:
    """The recipe of a case, with `changes` of single keys, such as data__drop_last=True."""
    sections: dict[str, Any] = {
        "batch": BATCH,
        "optim": {"name": "sgd", "lr": 0.3, "momentum": 0.9, "clip_norm": 1.0},
        "train": {"max_steps": STEPS, "seed": 5},
        "checkpoint": {"every_steps": 4, "keep": 9},
        "track": {"every_steps": 1},
        "eval": {"every_epochs": None},
        "hardware": {"threads": 1, "device": "cpu"},
        "run": {"dir": str(run)},
    }
    for name, section in CASES[case].items():
        sections[name] = {**sections.get(name, {}), **section}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections[section] = {**sections.get(section, {}), name: value}
    data = sections["data"]
    if "path" in data:
        data["path"] = folders[data["path"]]
    if "mixture" in data:
        data["mixture"] = {folders[name]: weight for name, weight in data["mixture"].items()}
    return sections


def recipe_for(case: str, folders: dict[str, str], run: Path = Path("unused"), **changes: Any) -> Recipe:
    return parse_recipe(sections_for(case, folders, run, **changes))


def plan_for(recipe: Recipe, size: int = 1) -> Plan:
    return make_plan(recipe, Topology.of(1, size), describe_data(recipe.data))


class World:
    """All ranks of a world of `size`, in this process: what each of them would train on."""

    def __init__(self, recipe: Recipe, size: int) -> None:
        self.plan, self.feed = plan_for(recipe, size), Feed.open(recipe.data)
        self.rows, self.order = self.feed.rows("train"), self.feed.order(recipe, self.plan)
        self.task: Task = build_task(
            recipe.task.name, recipe.task.options(), lambda **_: torch.nn.Linear(1, 1), self.feed.info
        )
        self.ranks = [
            Batches(recipe, self.plan, self.task, self.rows, self.order, rank) for rank in range(size)
        ]

    def step(self, step: int) -> dict[int, Batch]:
        """Number -> the microbatch, of a step; each by one rank alone."""
        found = [m for rank in self.ranks for m in rank.get(step) if m.weight]
        assert [m.number for m in found] == list(range(len(found)))
        return {m.number: m.batch for m in found}

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what each step holds ---


@pytest.mark.parametrize("case", [c for c in CASES if c != "cutout"])
def test_every_step_holds_the_same_at_any_world_size(case: str, folders: dict[str, str]) -> None:
    """Ids, tokens, padding, what augmentation and transform made of them: to the bit, over two epochs."""
    recipe = recipe_for(case, folders)
    alone, *others = [World(recipe, size) for size in (1, 2, 3, 5)]
    for step in range(2 * alone.plan.steps_per_epoch):
        expected = alone.step(step)
        for other in others:
            found = other.step(step)
            assert found.keys() == expected.keys()
            assert all(same(found[n], expected[n]) for n in found)


@pytest.mark.parametrize("case", ["full", "block", "sequential", "length_bucketed", "jitter"])
def test_every_id_once_in_an_epoch(case: str, folders: dict[str, str]) -> None:
    world = World(recipe_for(case, folders), 3)
    epochs = [[i for s in steps for b in world.step(s).values() for i in b["ids"].tolist()]
              for steps in (range(7), range(7, 14))]  # fmt: skip
    assert world.plan.steps_per_epoch == 7
    assert [sorted(ids) for ids in epochs] == [list(range(ROWS["a"][0]))] * 2
    assert (epochs[0] != epochs[1]) == (case != "sequential")


@pytest.mark.parametrize("epoch_rows", [None, 700])
def test_a_mixture_keeps_its_proportions_and_passes(epoch_rows: int | None, folders: dict[str, str]) -> None:
    world = World(recipe_for("mixture", folders, data__epoch_rows=epoch_rows), 2)
    epochs = 3 if epoch_rows is None else 1
    steps = range(epochs * world.plan.steps_per_epoch)
    ids = [i for s in steps for b in world.step(s).values() for i in b["ids"].tolist()]
    counts = np.bincount(np.array(ids) // 1000)
    assert len(ids) == (epoch_rows or 3 * 234)
    assert counts.tolist() == pytest.approx([0.3 * len(ids), 0.7 * len(ids)], abs=1)
    for name, seen in zip("ab", counts, strict=True):
        times = np.unique([i for i in ids if (i >= 1000) == (name == "b")], return_counts=True)[1]
        rows = ROWS[name][0]
        assert set(times) <= {seen // rows, seen // rows + 1}, "passes: none is seen twice more than another"


def test_packed_rows_hold_each_token_once(folders: dict[str, str]) -> None:
    world = World(recipe_for("packed", folders), 2)
    whole = World(recipe_for("next token", folders), 1)

    def pairs(w: World) -> list[tuple[int, int]]:
        batches = [b for s in range(w.plan.steps_per_epoch) for b in w.step(s).values()]
        real = [(b["tokens"][:, :-1][b["real"]], b["tokens"][:, 1:][b["real"]]) for b in batches]
        return sorted((int(x), int(y)) for a, b in real for x, y in zip(a, b, strict=True))

    elements = describe_data(recipe_for("packed", folders).data).elements["train"]["tokens"]
    assert world.plan.train_rows == packed_rows(elements, 9)
    assert len(pairs(world)) == elements - ROWS["a"][0]
    assert pairs(world) == pairs(whole)


# --- what is dropped, and what an epoch is worth ---


@pytest.mark.parametrize("case", ["full", "block", "sequential", "length_bucketed", "packed", "mixture"])
def test_the_plan_says_how_many_are_dropped(case: str, folders: dict[str, str]) -> None:
    recipe = recipe_for(case, folders, data__drop_last=True)
    plan, kept = plan_for(recipe), plan_for(recipe_for(case, folders))
    assert kept.dropped_rows == 0
    assert plan.dropped_rows == kept.train_rows % 24 == kept.last_batch % 24 > 0
    world = World(recipe, 2)
    sizes = [sum(len(b["tokens"]) for b in world.step(s).values()) for s in range(plan.steps_per_epoch)]
    assert set(sizes) == {24}
    assert sum(sizes) == plan.train_rows - plan.dropped_rows


@pytest.mark.parametrize("task", ["classify", "next token"])
def test_the_mean_loss_of_an_epoch_does_not_depend_on_the_order(task: str, folders: dict[str, str]) -> None:
    """At fixed weights. `layers: 0` sees no context, which packing cuts off."""
    from distdl.models import model_factory

    plain: dict[str, Any] = {"data__augment": {}, "data__transform": None, "data__sequence": "tokens"}
    orders: list[dict[str, Any]] = [
        {"data__order": o} for o in ("full", "block", "sequential", "length_bucketed")
    ]
    case = "full" if task == "classify" else "next token"
    if task == "next token":
        plain["model__layers"] = 0
        orders.append({"data__order": "packed", "data__pack_length": 9})
    weights = {folders["a"]: 163 / 234, folders["b"]: 71 / 234}  # in proportion: one pass over both
    orders.append({"data__path": None, "data__mixture": weights, "data__order": "full"})
    means: list[float] = []
    for changes in orders:
        sections = sections_for(case, folders, **plain)
        for key, value in changes.items():
            section, _, name = key.partition("__")
            sections[section] = {**sections[section], name: value}
        recipe = parse_recipe(sections)
        torch.manual_seed(0)
        factory = model_factory(recipe.model.name, recipe.model.options())
        outputs = 2 if task == "classify" else VOCABULARY
        model, world = factory(num_outputs=outputs), World(recipe, 2)
        batches = [b for s in range(world.plan.steps_per_epoch) for b in world.step(s).values()]
        with torch.no_grad():
            total = math.fsum(float(world.task.loss_sum(model, b)) for b in batches)
        means.append(total / sum(world.task.count(b) for b in batches))
    *one, mixed = means
    assert one == pytest.approx([one[0]] * len(one), rel=1e-6)
    assert abs(mixed / one[0] - 1) > 1e-4, "other data: the figures above are not alike by chance"


# --- training ---


def train(folder: Path, size: int, case: str, folders: dict[str, str], **changes: Any) -> Any:
    recipe = recipe_for(case, folders, folder, **changes)
    assert run_world(train_rank, size, recipe) == [0] * size
    return results(folder)


EVALUATED = {
    "mixture": {"eval_rows": ROWS["a"][1] + ROWS["b"][1]},
    "full": {"eval_rows": ROWS["a"][1], "eval_ids": sum(range(500, 537))},
}


@pytest.mark.parametrize("case", CASES)
def test_world_size_does_not_change_a_run(case: str, folders: dict[str, str], tmp_path: Path) -> None:
    """To the bit: reduced exactly, nothing but the data and what is random could make a difference."""
    sizes = (2, 3) if case == "length_bucketed" else (2,)
    alone = train(tmp_path / "1", 1, case, folders, train__reduction="exact")
    assert [row["step"] for row in alone[0]] == list(range(1, STEPS + 1))
    for size in sizes:
        rows, tensors = train(tmp_path / str(size), size, case, folders, train__reduction="exact")
        for mine, theirs in zip(rows, alone[0], strict=True):
            same = ("loss", "lr", "samples", "grad_norm")
            assert [mine[key] for key in same] == [theirs[key] for key in same]
        assert_same_bits(tensors, alone[1])
        # Each row once, whichever rank has it.
        exact = [n for n in rows[-1] if n in ("eval_rows", "eval_ids", "eval_targets", "eval_tokens")]
        assert {n: rows[-1][n] for n in exact} == {n: alone[0][-1][n] for n in exact}
        assert rows[-1]["eval_loss"] == alone[0][-1]["eval_loss"]
    for name, expected in EVALUATED.get(case, {}).items():
        assert alone[0][-1][name] == expected
    if case in ("packed", "next token"):
        info = describe_data(recipe_for(case, folders).data)
        assert alone[0][-1]["eval_targets"] == info.elements["test"]["tokens"] - info.rows["test"]


@pytest.mark.parametrize("case", ["length_bucketed", "packed", "mixture"])
def test_resume_in_mid_epoch_is_bit_identical(case: str, folders: dict[str, str], tmp_path: Path) -> None:
    """Stopped twice at steps between two checkpoints, by a signal to one rank."""
    whole = train(tmp_path / "whole", 2, case, folders)
    parts = recipe_for(case, folders, tmp_path / "parts")
    for rank, step in ((1, 2), (0, 8)):
        assert (step + 1) % plan_for(parts).steps_per_epoch
        stop = {"DISTDL_FAIL_AT": f"{rank}:train.step@{step}:USR1"}
        assert run_world(train_rank, 2, parts, env=stop) == [75, 75]
    assert run_world(train_rank, 2, parts) == [0, 0]
    rows, tensors = results(tmp_path / "parts")
    assert_same_bits(tensors, whole[1])
    assert [(r["loss"], r["grad_norm"]) for r in rows] == [(r["loss"], r["grad_norm"]) for r in whole[0]]


# --- workers ---


def test_workers_hand_out_the_same_bits(folders: dict[str, str]) -> None:
    changes: dict[str, Any] = {"data__transform": f"{HERE}:swap_tokens", "hardware__prefetch_steps": 2}
    plain, busy = (World(recipe_for("full", folders, **changes, hardware__workers=n), 2) for n in (0, 2))
    try:
        for step in itertools.chain(range(9), range(5, 7)):  # onward over an epoch, and back
            expected, found = plain.step(step), busy.step(step)
            assert all(same(found[n], expected[n]) for n in expected)
    finally:
        plain.close()
        busy.close()


@pytest.mark.slow
def test_a_run_with_workers_is_the_run_without(folders: dict[str, str], tmp_path: Path) -> None:
    """Through `distdl launch`: the ranks of `run_world` are daemons, which may start no processes."""
    plain = train(tmp_path / "plain", 2, "length_bucketed", folders)
    file = tmp_path / "recipe.yaml"
    sections = sections_for("length_bucketed", folders, tmp_path / "busy", hardware__workers=2)
    file.write_text(yaml.safe_dump(sections))
    code, said = distdl("launch", str(file), "--procs", "2", cwd=ROOT, timeout_s=120)
    assert code == 0, said
    rows, tensors = results(tmp_path / "busy")
    assert_same_bits(tensors, plain[1])
    assert [r["loss"] for r in rows] == [r["loss"] for r in plain[0]]
    assert json.loads((tmp_path / "busy" / "attempts" / "0001" / "plan.json").read_text())["world_size"] == 2
