"""train.reduction: exact. The same bits at any world size, sharded or not, and through stops and restarts."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distdl.comm import World
from distdl.comm.exchange import Exchange, route_of
from distdl.comm.tree import tree_sum
from distdl.engines import build_engine, slabs
from distdl.models.cnn5 import Cnn5
from distdl.recipe import Recipe, parse_recipe
from distdl.record import read_lines
from distdl.testing import WorldFailed, run_world
from tests.multiprocess.contract import ADAMW, CASES, SGD, Driven, build, plan_for, recipe_for
from tests.multiprocess.test_parity import recipe_for as recipe_of_images
from tests.multiprocess.test_parity import results
from tests.runs import train_rank


class Sometimes(Cnn5):
    """Uses a layer for some microbatches only, and another for none."""

    def __init__(self) -> None:
        super().__init__(1, 10, width=4, norm="batch", dropout=0.2, hidden=16)
        self.rare = nn.Linear(10, 10)
        self.never = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return self.rare(logits) if float(images[0, 0, 0, 0]) > 1.0 else logits


Runs = list[tuple[str, str, int, bool]]
"""Case, optimiser, microbatches of a step, shard_optimizer."""


def sha256(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def exchanged(world: World, counts: list[int]) -> list[int]:
    """The step sizes for which the exchange gave other bits than the tree, whole or to owners."""
    exchange = Exchange(world, torch.device("cpu"))
    wrong = []
    for count in counts:
        parts = list(torch.randn(count, 1003, generator=torch.Generator().manual_seed(count)))
        expected, route = tree_sum(parts), route_of(count, world.size)
        held = [tree_sum(parts[a:b]).clone() for a, b in route.nodes[world.rank]]
        out = held[0] if held else torch.empty(1003)
        exchange.start_sum(route, held, out)()
        held = [tree_sum(parts[a:b]).clone() for a, b in route.nodes[world.rank]]
        owned = held[0] if held else torch.empty(1003)
        cuts = (0, *[700] * (world.size - 1), 1003)  # some own nothing
        exchange.sum_to_owners(route, held, cuts, owned)
        exchange.gather_segments(owned, cuts)
        if not (torch.equal(out, expected) and torch.equal(owned, expected)):
            wrong.append(count)
    return wrong


def driven(
    world: World,
    name: str,
    optim: str,
    count: int,
    sharded: bool,
    reduction: str = "exact",
    model: Any = None,
    engine: str = "ddp",
) -> Driven:
    case = replace(CASES[name], optim={"sgd": SGD, "adamw": ADAMW}[optim])
    case = replace(case, build=model or case.build)
    hardware, train = {"engine": engine, "shard_optimizer": sharded}, {"reduction": reduction}
    sections = recipe_for(case, hardware, train).model_dump(mode="json", by_alias=True)
    sections["batch"]["global"] = 8 * count
    recipe = parse_recipe(sections)
    plan = plan_for(recipe, world.size)
    built = build_engine(plan, recipe, world, torch.device("cpu"))
    built.setup(build(case))
    return Driven(built, plan, case, recipe, world, {})


def digests(world: World, runs: Runs, steps: int, engine: str = "ddp", bucket_bytes: int = 2048) -> list[str]:
    """One sha256 a run, over parameters, optimiser state, buffers, and the norm and rate of each step.

    Several buckets, of these small models: their order counts. Under FSDP, parameters are really in shards.
    """
    slabs._BYTES, slabs._FIRST_BYTES = bucket_bytes, bucket_bytes // 2
    found = []
    for run in runs:
        one = driven(world, *run, engine=engine)
        assert all(one.step(step).updated for step in range(steps))
        cut = any(isinstance(p, DTensor) for p in one.engine.module.parameters())
        assert cut == (engine == "fsdp" and world.size > 1)
        found.append(sha256(one.state() | one.facts))
    return found


def table(runs: Runs, worlds: list[int], steps: int, engine: str = "ddp") -> dict[int, list[str]]:
    found = {}
    for size in worlds:
        ranks = run_world(digests, size, runs, steps, engine)
        assert all(rank == ranks[0] for rank in ranks), f"ranks of world {size} differ"
        found[size] = ranks[0]
        print(f"\nworld {size}: " + "  ".join(d[:12] for d in ranks[0]))
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_an_exchange_adds_along_the_tree(size: int) -> None:
    assert run_world(exchanged, size, list(range(1, 25))) == [[]] * size


@pytest.mark.slow
@pytest.mark.parametrize("size", [5, 8])
def test_an_exchange_adds_along_the_tree_of_many(size: int) -> None:
    assert run_world(exchanged, size, list(range(1, 25))) == [[]] * size


QUICK: Runs = [
    ("cnn_batchnorm", "sgd", 8, False),
    ("cnn_batchnorm", "sgd", 8, True),
    ("lstm_ragged", "adamw", 12, False),
    ("lstm_ragged", "adamw", 12, True),
    ("tied", "sgd", 5, False),
]


@pytest.fixture(scope="module")
def quick() -> dict[int, list[str]]:
    return table(QUICK, [1, 2, 3, 4], 4)


def test_two_ranks_have_the_bits_of_one() -> None:
    found = table(QUICK[1:3], [1, 2], 4)
    assert found[1] == found[2]


@pytest.mark.slow
def test_one_sha256_at_any_world_size(quick: dict[int, list[str]]) -> None:
    assert all(found == quick[1] for found in quick.values()), quick


@pytest.mark.slow
def test_sharding_the_optimiser_changes_no_bit(quick: dict[int, list[str]]) -> None:
    for found in quick.values():
        assert found[0] == found[1]
        assert found[2] == found[3]
        assert len({found[0], found[2], found[4]}) == 3


SHARDED: Runs = [
    ("cnn_batchnorm", "sgd", 8, False),
    ("cnn_batchnorm", "adamw", 12, False),
    ("lstm_ragged", "adamw", 12, False),
    ("lstm_ragged", "sgd", 8, False),
    ("tied", "sgd", 5, False),
    ("cnn_groupnorm", "adamw", 4, False),
]


@pytest.mark.slow
def test_fsdp_has_the_same_bits_at_any_world_size() -> None:
    """Several microbatches a rank, uneven shares, a short last batch, clipping, an average of the weights."""
    found = table(SHARDED, [1, 2, 3], 5, "fsdp")
    assert all(one == found[1] for one in found.values()), found


@pytest.mark.slow
def test_buckets_change_no_bit(quick: dict[int, list[str]]) -> None:
    assert run_world(digests, 2, QUICK[:1], 4, "ddp", 2**20)[0] == quick[2][:1]


def awkward(world: World) -> list[Any]:
    """Parameters that few or none use, a gradient that is not finite, state that is really sharded."""
    found: list[Any] = []
    for sharded in (False, True):
        slabs._BYTES, slabs._FIRST_BYTES = 2048, 512
        one = driven(world, "cnn_batchnorm", "adamw", 8, sharded, model=Sometimes)
        assert one.step(0).updated
        before = sha256(one.state())
        assert not one.step(1, factor=float("inf")).updated
        assert sha256(one.state()) == before
        assert all(one.step(step).updated for step in (2, 3))
        state = one.state()
        assert "optim/exp_avg/rare.weight" in state
        assert not [name for name in state if name.startswith("optim/") and "never" in name]
        found.append(sha256(state | one.facts))
        again = driven(world, "cnn_batchnorm", "adamw", 8, sharded, model=Sometimes)
        again.load(state)
        again.facts, again.updates = dict(one.facts), one.updates
        assert sha256(again.state()) == sha256(state)
        assert again.step(4) == one.step(4)
        assert sha256(again.state()) == sha256(one.state())
        held = [len(engine._optimizer.state) for engine in (one.engine, again.engine)]  # type: ignore[attr-defined]
        assert held[0] == held[1]
        found.append(held[0])
    return found


def fast_sharded(world: World) -> list[str]:
    found = []
    for sharded in (False, True):
        one = driven(world, "lstm_ragged", "adamw", 2, sharded, "fast")
        assert all(one.step(step).updated for step in range(3))
        found.append(sha256(one.state() | one.facts))
    return found


def test_sharding_the_optimiser_changes_no_bit_in_fast_mode_either() -> None:
    """Two microbatches on two ranks: a sum of two terms has one order, so DDP's has these bits too."""
    ranks = [*run_world(fast_sharded, 2), *run_world(fast_sharded, 1)]
    assert len({digest for rank in ranks for digest in rank}) == 1


@pytest.mark.slow
def test_unused_parameters_skipped_steps_and_sharded_state() -> None:
    ranks = {size: run_world(awkward, size) for size in (1, 2, 3)}
    alone = ranks[1][0]
    assert alone[0] == alone[2]
    for size, found in ranks.items():
        assert all(rank[0] == rank[2] == alone[0] for rank in found), size
        assert all(rank[1] == alone[1] for rank in found)
        held = [rank[3] for rank in found]
        assert sum(held) == alone[1]
        assert max(held) < alone[1] or size == 1


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize("count", [8, 12])
def test_the_whole_table(count: int) -> None:
    """With 8 ranks, the short last step has fewer microbatches than ranks."""
    cases = [(name, optim) for name in ("cnn_batchnorm", "lstm_ragged") for optim in ("sgd", "adamw")]
    runs = [(name, optim, count, sharded) for name, optim in cases for sharded in (False, True)]
    found = table(runs, [1, 2, 3, 4, 8], 4)
    assert all(one == found[1] for one in found.values()), found
    assert found[1][::2] == found[1][1::2]


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize("count", [8, 12])
def test_the_whole_table_under_fsdp(count: int) -> None:
    cases = [(name, optim) for name in ("cnn_batchnorm", "lstm_ragged") for optim in ("sgd", "adamw")]
    runs = [(name, optim, count, False) for name, optim in cases]
    found = table(runs, [1, 2, 3, 4, 8], 4, "fsdp")
    assert all(one == found[1] for one in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize(
    "hardware",
    [{"shard_optimizer": True}, pytest.param({"engine": "fsdp"}, marks=pytest.mark.campaign)],
    ids=["ddp", "fsdp"],
)
def test_exact_through_change(hardware: dict[str, Any], tmp_path: Path) -> None:
    """4 ranks, kill -9 of one, 1 rank, kill -9, 3 ranks: the bits of 2 ranks undisturbed, metrics and all."""
    parts, whole = (exact_recipe(tmp_path / name, **hardware) for name in ("parts", "whole"))
    for size, fault, saved in ((4, "1:train.step@6:kill", 4), (1, "0:train.step@9:kill", 8)):
        with pytest.raises(WorldFailed, match="died without a word"):
            run_world(train_rank, size, parts, env={"DISTDL_FAIL_AT": fault}, deadline_s=60)
        assert max((tmp_path / "parts" / "checkpoints").iterdir()).name == f"step-{saved:08d}"
    assert run_world(train_rank, 3, parts) == [0] * 3
    assert run_world(train_rank, 2, whole) == [0] * 2
    (rows, tensors), (expected_rows, expected) = results(tmp_path / "parts"), results(tmp_path / "whole")
    assert sha256(tensors) == sha256(expected)
    kept = ("step", "loss", "lr", "grad_norm", "eval_accuracy", "eval_loss")
    assert [[r.get(k) for k in kept] for r in rows] == [[r.get(k) for k in kept] for r in expected_rows]


@pytest.mark.slow
def test_other_threads_at_a_resume_are_reported(tmp_path: Path) -> None:
    short = {"model": {"width": 1, "hidden": 2}, "batch": {"global": 256, "micro": 64}}
    for threads, differs in ((1, 0), (1, 0), (2, 1)):  # resumed at its end
        recipe = recipe_of_images(
            tmp_path,
            **short,
            train={"reduction": "exact", "max_steps": 1},
            schedule={"name": "constant", "warmup_steps": 0},
            hardware={"threads": threads},
        )
        assert run_world(train_rank, 1, recipe, deadline_s=60) == [0]
        events = [e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "arithmetic_changed"]
        assert [e["changes"] for e in events] == [["threads: 1 -> 2"]] * differs


def exact_recipe(folder: Path, **hardware: Any) -> Recipe:
    return recipe_of_images(
        folder,
        model={"norm": "batch"},
        train={"reduction": "exact"},
        checkpoint={"every_steps": 4},
        hardware=hardware,
    )
