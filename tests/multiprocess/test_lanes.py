"""Language models over fixed lanes: state goes on from window to window, at any world size, over a stop."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distdl import errors
from distdl.checkpoint.manifest import step_name
from distdl.comm import World
from distdl.data.description import describe_data
from distdl.errors import RecipeError
from distdl.keys import key, seed_everything
from distdl.models import model_factory
from distdl.observe.plan_table import plan_rows
from distdl.plan import make_plan
from distdl.recipe import Recipe, parse_recipe
from distdl.testing import assert_same_bits, run_world
from distdl.testing.parity import relative_error
from distdl.topology import Topology
from distdl.train.own_loop import Run
from distdl.train.process import Options, train_process
from tests.multiprocess.sequences import make
from tests.multiprocess.test_parity import results
from tests.runs import topology_of, train_rank

VOCABULARY, LENGTH, LANES, MICRO = 30, 7, 6, 2
TOKENS = {"train": 275, "test": 60}
WINDOWS = 6
"""In each lane: 40 packed rows, 4 of which are left over."""
MODEL = {"name": "lstm_lm", "embedding": 12, "hidden": 16, "layers": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of uneven lengths."""
    rng = np.random.default_rng(4)
    splits = {}
    for split, total in TOKENS.items():
        tokens = rng.integers(2, VOCABULARY, total, dtype=np.int32)
        cuts = [0, 11, 12, 40, total]
        documents = [tokens[a:b].tolist() for a, b in itertools.pairwise(cuts)]
        splits[split] = {"tokens": pa.array(documents, pa.list_(pa.int32()))}
    return make(tmp_path_factory.mktemp("text"), splits)


def recipe_for(text: Path, run: Path, **changes: dict[str, Any]) -> Recipe:
    sections: dict[str, Any] = {
        "task": {"name": "language_modelling", "vocabulary": VOCABULARY},
        "model": MODEL,
        "data": {"path": str(text), "order": "lanes", "pack_length": LENGTH, "eval_pack_length": 20},
        "batch": {"global": LANES, "micro": MICRO},
        "optim": {"name": "sgd", "lr": 0.5, "momentum": 0.9, "clip_norm": 1.0},
        "train": {"epochs": 2, "seed": 5, "reduction": "exact"},
        "eval": {"every_epochs": None, "metric": "perplexity", "mode": "min"},
        "checkpoint": {"every_steps": 4, "keep": 9},
        "track": {"every_steps": 1},
        "hardware": {"threads": 1, "device": "cpu"},
        "run": {"dir": str(run)},
    }
    for name, section in changes.items():
        sections[name] = {**sections[name], **section}
    return parse_recipe(sections)


def train(recipe: Recipe, size: int, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    assert run_world(train_rank, size, recipe, **options) == [0] * size
    return results(Path(str(recipe.run.dir)))


def lanes_of(text: Path) -> Tensor:
    """[LANES, tokens of a lane and one]: worked out from the documents alone."""
    documents = pq.read_table(text.parent / "source" / "train.parquet")["tokens"].to_pylist()
    tokens = torch.tensor([t for document in documents for t in document])
    long = WINDOWS * LENGTH
    return torch.stack([tokens[b * long : (b + 1) * long + 1] for b in range(LANES)])


@pytest.mark.parametrize("size", [1, 2])
def test_each_window_goes_on_from_the_one_before(size: int, text: Path, tmp_path: Path) -> None:
    """With weights that stay as they are, losses are those of one pass over the whole of each lane."""
    rows, _ = train(recipe_for(text, tmp_path, optim={"lr": 1e-30, "momentum": 0.0}), size)
    seed_everything(key(5, "init"))
    keys = {k: v for k, v in MODEL.items() if k != "name"}
    model = model_factory("lstm_lm", keys)(vocabulary=VOCABULARY)
    lanes = lanes_of(text)
    with torch.no_grad():
        logits, _ = model(lanes[:, :-1])
        alone, _ = model(lanes[:, LENGTH : 2 * LENGTH])
    each = functional.cross_entropy(logits.transpose(1, 2), lanes[:, 1:], reduction="none")
    expected = each.unflatten(1, (WINDOWS, LENGTH)).mean((0, 2)).tolist()
    assert [r["loss"] for r in rows] == pytest.approx(expected * 2, rel=1e-6)
    # What a model that forgets would say of the second window is another figure.
    reset = functional.cross_entropy(alone.transpose(1, 2), lanes[:, LENGTH + 1 : 2 * LENGTH + 1])
    assert abs(float(reset) - rows[1]["loss"]) > 1e-4


@pytest.mark.slow
def test_the_same_bits_at_two_ranks_and_over_a_change_of_world_size(text: Path, tmp_path: Path) -> None:
    """Three microbatches on two ranks. Stopped in mid-epoch between two checkpoints, then alone; with
    dropout of both kinds.
    """
    change = {"model": {**MODEL, "dropout": 0.2, "weight_drop": 0.3}}
    alone = train(recipe_for(text, tmp_path / "alone", **change), 1)
    two = train(recipe_for(text, tmp_path / "two", **change), 2)
    parts = recipe_for(text, tmp_path / "parts", **change)
    assert run_world(train_rank, 2, parts, env={"DISTDL_FAIL_AT": "1:train.step@2:USR1"}) == [75, 75]
    assert run_world(train_rank, 1, parts, env={"DISTDL_FAIL_AT": "0:train.step@8:USR1"}) == [75]
    for rows, tensors in (two, train(parts, 2)):
        assert_same_bits(tensors, alone[1])
        assert [(r["loss"], r["grad_norm"]) for r in rows] == [(r["loss"], r["grad_norm"]) for r in alone[0]]
        assert rows[-1]["eval_perplexity"] == alone[0][-1]["eval_perplexity"]
    assert {n: tuple(t.shape) for n, t in alone[1].items() if n.startswith("carry/")} == {
        "carry/h0": (LANES, 16), "carry/c0": (LANES, 16), "carry/h1": (LANES, 12), "carry/c1": (LANES, 12),
    }  # fmt: skip
    manifest = json.loads((tmp_path / "two/checkpoints" / step_name(8) / "manifest.json").read_text())
    assert [(begin, end) for _, begin, end in manifest["tensors"]["carry/h0"]["pieces"]] == [
        (0, 64),
        (64, 96),
    ]


def test_a_repeat_does_not_advance_the_state(text: Path, tmp_path: Path) -> None:
    """FSDP: the second rank has one microbatch of its own, and repeats it."""
    fast = {"train": {"reduction": "fast"}}
    _, alone = train(recipe_for(text, tmp_path / "ddp", **fast), 1)
    _, sharded = train(recipe_for(text, tmp_path / "fsdp", **fast, hardware={"engine": "fsdp"}), 2)
    carried = [name for name in alone if name.startswith("carry/")]
    assert len(carried) == 4
    assert max(relative_error(sharded[name], alone[name]) for name in carried) < 1e-5


def test_a_checkpoint_of_other_lanes_is_refused_in_mid_epoch(text: Path, tmp_path: Path) -> None:
    """Four lanes have ten windows each: step 10 begins an epoch of theirs, and needs no state."""
    train(recipe_for(text, tmp_path / "run", checkpoint={"every_steps": 2}), 1)
    for step, code in ((4, errors.CHECKPOINT), (10, errors.DONE)):
        other = tmp_path / f"from-{step}"
        shutil.copytree(
            tmp_path / "run/checkpoints" / step_name(step), other / "checkpoints" / step_name(step)
        )
        recipe = recipe_for(text, other, batch={"global": 4}, train={"max_steps": 12})
        assert run_world(train_changed, 1, recipe) == [code]
    events = [json.loads(line) for line in (tmp_path / "from-4/events.jsonl").read_text().splitlines()]
    assert "carry/h0 is (6, 16), expected (4, 16)" in events[-1]["message"]


def train_changed(world: World, recipe: Recipe) -> int:
    return train_process(recipe, Topology.of(1, 1), Options(allow_changed=True))


def test_the_plan_says_what_is_left_out(text: Path, tmp_path: Path) -> None:
    recipe = recipe_for(text, tmp_path)
    plan = make_plan(recipe, Topology.of(1, 2), describe_data(recipe.data))
    assert (plan.train_rows, plan.dropped_rows, plan.steps_per_epoch) == (40, 4, WINDOWS)
    assert plan.eval_rows == 3
    assert plan_rows(plan)["dropped"] == "4 rows an epoch (as many in each lane)"
    assert plan.fuse == 1


def test_a_loop_of_ones_own_cannot_hand_state_on_and_is_told_so(text: Path, tmp_path: Path) -> None:
    assert "hands state from window to window" in run_world(refused, 1, recipe_for(text, tmp_path))[0]


def refused(world: World, recipe: Recipe) -> str:
    with pytest.raises(RecipeError) as caught:
        Run(recipe, topology_of(world), Options())
    return str(caught.value)
