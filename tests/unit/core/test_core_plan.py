"""Contract 1: a step is a fixed list of microbatches, whoever computes them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from core_support import images, plan_for, recipe_with
from hypothesis import given
from hypothesis import strategies as st

from distdl.capabilities import ENGINES
from distdl.plan import Microbatch, Plan, make_plan, share
from distdl.topology import Topology


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_shares_are_contiguous_and_even(items: int, world: int) -> None:
    runs = [share(items, rank, world) for rank in range(world)]
    assert runs[0][0] == 0
    assert runs[-1][1] == items
    assert all(before[1] == after[0] for before, after in itertools.pairwise(runs))
    sizes = [hi - lo for lo, hi in runs]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, Plan]:
    """The same recipe and data, for some world and for a single process."""
    micro = draw(st.integers(1, 9))
    count = draw(st.integers(1, 12))
    rows = draw(st.integers(1, 400))
    drop = draw(st.booleans()) and rows >= micro * count
    world = draw(st.integers(1, count))
    changes = {"batch": {"global": micro * count, "micro": micro}, "data": {"name": "x", "drop_last": drop}}
    return plan_for(world, rows, **changes), plan_for(1, rows, **changes)


@given(plans(), st.data())
def test_a_step_is_the_same_list_at_any_world_size(both: tuple[Plan, Plan], data: st.DataObject) -> None:
    plan, alone = both
    step = data.draw(st.integers(0, 3 * plan.steps_per_epoch - 1))
    by_rank = [plan.microbatches_of(step, rank) for rank in range(plan.world_size)]
    real = [[m for m in run if m.weight] for run in by_rank]

    assert [m for run in real for m in run] == alone.microbatches_of(step, 0)
    numbers = [m.number for run in real for m in run]
    assert numbers == list(range(len(numbers)))

    # The positions of the step, worked out here without the plan's own helpers, each once and in order.
    used = plan.train_rows - plan.dropped_rows
    first = step % plan.steps_per_epoch * plan.global_batch
    last = min(first + plan.global_batch, used)
    assert [p for run in real for m in run for p in range(m.start, m.stop)] == list(range(first, last))
    assert plan.step_size(step) == last - first
    assert all(0 < m.stop - m.start <= plan.micro_batch for run in real for m in run)

    sizes = [len(run) for run in real]
    assert max(sizes) - min(sizes) <= 1
    assert plan.counts(step) == sizes

    real_ones = alone.microbatches_of(step, 0)
    for run, kept in zip(by_rank, real, strict=True):
        if not kept:  # a repeat, so that the rank takes part in the communication
            assert run == [replace(real_ones[-1], weight=0)]
        else:
            assert run == kept


@given(plans())
def test_an_epoch_visits_every_row_once(both: tuple[Plan, Plan]) -> None:
    plan, _ = both
    seen = [
        position
        for step in range(plan.steps_per_epoch)
        for rank in range(plan.world_size)
        for m in plan.microbatches_of(step, rank)
        if m.weight
        for position in range(m.start, m.stop)
    ]
    assert seen == list(range(plan.train_rows - plan.dropped_rows))
    assert plan.epoch_of(plan.steps_per_epoch - 1) == 0
    assert plan.epoch_of(plan.steps_per_epoch) == 1


def test_a_short_last_batch() -> None:
    plan = plan_for(3, rows=29, batch={"global": 12, "micro": 4})
    assert (plan.steps_per_epoch, plan.last_batch, plan.dropped_rows, plan.total_steps) == (3, 5, 0, 6)
    assert plan.counts(2) == [1, 1, 0]
    assert [plan.microbatches_of(2, r) for r in range(3)] == [
        [Microbatch(0, 24, 28)],
        [Microbatch(1, 28, 29)],
        [Microbatch(1, 28, 29, weight=0)],
    ]


def test_an_engine_that_needs_no_part_gets_no_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(3, rows=29)
    monkeypatch.setitem(ENGINES, "ddp", replace(ENGINES["ddp"], needs_one=False))
    assert plan.microbatches_of(2, 2) == []


def test_drop_last() -> None:
    plan = plan_for(1, rows=29, data={"name": "x", "drop_last": True})
    assert (plan.steps_per_epoch, plan.last_batch, plan.dropped_rows) == (2, 12, 5)
    exact = plan_for(1, rows=24, data={"name": "x", "drop_last": True})
    assert (exact.steps_per_epoch, exact.last_batch, exact.dropped_rows) == (2, 12, 0)


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"epochs": 2}, 18),
        ({"epochs": None, "max_steps": 5}, 5),
        ({"epochs": 2, "max_steps": 5}, 5),
        ({"epochs": 2, "max_steps": 500}, 18),
        ({"epochs": None, "max_steps": 500}, 500),
    ],
)
def test_the_run_ends_at_whichever_comes_first(train: dict[str, int], steps: int) -> None:
    assert plan_for(1, rows=100, train=train).total_steps == steps


def test_periods_in_steps_or_epochs() -> None:
    plan = plan_for(1, rows=100, eval={"every_epochs": 2}, checkpoint={"every_steps": 7})
    assert (plan.eval_every, plan.save_every) == (18, 7)
    plan = plan_for(1, rows=100, eval={"every_epochs": None}, checkpoint={"every_epochs": 1})
    assert (plan.eval_every, plan.save_every) == (None, 9)


@pytest.mark.parametrize(
    ("wanted", "gpus", "device"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("auto", 8, "cuda"),
        ("auto", 1, "cpu"),  # fewer than the two processes of the node
        ("cpu", 8, "cpu"),
        ("cuda", 2, "cuda"),
    ],
)
def test_the_device(wanted: str, gpus: int, device: str) -> None:
    here = Topology(world_size=2, local_world_size=2, launcher="torchrun", cpus=4, gpus=gpus)
    assert make_plan(recipe_with(hardware={"device": wanted}), here, images()).device == device


def test_a_login_node_may_plan_for_gpus_it_lacks() -> None:
    ahead = Topology.of(1, 2, cpus=4, gpus=0)
    assert make_plan(recipe_with(hardware={"device": "cuda"}), ahead, images()).device == "cuda"


@pytest.mark.parametrize(
    ("wanted", "cpus", "local", "threads"),
    [("auto", 8, 2, 4), ("auto", 8, 3, 2), ("auto", 2, 3, 1), (5, 2, 3, 5)],
)
def test_threads(wanted: str | int, cpus: int, local: int, threads: int) -> None:
    topology = Topology.of(1, local, cpus=cpus)
    assert make_plan(recipe_with(hardware={"threads": wanted}), topology, images()).threads == threads


@given(plans())
def test_shares_balance_and_the_file(both: tuple[Plan, Plan]) -> None:
    plan, _ = both
    assert sum(plan.shares) == plan.microbatches
    assert plan.balance == pytest.approx(plan.microbatches / (plan.shares[0] * plan.world_size))
    assert 0.5 < plan.balance <= 1
    told = json.loads(json.dumps(plan.as_dict()))
    assert told["shares"] == list(plan.shares)
    assert told["microbatches"] == plan.microbatches
    assert told["steps_per_epoch"] == plan.steps_per_epoch


def test_threads_of_an_exact_run_do_not_depend_on_the_number_of_processes() -> None:
    exact = {"epochs": 1, "reduction": "exact"}
    assert {plan_for(n, train=exact).threads for n in (1, 2, 3)} == {1}
    assert {plan_for(n).threads for n in (1, 2, 3)} == {4, 2, 1}
    assert plan_for(2, train=exact, hardware={"device": "cpu", "threads": 3}).threads == 3
