"""ZeRO computes what DDP computes, shards what it says, and its state is every other engine's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distdl.comm import World
from distdl.testing import assert_same_bits, run_world, worst
from distdl.testing.worlds import WorldFailed
from tests.multiprocess.contract import CASES, Driven, by_hand, drive

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

CUT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Stage 3 keeps small parameters whole by itself, and here all are small."""


@cache
def expected(name: str) -> dict[str, Tensor]:
    return {n: t for n, t in by_hand(name, 4).items() if not n.startswith("ids/")}


class Spy(TorchDispatchMode):
    """Writes down the collectives of the block: name and elements of the first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            self.seen.append((func.__name__.split(".")[0], sum(t.numel() for t in tensors)))
        return func(*args, **(kwargs or {}))


def held(run: Driven) -> dict[str, int]:
    """Elements of parameters and of optimiser state (step counters aside) on this rank, between steps."""
    pieces = [getattr(p, "ds_tensor", p) for p in run.engine.module.parameters()]
    optimizer = run.engine._optimizer  # type: ignore[attr-defined]
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.ndim]
    return {
        "parameters": sum(t.numel() for t in pieces),
        "optimizer": sum(t.numel() for t in state),
        "resident": sum(p.numel() for p in run.engine.module.parameters()),
    }


def everything(world: World, engine: str) -> dict[str, Any]:
    """All that one stage is asked in one world."""
    run = drive(world, "cnn_groupnorm", {"engine": engine, "deepspeed": CUT_ALL})
    for step in range(4):
        run.step(step)
    found: dict[str, Any] = {"four": run.state() | run.facts, "held": held(run)}
    found["infinite"] = skipped(run, float("inf"))
    found["nan"] = skipped(run, float("nan"))
    with Spy() as spy:
        run.step(4)
    found["calls"] = spy.seen
    found["evaluated"] = evaluated(run)
    state = run.state()
    other = drive(world, "cnn_groupnorm", {"engine": "ddp"})
    other.load(state)
    assert_same_bits(other.state(), state)
    other.updates = run.updates
    other.step(5)
    run.step(5)
    found["onward"] = worst(run.state(), other.state())
    back = other.state()
    run.load(back)
    assert_same_bits(run.state(), back)
    run.step(6)
    other.step(6)
    found["back"] = worst(run.state(), other.state())
    found["lstm"] = trained(drive(world, "lstm_ragged", {"engine": engine, "deepspeed": CUT_ALL}))
    found["tied"] = trained(drive(world, "tied", {"engine": engine}))
    found["fp16"] = half(world, engine)
    return found


def trained(run: Driven) -> dict[str, Tensor]:
    for step in range(4):
        run.step(step)
    return run.state() | run.facts


def skipped(run: Driven, factor: float) -> bool:
    before = run.state()
    applied = run.step(4, factor)
    assert_same_bits(run.state(), before)
    return not applied.updated


def evaluated(run: Driven) -> float:
    """How far the logits under `evaluating` are from those of the averages."""
    before = run.state()
    images = run.case.batch(torch.arange(8))["images"]
    plain = run.case.build()
    plain.load_state_dict({n.removeprefix("ema/"): t for n, t in before.items() if n.startswith("ema/")})
    with torch.no_grad(), run.engine.evaluating():
        logits = run.engine.module(run.engine.place({"images": images})["images"])
    assert_same_bits(run.state(), before)
    return float((logits - plain.eval()(images)).detach().abs().max())


def half(world: World, engine: str) -> dict[str, Any]:
    """fp16: an overflow lowers the scale and skips the step; the step after it is that of DDP."""
    runs = [
        drive(world, "cnn_groupnorm", {"engine": e}, {"precision": "fp16", "ema_decay": None})
        for e in (engine, "ddp")
    ]
    overflow = [run.step(0, 1e37) for run in runs]
    norms = [run.step(1).grad_norm for run in runs]
    scale = float(runs[0].state()["scaler/scale"])
    states = [{n: t for n, t in run.state().items() if n.startswith("model/")} for run in runs]
    return {"overflow": overflow, "norms": norms, "scale": scale, "worst": worst(*states)}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3"])
def test_a_stage_computes_what_one_process_computes_and_shards_what_it_says(
    engine: str, tmp_path: Path
) -> None:
    found = run_world(everything, 2, engine, env={"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    for name, key in (("cnn_groupnorm", "four"), ("lstm_ragged", "lstm"), ("tied", "tied")):
        hand = expected(name)
        got = {n: found[0][key][n] for n in hand}
        assert worst(got, hand)[1] < 1e-5, (name, worst(got, hand))
        assert_same_bits(found[1][key], found[0][key])
    for rank in found:
        assert rank["infinite"]
        assert rank["nan"]
        assert rank["evaluated"] < 1e-5
        assert rank["onward"][1] < 1e-5
        assert rank["back"][1] < 1e-5
    check_half(found)
    check_sharding(engine, found)


def check_half(found: list[dict[str, Any]]) -> None:
    half = found[0]["fp16"]
    assert [(a.updated, a.rescaled) for a in half["overflow"]] == [(False, True), (False, True)]
    assert half["scale"] == 2.0**15
    assert half["norms"][0] == pytest.approx(half["norms"][1], rel=1e-4)
    assert half["worst"][1] < 1e-4


def check_sharding(engine: str, found: list[dict[str, Any]]) -> None:
    whole = sum(t.numel() for n, t in found[0]["four"].items() if n.startswith("ema/"))
    slack = 64  # alignment
    for rank in found:
        sharded = {"parameters": engine == "zero3", "optimizer": engine != "zero0"}
        for what, copies in (("parameters", 1), ("optimizer", 2)):
            share = whole * copies / (2 if sharded[what] else 1)
            assert share <= rank["held"][what] <= share + slack, (what, rank["held"], whole)
        if engine == "zero3":
            assert rank["held"]["resident"] == 0
        check_calls(engine, [(name, numel) for name, numel in rank["calls"] if numel > 8], whole)


def check_calls(engine: str, calls: list[tuple[str, int]], whole: int) -> None:
    """Of a step of four microbatches. Small ones (counts, norms) are left out."""
    names = [name for name, _ in calls]
    sums = [name for name, numel in calls if name in ("allreduce_", "reduce_", "_reduce_scatter_base_")]
    assert len(sums) == (1 if engine in ("zero0", "zero1") else 4)
    if engine == "zero3":
        assert set(sums) == {"_reduce_scatter_base_"}
        assert names.count("_allgather_base_") >= 4
    elif engine == "zero0":
        assert calls == [("allreduce_", whole)]
    else:
        # What each rank updated, for the others, once: after all sums.
        assert "_allgather_base_" in names
        assert "_allgather_base_" not in names[: names.index(sums[-1]) + len(sums)]


def several(world: World, runs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    return [trained(drive(world, "cnn_batchnorm", hardware)) for hardware in runs]


OFFLOADING = [
    {"engine": "zero1", "offload": "optimizer"},
    {"engine": "zero2", "offload": "optimizer"},
    {"engine": "zero3", "offload": "parameters"},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "runs"),
    [
        (1, [{"engine": "zero3"}]),
        (2, OFFLOADING),
        pytest.param(3, [{"engine": "zero1"}, {"engine": "zero2"}], marks=pytest.mark.campaign),
    ],
)
def test_other_worlds_and_offload_compute_the_same(
    size: int, runs: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Three ranks have 3, 3 and 2 microbatches; alone, a rank has no process group of its own."""
    found = run_world(several, size, runs, env={"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    hand = expected("cnn_batchnorm")
    for by_rank in zip(*found, strict=True):
        assert worst({n: by_rank[0][n] for n in hand}, hand)[1] < 1e-5
        for rank in by_rank[1:]:
            assert_same_bits(rank, by_rank[0])


class Either(nn.Module):
    """Takes one of two layers of the same size, by the sign of its eighth input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(144, 10), nn.Linear(144, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        logits: Tensor = (self.one if x[0, 7] > 0 else self.other)(x)
        return logits


def by_turns(world: World, hardware: dict[str, Any]) -> dict[str, Tensor]:
    CASES["either"] = replace(CASES["cnn_batchnorm"], build=Either)
    run = drive(world, "either", hardware)
    for step in range(3):  # the fourth is short, and uses but one of the layers
        run.step(step)
    return run.state()


@pytest.mark.slow
def test_ranks_that_use_different_parameters_are_told_instead_of_mixing_them(tmp_path: Path) -> None:
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    with pytest.raises(WorldFailed, match="used other parameters") as failed:
        run_world(by_turns, 2, {"engine": "zero2"}, env=env)
    assert "2 of 2 ranks failed" in str(failed.value)
    unused = {"unused_parameters": True}
    found = run_world(by_turns, 2, {"engine": "zero1", **unused}, env=env)[0]
    other = run_world(by_turns, 1, {"engine": "ddp", **unused})[0]
    assert worst(found, other)[1] < 1e-5
