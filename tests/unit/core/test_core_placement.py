"""Which CPUs a process is bound to, on machines of one and of several NUMA nodes."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distdl.plan import make_plan
from distdl.recipe import parse_recipe
from distdl.topology import Topology
from distdl.train import placement
from distdl.train.placement import described, devices, gpu_nodes, numa_nodes, parse_ranges, placements, ranges
from tests.unit.core.core_support import images, recipe_with

TWO = [frozenset(range(8)), frozenset(range(8, 16))]
ALL = TWO[0] | TWO[1]


def test_neighbours_share_a_node() -> None:
    assert placements(TWO, ALL, 4) == [TWO[0], TWO[0], TWO[1], TWO[1]]
    assert placements(TWO, ALL, 3) == [TWO[0], TWO[0], TWO[1]]
    assert placements([*TWO, frozenset({16})], ALL | {16}, 2) == [TWO[0], TWO[1]]


def test_a_process_is_near_its_gpu() -> None:
    assert placements(TWO, ALL, 4, [1, 1, 0, None]) == [TWO[1], TWO[1], TWO[0], TWO[1]]
    assert placements(TWO, ALL, 1, [1]) == [TWO[1]]
    assert placements(TWO, ALL, 2, [7, 0]) == [TWO[0], TWO[0]]  # a node without CPUs


@pytest.mark.parametrize(
    ("nodes", "allowed", "procs"),
    [([], ALL, 2), (TWO[:1], TWO[0], 2), (TWO, frozenset({1, 2}), 2), (TWO, ALL, 1)],
    ids=["the system does not say", "one node", "bound by the launcher", "one process"],
)
def test_nothing_is_bound(nodes: list[frozenset[int]], allowed: frozenset[int], procs: int) -> None:
    assert placements(nodes, allowed, procs) == [None] * procs


@given(st.frozensets(st.integers(0, 200), max_size=40))
def test_ranges(cpus: frozenset[int]) -> None:
    assert parse_ranges(ranges(cpus)) == cpus


def test_what_the_system_says(tmp_path: Path) -> None:
    for number, text in ((0, "0-1,8\n"), (10, "\n"), (2, "2-3\n")):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(text)
    assert numa_nodes(tmp_path) == [{0, 1, 8}, {2, 3}, frozenset()]
    assert numa_nodes(tmp_path / "nothing") == []
    cards, pci = tmp_path / "gpus", tmp_path / "pci"
    for card, node in (("0000:3B:00.0", "0"), ("0000:AF:00.0", "1"), ("0000:D8:00.0", "-1")):
        (cards / card).mkdir(parents=True)
        (pci / card.lower()).mkdir(parents=True)
        (pci / card.lower() / "numa_node").write_text(f"{node}\n")
    assert gpu_nodes(None, cards, pci) == [0, 1, None]
    assert gpu_nodes("1,0", cards, pci) == [1, 0]
    assert gpu_nodes("GPU-8f2", cards, pci) == []
    assert gpu_nodes(None, tmp_path / "none", pci) == []


def test_what_is_said() -> None:
    assert described([TWO[0], None], ALL) == (
        "placement: 2 processes on this machine, each on the CPUs of a NUMA node: 0: 0-7; 1: 0-15"
    )
    assert described([None], frozenset({0, 1})) == (
        "placement: 1 process on this machine, CPUs 0-1, bound to none of them"
    )


def _bound(local_rank: int, affinity: str) -> tuple[str, list[int]]:
    first, *others = sorted(os.sched_getaffinity(0))
    placement.numa_nodes = lambda: [frozenset({first}), frozenset(others)]  # type: ignore[assignment]
    recipe = parse_recipe(
        {
            "task": {"name": "image_classification"},
            "model": {"name": "cnn5"},
            "data": {"name": "fashion_mnist"},
            "batch": {"global": 8, "micro": 4},
            "optim": {"name": "sgd", "lr": 0.1},
            "train": {"epochs": 1},
            "hardware": {"affinity": affinity},
        }
    )
    topology = Topology(rank=local_rank, world_size=2, local_rank=local_rank, local_world_size=2)
    return placement.bind(recipe, topology), sorted(os.sched_getaffinity(0))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="wants two CPUs, taken for two NUMA nodes")
def test_a_process_is_really_bound() -> None:
    first, *others = sorted(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for rank, affinity, cpus in (
            (0, "numa", [first]),
            (1, "numa", others),
            (1, "none", [first, *others]),
        ):
            said, found = pool.apply(_bound, (rank, affinity))
            assert found == cpus, said


@pytest.mark.parametrize(
    ("device", "topology", "visible", "said"),
    [
        ("cpu", Topology(local_world_size=2), None, "2 threads each, no GPU"),
        ("cuda", Topology(local_world_size=3, world_size=3, gpus=3), None, "2 threads each, GPUs 0-2"),
        (
            "cuda", Topology(local_world_size=2, world_size=2, gpus=2), "4,6",
            "2 threads each, GPUs 0-1 of CUDA_VISIBLE_DEVICES=4,6",
        ),
        ("cuda", Topology(gpus=1, own_gpu=True), "0", "2 threads each, each with the one GPU it sees"),
    ],
)  # fmt: skip
def test_threads_and_gpus_in_words(device: str, topology: Topology, visible: str | None, said: str) -> None:
    recipe = recipe_with(hardware={"threads": 2, "device": device})
    assert devices(make_plan(recipe, topology, images()), topology, visible) == said
