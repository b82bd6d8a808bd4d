"""The tree, who holds what of it, and gradients folded along it as they come. Exchanges: test_exact.py."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

from distdl.comm import World
from distdl.comm.exchange import Exchange, even_cuts, route_of
from distdl.comm.tree import fold_in_place, maximal_subtrees, parent, split, tree_sum
from distdl.engines import Group, Pass, slabs
from distdl.engines.exact import ExactReducer
from distdl.engines.sharded import assign
from distdl.engines.slabs import Bucket, make_buckets
from distdl.plan import share

COUNTS = range(1, 41)


def all_nodes(count: int) -> list[tuple[int, int]]:
    found, waiting = [], [(0, count)]
    while waiting:
        a, b = waiting.pop()
        found.append((a, b))
        if b - a > 1:
            waiting += [(a, split(a, b)), (split(a, b), b)]
    return found


@pytest.mark.parametrize("count", COUNTS)
def test_a_parent_is_the_node_that_divides_into_its_children(count: int) -> None:
    assert parent((0, count), count) is None
    for a, b in all_nodes(count):
        if b - a > 1:
            assert parent((a, split(a, b)), count) == parent((split(a, b), b), count) == (a, b)


@pytest.mark.parametrize("count", COUNTS)
def test_ranks_hold_each_microbatch_once_and_no_two_children_of_a_node(count: int) -> None:
    for size in range(1, 12):
        route = route_of(count, size)
        nodes = [node for held in route.nodes for node in held]
        assert [i for a, b in nodes for i in range(a, b)] == list(range(count))
        assert set(nodes) <= set(all_nodes(count))
        for held in route.nodes:
            above = [parent(node, count) for node in held]
            assert len(set(above)) == len(above)
            assert len(held) <= 2 * math.ceil(math.log2(count + 1))


def test_perfect_are_those_whose_ranks_can_meet_two_by_two() -> None:
    perfect = {size: [m for m in range(1, 17) if route_of(m, size).perfect] for size in (1, 2, 3, 4, 8)}
    assert perfect[2] == [2, 3, 4, 7, 8, 15, 16]
    assert perfect[3] == []
    assert perfect[4] == [4, 6, 7, 8, 15, 16]
    assert perfect[8] == [8, 12, 14, 15, 16]


def leaves(count: int, seed: int, length: int = 37) -> list[Tensor]:
    """Numbers whose sum depends on the order, with zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-3, 4, (count, 1), generator=generator)
    made = torch.randn(count, length, generator=generator) * size
    made[:, :4] = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    made[: count // 2, 2] = -made[0, 5]
    return list(made)


@given(st.integers(1, 40), st.data())
def test_folding_in_place_is_the_sum_along_the_tree(count: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    parts = leaves(count, count)
    expected = tree_sum(parts)
    held = {n: tree_sum(parts[n[0] : n[1]]).clone() for nodes in route_of(count, size).nodes for n in nodes}
    assert same_bits(fold_in_place(held, (0, count)), expected)


@given(st.integers(1, 40), st.data())
def test_gradients_folded_as_they_come_are_the_sum_along_the_tree(count: int, data: st.DataObject) -> None:
    """On every rank, with the right one of two leaves added in place: the same bits as leaf after leaf, each
    begun at +0.0; and no more slabs than the contract says.
    """
    size = data.draw(st.integers(1, min(count, 12)))
    parts = leaves(count, count + 100)
    expected = tree_sum([0.0 + part for part in parts])
    held = {}
    for rank in range(size):
        lo, hi = share(count, rank, size)
        bucket = Bucket([Parameter(torch.zeros(5, 5)), Parameter(torch.zeros(12))], None, size)
        most = 0
        for number in range(lo, hi):
            bucket.begin_leaf(number, count)
            most = max(most, len(bucket.stack))
            for parameter, part in zip(
                bucket.parameters, (parts[number][:25], parts[number][25:]), strict=True
            ):
                assert parameter.grad is not None
                parameter.grad += part.view_as(parameter)
            bucket.fold(count)
        assert tuple(node for node, _ in bucket.stack) == maximal_subtrees(lo, hi, count)
        assert most <= 2 * math.ceil(math.log2(hi - lo + 1)) + 1
        for node, slab in bucket.stack:
            held[node] = torch.cat([view.reshape(-1) for view in slab.views])
    total = fold_in_place(held, (0, count))
    assert same_bits(total, expected)
    assert not torch.signbit(total[:2]).any()  # -0.0 has become +0.0, at any number of ranks


@pytest.mark.parametrize(("run", "most"), [(1, 1), (2, 1), (4, 2), (8, 3), (16, 4)])
def test_buffers_of_a_whole_subtree(run: int, most: int) -> None:
    """Contract 4: about log2(M / W) + 1 gradient buffers."""
    bucket = Bucket([Parameter(torch.zeros(3))], None, 2)
    for _ in range(2):
        for number in range(run):
            bucket.begin_leaf(number, 2 * run)
            bucket.fold(2 * run)
        bucket.reset(bucket.close())
    assert len(bucket._free) == max(most, 1)


def test_a_view_has_the_strides_of_its_parameter() -> None:
    convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    (bucket,) = make_buckets(list(convolution.parameters()), 2)
    bucket.begin_leaf(0, 2)
    assert convolution.weight.grad is not None
    assert convolution.weight.grad.stride() == convolution.weight.stride() != (27, 9, 3, 1)


def test_parameters_without_a_gradient_are_known() -> None:
    bucket = Bucket([Parameter(torch.zeros(3)), Parameter(torch.ones(2))], None, 1)
    bucket.begin_leaf(0, 1)
    assert bucket.note(1) is False
    assert bucket.used(bucket.close()) == [False, True]
    bucket.reset(bucket.stack[0][1])
    bucket.begin_leaf(0, 1)
    bucket.note(0)
    assert bucket.used(bucket.close()) == [True, False]


def test_a_gradient_in_two_parts_is_refused() -> None:
    bucket = Bucket([Parameter(torch.zeros(3))], None, 1)
    bucket.begin_leaf(0, 1)
    assert bucket.note(0) is True
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        bucket.note(0)
    bucket.begin_leaf(1, 2)
    assert bucket.note(0) is True


def test_buckets_hold_each_parameter_once_the_last_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "_FIRST_BYTES", 100)
    monkeypatch.setattr(slabs, "_BYTES", 400)
    half = torch.float16
    parameters = [
        Parameter(torch.zeros(n, dtype=d)) for n, d in ((200, None), (30, None), (9, half), (20, None))
    ]
    found = make_buckets(parameters, 2)
    assert [[p.numel() for p in b.parameters] for b in found] == [[20], [9], [30], [200]]
    owner = dict(zip(parameters, (1, 0, 1, 0), strict=True))
    monkeypatch.setattr(slabs, "_FIRST_BYTES", 10_000)
    first, second = make_buckets(parameters, 3, owner)
    assert [owner[p] for p in first.parameters] == [0, 0, 1]
    assert first.cuts == (0, 64, 272, 272)
    assert second.cuts == (0, 0, 16, 16)


class Layers(nn.Module):
    """Four layers, of which the last one is used or not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, used: int) -> Tensor:
        for layer in self.layers[:used]:  # type: ignore[union-attr]
            x = layer(x)
        return x


@pytest.mark.parametrize(("used", "during"), [(4, 4), (3, 0)])
def test_exchanges_start_during_the_last_backward_in_one_order(
    used: int, during: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bucket of an unused layer comes first, and the others wait for it until the backward has ended."""
    monkeypatch.setattr(slabs, "_FIRST_BYTES", 300)
    monkeypatch.setattr(slabs, "_BYTES", 300)
    world, model = World(), Layers()
    reducer = ExactReducer(model, world, Exchange(world, torch.device("cpu")), None)
    for number, last in ((0, False), (1, True)):
        with reducer.passing(Pass((Group(number, 1, 1, 0),), 1, last, 2)):
            model(torch.ones(1, 8), used).sum().backward()
            assert len(reducer._sums) == (during if last else 0)
    assert len(reducer._sums) == len(reducer._buckets) == 4
    reducer.reduce()
    assert [p.grad is not None for p in model.parameters()] == [True] * 2 * used + [False] * (8 - 2 * used)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_owners_are_balanced_and_follow_from_the_sizes(sizes: list[int], ranks: int) -> None:
    found = assign(sizes, ranks)
    load = [sum(n for n, r in zip(sizes, found, strict=True) if r == rank) for rank in range(ranks)]
    best = max(max(sizes), sum(sizes) / ranks)
    assert max(load) <= best + max(sizes) * (1 - 1 / ranks)
    assert max(load) - min(load) <= max(sizes)
    assert found == assign(list(sizes), ranks)


@given(st.integers(0, 100), st.integers(1, 9))
def test_segments_cover_everything(length: int, size: int) -> None:
    cuts = even_cuts(length, size)
    assert cuts[0] == 0
    assert cuts[-1] == length
    assert all(0 <= b - a <= length // size + 1 for a, b in itertools.pairwise(cuts))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))
