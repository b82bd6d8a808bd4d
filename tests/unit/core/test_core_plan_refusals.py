"""What a plan refuses, and that every number in the refusal is one that works."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from core_support import images, plan_for, recipe_with
from hypothesis import assume, given
from hypothesis import strategies as st

from distdl.capabilities import ENGINES
from distdl.errors import DataError, PlanError
from distdl.plan import make_plan
from distdl.samples import DataInfo
from distdl.topology import Topology


def refusal(world: int = 1, rows: int = 10_000, **changes: dict[str, Any]) -> str:
    with pytest.raises(PlanError) as caught:
        plan_for(world, rows, **changes)
    return str(caught.value)


def numbers(text: str, key: str) -> list[int]:
    """Those offered after the last ``key = `` of a message: ``8 or 12`` -> [8, 12]; [] where none is."""
    found = re.findall(rf"{re.escape(key)} = (\d+(?: or \d+)*)", text)
    return [int(n) for n in found[-1].split(" or ")] if found else []


@given(total=st.integers(1, 500), micro=st.integers(1, 500), world=st.integers(1, 40))
def test_a_batch_that_is_not_a_multiple(total: int, micro: int, world: int) -> None:
    assume(total % micro)
    text = refusal(world, batch={"global": total, "micro": micro})
    assert f"batch.global = {total} is not a multiple of batch.micro = {micro}" in text
    offered = text.partition("nearest valid")[2]
    totals, micros = numbers(offered, "batch.global"), numbers(offered, "batch.micro")

    for value in totals:
        plan_for(world, 10_000, batch={"global": value, "micro": micro})
    for value in micros:
        plan_for(world, 10_000, batch={"global": total, "micro": value})

    works = [n for n in range(micro, 2 * max(total, micro * world) + 1, micro) if n // micro >= world]
    assert min(works, key=lambda n: (abs(n - total), n)) in totals
    works = [n for n in range(1, total + 1) if total % n == 0 and total // n >= world]
    assert micros == sorted(sorted(works, key=lambda n: (abs(n - micro), n))[:2])


@given(micro=st.integers(1, 60), count=st.integers(1, 20), more=st.integers(1, 50))
def test_more_processes_than_microbatches(micro: int, count: int, more: int) -> None:
    world, batch = count + more, {"global": micro * count, "micro": micro}
    text = refusal(world, batch=batch)
    assert f"{world} processes for {count} microbatches" in text
    assert "BatchNorm" in text
    most = int(re.findall(r"at most (\d+) processes", text)[0])
    assert most == count
    plan_for(most, batch=batch)
    works = [n for n in range(1, micro) if micro * count % n == 0 and micro * count // n >= world]
    smaller = re.findall(r"or batch\.micro = (\d+) \((\d+) microbatches\)", text)
    if works:
        assert smaller == [(str(works[-1]), str(micro * count // works[-1]))]
        plan_for(world, batch={"global": micro * count, "micro": works[-1]})
    else:
        assert not smaller


@given(micro=st.integers(1, 20), count=st.integers(1, 10), rows=st.integers(1, 150), world=st.integers(1, 10))
def test_drop_last_that_drops_everything(micro: int, count: int, rows: int, world: int) -> None:
    assume(rows < micro * count and world <= count)
    batch = {"global": micro * count, "micro": micro}
    text = refusal(world, rows, batch=batch, data={"name": "x", "drop_last": True})
    assert f"drops all {rows} training rows" in text
    assert "data.drop_last to false" in text
    plan_for(world, rows, batch=batch, data={"name": "x", "drop_last": False})
    offered = re.findall(r"batch\.global to at most (\d+)", text)
    works = list(range(micro * world, rows + 1, micro))
    assert offered == [str(n) for n in works[-1:]]
    for value in offered:
        batch = {"global": int(value), "micro": micro}
        plan_for(world, rows, batch=batch, data={"name": "x", "drop_last": True})


@pytest.mark.parametrize("gpus", [0, 1, 3])
def test_more_processes_than_gpus(gpus: int) -> None:
    def plan(procs: int, device: str) -> None:
        here = Topology(world_size=procs, local_world_size=procs, launcher="distdl", cpus=4, gpus=gpus)
        make_plan(recipe_with(hardware={"device": device}, batch={"global": 16, "micro": 4}), here, images())

    with pytest.raises(PlanError, match=f"4 processes on this node, which has {gpus} GPUs") as caught:
        plan(4, "cuda")
    offered = [int(n) for n in re.findall(r"--procs (\d+)", str(caught.value))]
    assert offered == ([gpus] if gpus else [])
    for procs in offered:
        plan(procs, "cuda")
    assert "hardware.device=cpu" in str(caught.value)
    plan(4, "cpu")


@pytest.mark.parametrize(
    ("key", "rows", "says"),
    [
        ("train_split", {"training": 5, "test": 5}, "has no such split; it has training, test"),
        ("eval_split", {"train": 5}, "has no such split; it has train"),
        ("train_split", {"train": 0, "test": 5}, "is empty"),
        ("eval_split", {"train": 5, "test": 0}, "is empty"),
    ],
)
def test_a_split_that_is_missing_or_empty(key: str, rows: dict[str, int], says: str) -> None:
    data = DataInfo("pictures", rows, {}, "f")
    with pytest.raises(DataError, match=says) as caught:
        make_plan(recipe_with(), Topology.of(1, 1), data)
    assert str(caught.value).startswith(f"data.{key} = ")


def test_an_engine_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(ENGINES):
        monkeypatch.setitem(ENGINES, name, replace(ENGINES[name], precisions=("fp32",)))
    text = refusal(train={"epochs": 1, "precision": "bf16"})
    assert "engine 'ddp' cannot do train.precision = 'bf16' (it does fp32); engines that can: none" in text
    monkeypatch.setitem(ENGINES, "other", replace(ENGINES["ddp"], precisions=("fp32", "bf16")))
    assert refusal(train={"epochs": 1, "precision": "bf16"}).endswith("engines that can: other")
    monkeypatch.setitem(ENGINES, "ddp", replace(ENGINES["ddp"], devices=("cuda",)))
    assert "hardware.device = 'cpu'" in refusal()


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"train": {"epochs": 1, "reduction": "exact"}, "hardware": {"engine": "zero2"}},
            "engine 'zero2' cannot do train.reduction = 'exact' (it does fast); engines that can: ddp, fsdp",
        ),
        (
            {
                "train": {"epochs": 1, "reduction": "exact"},
                "hardware": {"engine": "fsdp", "unused_parameters": True},
            },
            "engine 'fsdp' cannot do hardware.unused_parameters = true with train.reduction = 'exact'",
        ),
        (
            {"hardware": {"engine": "zero1", "shard_optimizer": True}},
            "engine 'zero1' cannot do hardware.shard_optimizer = true (it does false); engines that can: ddp",
        ),
        (
            {"hardware": {"engine": "zero2", "offload": "parameters"}},
            "hardware.offload = 'parameters' (it does none, optimizer); engines that can: fsdp, zero3",
        ),
        ({"hardware": {"hybrid_shard": True}}, "engines that can: fsdp"),
        ({"hardware": {"deepspeed": {"steps_per_print": 5}}}, "choose one of zero0, zero1, zero2, zero3"),
    ],
)
def test_what_an_engine_cannot_do_names_those_that_can(sections: dict[str, Any], says: str) -> None:
    assert says in refusal(**sections)
