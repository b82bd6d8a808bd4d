"""The contract: every engine computes what a plain loop in one process computes, at any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distdl.comm import World
from distdl.engines import Engine
from distdl.testing import run_world
from distdl.testing.parity import relative_error
from tests.multiprocess.contract import CASES, STEPS, by_hand, drive

ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ddp": ({"engine": "ddp"}, {}),
    "ddp_exact": ({"engine": "ddp"}, {"reduction": "exact"}),
    "ddp_sharded": ({"engine": "ddp", "shard_optimizer": True}, {}),
    "ddp_exact_sharded": ({"engine": "ddp", "shard_optimizer": True}, {"reduction": "exact"}),
    "fsdp": ({"engine": "fsdp"}, {}),
    "fsdp_exact": ({"engine": "fsdp"}, {"reduction": "exact"}),
    "zero0": ({"engine": "zero0"}, {}),
    "zero1": ({"engine": "zero1"}, {}),
    "zero2": ({"engine": "zero2"}, {}),
    "zero3": ({"engine": "zero3"}, {}),
    "accelerate": ({"engine": "accelerate"}, {}),
}
"""Name -> section `hardware`, section `train`."""

QUICK = {("ddp", 2)}
ALIKE = ("fsdp_exact", "zero1", "zero2")
"""Those whose code the others have run already, but for what tests of their own look at: in the long run, or
by this file's name.
"""
LONG = (pytest.mark.slow, pytest.mark.campaign)


def marks(name: str, size: int) -> Any:
    """World 2, and 3 by one way of sharing, in every run of the suite; all in the long one."""
    if (name, size) in QUICK:
        return ()
    usual = (size == 2 and name not in ("fsdp_exact", "zero1")) or (name, size) == ("fsdp", 3)
    return (pytest.mark.slow, *(() if usual else (pytest.mark.campaign,)))


BEHAVIOURS = [pytest.param(n, marks=LONG if n in ALIKE else pytest.mark.slow) for n in ENGINES]


WORLDS = [
    pytest.param(name, size, marks=marks(name, size))
    for name in ENGINES
    for size in (1, 2, 3, 4)
    if not (size == 1 and "sharded" in name)
]


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Tensor]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: by_hand(name) for name in CASES}
    finally:
        torch.set_num_threads(threads)


def train_all(world: World, engine: dict[str, Any], train: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The end of every case; half way, the state goes through a fresh engine of the same kind."""
    ends = {}
    for name in CASES:
        run = drive(world, name, engine, train)
        for step in range(STEPS // 2):
            assert run.step(step).updated
        kept = run.state()
        again = drive(world, name, engine, train)
        again.load(kept)
        again.updates, again.facts, again.ids = run.updates, run.facts, run.ids
        for step in range(STEPS // 2, STEPS):
            assert again.step(step).updated
        ends[name] = again.state() | again.facts | again.ids
    return ends


@pytest.mark.parametrize(("name", "size"), WORLDS)
def test_parity_with_a_plain_loop(name: str, size: int, plain: Any) -> None:
    """20 steps of 8 microbatches, a short last batch, clipping, dropout, ragged rows, tied, frozen weights,
    through a state loaded half way: the parameters, averages, norms, learning rates and sample ids of a
    plain loop.
    """
    every_rank = run_world(train_all, size, *ENGINES[name], deadline_s=200)
    for case, wanted in plain.items():
        for rank, ends in enumerate(every_rank):
            found = ends[case]
            missing = wanted.keys() - found.keys()
            assert not missing, f"{name}, {case}: {sorted(missing)}"
            errors = {n: relative_error(found[n], t) for n, t in wanted.items() if not n.startswith("ids/")}
            worst = max(errors, key=lambda n: errors[n])
            assert errors[worst] < 1e-5, f"{name} at {size}, {case}, rank {rank}: {worst} {errors[worst]:.1e}"
            if rank == 0:
                print(f"\n{name:18} world {size} {case:14} worst {errors[worst]:.1e} ({worst})", end="")
        assert all(torch.equal(ends[case][n], wanted[n]) for ends in every_rank for n in wanted if "lr/" in n)
        for step in range(STEPS):
            held = [ends[case][f"ids/{step}"] for ends in every_rank]
            together = {number: ids for rank in held for number, ids in rank.items()}
            assert len(together) == sum(map(len, held)), "two ranks ran the same microbatch"
            ids = torch.cat([together[number] for number in sorted(together)])
            assert torch.equal(ids, wanted[f"ids/{step}"]), f"{name} at {size}, {case}, step {step}"


def skip_all(world: World, engine: dict[str, Any], train: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """An infinite loss on the last rank alone, then a good step."""
    run = drive(world, "cnn_batchnorm", engine, train)
    run.step(0)
    before = run.state()
    applied = run.step(1, factor=float("inf"))
    assert not applied.updated
    after = run.state()
    assert run.step(2).updated
    return {"before": before, "after": after, "end": run.state()}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_step_that_is_not_finite_is_skipped_by_all(name: str) -> None:
    for states in run_world(skip_all, 2, *ENGINES[name]):
        before, after = states["before"], states["after"]
        assert before.keys() == after.keys()
        assert not [n for n in before if not torch.equal(before[n], after[n])]
        changed = [n for n in before if not torch.equal(after[n], states["end"][n])]
        assert any(n.startswith("optim/") for n in changed)
        assert all(torch.isfinite(t).all() for t in states["end"].values())


def first_gradients(world: World, engine: dict[str, Any], train: dict[str, Any]) -> dict[str, Tensor]:
    """SGD's momentum after one step is the (clipped) gradient itself."""
    run = drive(world, "tied", engine, train)
    applied = run.step(0)
    return run.state() | {"norm": torch.tensor(applied.grad_norm)}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_ragged_batches_have_the_gradient_of_one_big_batch(name: str) -> None:
    from tests.multiprocess.contract import GLOBAL, build, ids_of, plan_for, recipe_for

    case = CASES["tied"]
    plan, model = plan_for(recipe_for(case, {}), 1), build(case)
    model.get_submodule("frozen").requires_grad_(False)
    whole = case.batch(ids_of(plan, 0, 0, GLOBAL))
    (case.loss_sum(model, whole) / case.count(whole)).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(wanted.values()))
    decays = {n: 1e-3 if p.ndim > 1 else 0.0 for n, p in model.named_parameters()}
    start = {n: p.detach() for n, p in build(case).named_parameters()}
    for found in run_world(first_gradients, 3, *ENGINES[name]):
        assert relative_error(found["norm"], norm) < 1e-6
        for n, gradient in wanted.items():
            clipped = gradient * min(1.0, 0.5 / (float(norm) + 1e-6)) + decays[n] * start[n]
            assert relative_error(found[f"optim/momentum_buffer/{n}"], clipped) < 1e-6, n


def pass_on(world: World, state: dict[str, Tensor], engine: dict[str, Any], train: dict[str, Any]) -> Any:
    """Take a state, and give it back; then what it evaluates to."""
    run = drive(world, "cnn_groupnorm", engine, train)
    run.load(state)
    given = run.state()
    return given, evaluated(run.engine)


def evaluated(engine: Engine) -> Tensor:
    images = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    with engine.evaluating() as model, torch.no_grad():
        assert not model.training
        found: Tensor = model(images).clone()
    assert engine.module.training
    return found


def start_off(world: World, engine: dict[str, Any], train: dict[str, Any]) -> Any:
    run = drive(world, "cnn_groupnorm", engine, train)
    for step in range(3):
        run.step(step)
    return run.state(), evaluated(run.engine)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_any_engine_takes_what_ddp_wrote_and_gives_it_back_to_the_bit(name: str) -> None:
    """And evaluates the averaged weights with it."""
    state, logits = run_world(start_off, 1, *ENGINES["ddp"])[0]
    for given, found in run_world(pass_on, 2, state, *ENGINES[name]):
        assert given.keys() == state.keys()
        assert not [
            n for n in state if given[n].dtype != state[n].dtype or not torch.equal(given[n], state[n])
        ]
        assert relative_error(found, logits) < 1e-6


LOW = {"bf16": ("lstm_ragged", 0.01), "fp16": ("cnn_groupnorm", 0.1)}
"""Precision -> case, and how far its gradient norms may be off. oneDNN has no LSTM in fp16
for most processors; GPUs have."""


def low_precision(world: World, engine: dict[str, Any], train: dict[str, Any]) -> dict[str, Tensor]:
    ends: dict[str, Tensor] = {}
    for precision, (case, _) in LOW.items():
        run = drive(world, case, engine, {**train, "precision": precision})
        if precision == "fp16":
            # The first step overflows: all skip it and lower the scale.
            before = run.state()
            applied = run.step(0, factor=1e6)
            assert applied.rescaled
            assert not applied.updated
            after = run.state()
            assert [n for n in before if not torch.equal(before[n], after[n])] == ["scaler/scale"]
            assert float(after["scaler/scale"]) == float(before["scaler/scale"]) / 2
        for step in range(8):
            assert run.step(step).updated
        ends |= {f"{precision}/{n}": t for n, t in (run.state() | run.facts).items()}
    return ends


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_bf16_and_fp16_stay_near_fp32(name: str) -> None:
    """The weights stay fp32, and norms are within the precision of the arithmetic."""
    wanted = {precision: by_hand(case, 8) for precision, (case, _) in LOW.items()}
    for found in run_world(low_precision, 2, *ENGINES[name]):
        for precision, (_, off) in LOW.items():
            for step in range(3):  # later, what has been rounded has been amplified
                norm = float(found[f"{precision}/norm/{step}"])
                assert norm == pytest.approx(float(wanted[precision][f"norm/{step}"]), rel=off)
            assert found[f"{precision}/model/head.weight"].dtype == torch.float32
