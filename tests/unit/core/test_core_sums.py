"""Keys for randomness, and the one tree along which everything is added."""

from __future__ import annotations

import functools
import hashlib
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distdl.comm.tree import split, tree_sum
from distdl.keys import key
from distdl.plan import share


def test_keys_never_change() -> None:
    assert key(7, "order", 3) == int.from_bytes(
        hashlib.blake2b(b"7/order/3", digest_size=8).digest(), "little"
    )
    assert [key(0, "init"), key(7, "model", 12, 3), key(2**63 - 1, "augment", 0, 0)] == [
        9651321850173428291,
        5553001150566321496,
        3035169194692448315,
    ]


def test_keys_differ_in_every_part() -> None:
    keys = [key(s, p, *n) for s in range(4) for p in ("a", "b") for n in ((), (1,), (1, 1), (11,), (1, 1, 1))]
    keys += [key(1, "model", step, m) for step in range(100) for m in range(20)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**64 for k in keys)


def test_keys_are_spread_over_all_bits() -> None:
    keys = [key(3, "model", i) for i in range(4000)]
    for bit in range(64):
        # Binomial: 2000 expected, a standard deviation of 32.
        assert 1800 < sum(k >> bit & 1 for k in keys) < 2200


@pytest.mark.parametrize(("n", "left"), [(2, 1), (3, 2), (4, 2), (5, 4), (6, 4), (8, 4), (9, 8), (24, 16)])
def test_split_at_the_largest_power_of_two_below_the_length(n: int, left: int) -> None:
    assert split(0, n) == left
    assert split(7, 7 + n) == 7 + left


def by_hand(parts: list[torch.Tensor]) -> torch.Tensor:
    """The rule of the tree in other words: full pairs are joined level by level, what is over moves up."""
    stack: list[tuple[int, torch.Tensor]] = []
    for part in parts:
        size = 1
        while stack and stack[-1][0] == size:
            part, size = stack.pop()[1] + part, size * 2
        stack.append((size, part))
    return functools.reduce(lambda right, left: left + right, [t for _, t in reversed(stack)])


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_the_sum_is_that_of_the_tree(count: int, seed: int) -> None:
    torch.manual_seed(seed)
    parts = list(torch.randn(count, 50) * 10 ** torch.randint(-3, 4, (count, 1)))
    assert torch.equal(tree_sum(parts), by_hand(parts))


def test_the_tree_is_not_the_sum_from_left_to_right() -> None:
    """Guards the tests above: on these numbers the order does change bits."""
    torch.manual_seed(0)
    parts = list(torch.randn(13, 200))
    assert not torch.equal(tree_sum(parts), functools.reduce(operator.add, parts))


def nodes_inside(lo: int, hi: int, a: int, b: int) -> list[tuple[int, int]]:
    """The largest nodes below [a, b) that lie inside a rank's run [lo, hi)."""
    if hi <= a or b <= lo:
        return []
    if lo <= a and b <= hi:
        return [(a, b)]
    middle = split(a, b)
    return nodes_inside(lo, hi, a, middle) + nodes_inside(lo, hi, middle, b)


@given(st.integers(1, 40), st.data())
def test_ranks_that_add_their_own_subtrees_first_get_the_same_bits(count: int, data: st.DataObject) -> None:
    """Contract 4: a run of whole subtrees may be folded by its rank; `tree_sum` of a subtree is that node."""
    world = data.draw(st.integers(1, count))
    torch.manual_seed(count)
    parts = list(torch.randn(count, 20) * 10 ** torch.randint(-3, 4, (count, 1)))
    known: dict[tuple[int, int], torch.Tensor] = {}
    for rank in range(world):
        for a, b in nodes_inside(*share(count, rank, world), 0, count):
            known[a, b] = tree_sum(parts[a:b])

    def fold(a: int, b: int) -> torch.Tensor:
        if (a, b) in known:
            return known[a, b]
        return fold(a, split(a, b)) + fold(split(a, b), b)

    assert torch.equal(fold(0, count), tree_sum(parts))


def test_nothing_is_added_that_is_not_there() -> None:
    """A sum that began at +0.0 would lose the sign of these zeros."""
    for count in (1, 2, 3, 7):
        total = tree_sum([torch.tensor([-0.0])] * count)
        assert torch.signbit(total).all()
