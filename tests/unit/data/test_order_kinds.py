"""What each kind of order is for: few shards, tight batches, stated proportions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl.data.order.kinds import Block, Full, Lanes, LengthBucketed, Weighted, make_order
from distdl.errors import DataError


def test_a_window_of_block_touches_few_shards_and_says_which() -> None:
    order = Block(4, [1000] * 50, window=4000)
    for epoch in (0, 3):
        for start in range(0, 50_000, 4000):
            stop = min(start + 4000, 50_000)
            shards = order.shards(epoch, start, stop)
            ids = order.ids(epoch, start, stop)
            used = list(dict.fromkeys((ids // 1000).tolist()))
            assert shards == used
            assert len(shards) <= 5


def test_block_visits_shards_in_another_order_each_epoch_and_each_shard_in_one_go() -> None:
    order = Block(4, [100] * 30, window=10)
    first = [order.shards(epoch, 0, 3000) for epoch in range(3)]
    assert len({tuple(shards) for shards in first}) == 3
    for epoch, shards in enumerate(first):
        assert sorted(shards) == list(range(30))
        ids = order.ids(epoch, 0, 3000)
        # Windows of 10 divide shards of 100, so nothing leaves its shard's turn.
        assert (ids.reshape(30, 100) // 100 == np.array(shards)[:, None]).all()


def test_windows_of_block_are_shuffled_and_differ() -> None:
    order = Block(4, [100_000], window=1000)
    places = order.ids(0, 0, 3000).reshape(3, 1000) - np.array([[0], [1000], [2000]])
    for n, window in enumerate(places):
        assert np.array_equal(np.sort(window), np.arange(1000))
        assert np.count_nonzero(window == np.arange(1000)) < 10
        assert np.count_nonzero(window == places[n - 1]) < 10


def test_block_skips_empty_shards() -> None:
    order = Block(1, [0, 3, 0, 0, 2, 0], window=2)
    for epoch in range(20):
        assert sorted(order.shards(epoch, 0, 5)) == [1, 4]
    assert Block(1, [], window=2).rows == Block(1, [0, 0]).rows == 0


LENGTHS = np.random.default_rng(1).integers(1, 500, 5003)
BUCKETED = LengthBucketed(9, np.concatenate([[0], np.cumsum(LENGTHS)]), batch=32, window_batches=10)


def test_batches_are_sorted_within_and_shuffled_among_themselves() -> None:
    ids = BUCKETED.ids(2, 0, 5003)
    means = []
    for start in range(0, 320, 32):
        lengths = LENGTHS[ids[start : start + 32]]
        assert (np.diff(lengths) >= 0).all()
        means.append(lengths.mean())
    assert means != sorted(means)
    ranges = sorted(
        (LENGTHS[ids[s : s + 32]].min(), LENGTHS[ids[s : s + 32]].max()) for s in range(0, 320, 32)
    )
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(ranges))


def test_a_window_holds_the_rows_that_a_full_shuffle_puts_there() -> None:
    for epoch in (0, 1):
        plain, sorted_ = Full(9, 5003).ids(epoch, 0, 5003), BUCKETED.ids(epoch, 0, 5003)
        for start in range(0, 5003, 320):
            assert sorted(plain[start : start + 320]) == sorted(sorted_[start : start + 320])


def test_rows_of_one_length_keep_the_order_of_the_shuffle() -> None:
    same = LengthBucketed(9, np.arange(65) * 5, batch=64, window_batches=1)
    assert np.array_equal(same.ids(0, 0, 64), Full(9, 64).ids(0, 0, 64))


def test_the_short_batch_comes_last_and_is_not_always_the_longest_rows() -> None:
    means = []
    for epoch in range(40):
        lengths = LENGTHS[BUCKETED.ids(epoch, 5003 // 32 * 32, 5003)]
        assert len(lengths) == 5003 % 32
        assert (np.diff(lengths) >= 0).all()
        means.append(lengths.mean())
    assert 150 < np.mean(means) < 350  # at the long end it would be 480 or more
    assert np.std(means) > 50


@settings(max_examples=150)
@given(
    weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=9),
    block=st.integers(1, 64),
    rows=st.integers(1, 500),
    epoch=st.integers(0, 10**9),
)
def test_every_prefix_of_a_mixture_has_the_proportions_within_a_block(
    weights: list[float], block: int, rows: int, epoch: int
) -> None:
    shares = np.array(weights) / np.sum(weights)
    parts = [10**6] * len(shares)
    order = Weighted(3, parts, shares.tolist(), rows, block)
    owners = order.ids(epoch, 0, rows) // 10**6
    counts = (owners[:, None] == np.arange(len(shares))).cumsum(axis=0)
    expected = np.arange(1, rows + 1)[:, None] * shares
    # Within a block, and what the tree of halves may round: one half at each of its levels, at both ends.
    assert np.abs(counts - expected).max() <= block + 2 + np.ceil(np.log2(len(shares)))


@settings(max_examples=100)
@given(
    parts=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    rows=st.integers(1, 40),
    block=st.integers(1, 30),
    seed=st.integers(0, 100),
)
def test_each_pass_over_a_part_of_a_mixture_holds_its_rows_once(
    parts: list[int], rows: int, block: int, seed: int
) -> None:
    weights = [1 / len(parts)] * len(parts)
    order = Weighted(seed, parts, weights, rows, block)
    # Blocks shuffle the last passes' ends among one another, so look at the stream at the ends of epochs.
    stream = np.concatenate([order.ids(epoch, 0, rows) for epoch in range(12)])
    firsts = np.cumsum([0, *parts])
    for part, size in enumerate(parts):
        ids = stream[(stream >= firsts[part]) & (stream < firsts[part + 1])]
        seen = np.bincount(ids - firsts[part], minlength=size)
        assert seen.max() - seen.min() <= 1
        assert seen.min() == len(ids) // size


def test_passes_over_a_part_differ_and_parts_are_not_in_step() -> None:
    order = Weighted(3, [500, 500], [0.5, 0.5], block=1)
    passes = [order.ids(epoch, 0, 1000) for epoch in range(3)]
    halves = [ids[ids < 500] for ids in passes] + [ids[ids >= 500] - 500 for ids in passes]
    for i, one in enumerate(halves):
        assert np.array_equal(np.sort(one), np.arange(500))
        for other in halves[:i]:
            assert np.count_nonzero(one == other) < 12


def test_a_mixture_does_not_alternate() -> None:
    owners = Weighted(3, [5000, 5000], [0.5, 0.5]).ids(0, 0, 10_000) // 5000
    assert 0.45 < np.mean(owners[1:] == owners[:-1]) < 0.55


def test_a_rare_part_is_read_and_a_small_one_repeated() -> None:
    order = Weighted(3, [10**6, 3], [1 - 1e-4, 1e-4], epoch_rows=100_000)
    ids = order.ids(5, 0, 100_000)
    assert np.count_nonzero(ids >= 10**6) == 10
    assert len(np.unique(ids[ids < 10**6])) == np.count_nonzero(ids < 10**6)


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ([5, 5], [0.5, 0.6], r"sum to 1\.1, not to 1\. In the same proportions: \[0\.4545455, 0\.5454545\]"),
        ([5, 5], [3, 1], r"sum to 4, not to 1\. In the same proportions: \[0\.75, 0\.25\]"),
        ([5, 5], [1.5, -0.5], "-0.5 is not above 0"),
        ([5, 5], [1.0, 0.0], "0 is not above 0.*leave out"),
        ([5, 5], [float("nan"), 1.0], "nan is not above 0"),
        ([5, 5], [float("inf"), 1.0], "inf is not above 0"),
        ([5, 5], [1.0], "a mixture of 2 datasets needs as many weights; 1 given"),
        ([], [], "a mixture of 0 datasets"),
        ([5, 0], [0.5, 0.5], "dataset 1 of the mixture has 0 rows"),
    ],
)
def test_what_is_not_a_distribution_is_refused(parts: list[int], weights: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Weighted(1, parts, weights)


def test_weights_that_sum_to_one_within_rounding_are_taken() -> None:
    assert Weighted(1, [5, 5, 5], [0.333333, 0.333333, 0.333334]).rows == 15
    assert Weighted(1, [1] * 10, [0.1] * 10).rows == 10


def test_the_kinds_never_change_between_versions() -> None:
    assert Block(7, [300, 0, 700], window=100).ids(1, 295, 303).tolist() == BLOCK_IDS
    assert BUCKETED.ids(1, 30, 36).tolist() == BUCKETED_IDS
    assert Weighted(7, [100, 50], [0.25, 0.75]).ids(1, 0, 8).tolist() == WEIGHTED_IDS


BLOCK_IDS = [529, 549, 508, 562, 527, 695, 631, 653]
BUCKETED_IDS = [2817, 4451, 2200, 3463, 717, 1609]
WEIGHTED_IDS = [77, 143, 80, 39, 102, 134, 105, 104]


@given(st.integers(0, 300), st.integers(1, 40))
def test_each_lane_reads_its_own_part_from_first_to_last(rows: int, lanes: int) -> None:
    order = make_order("lanes", seed=1, rows=rows, batch=lanes)
    steps = rows // lanes
    assert order.rows == steps * lanes
    batches = order.ids(3, 0, order.rows).reshape(steps, lanes)
    for b in range(lanes):
        assert batches[:, b].tolist() == list(range(b * steps, (b + 1) * steps))


def test_lanes_need_to_know_how_many() -> None:
    with pytest.raises(DataError, match="order lanes needs the size of a batch"):
        make_order("lanes", seed=1, rows=5)
    with pytest.raises(DataError, match="order lanes with 0 lanes"):
        Lanes(5, 0)
