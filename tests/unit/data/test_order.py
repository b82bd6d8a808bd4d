"""What every kind of order keeps: a bijection, random access, no state, constant time; and `make_order`."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl.data.order.kinds import Block, Full, LengthBucketed, Order, Sequential, Weighted, make_order
from distdl.data.order.permutation import permute, round_keys
from distdl.errors import DataError

SHUFFLED = ("full", "block", "length_bucketed", "weighted")


def offsets_of(lengths: list[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def small(kind: str, seed: int, rows: int = 997) -> Order:
    """An order of some kind over `rows` rows; the mixture's weights are its parts' shares of the rows."""
    lengths = np.random.default_rng(rows).integers(0, 40, rows)
    cut = rows // 3
    return make_order(
        kind,
        seed=seed,
        rows=rows,
        batch=16,
        shard_rows=[cut, 0, rows - cut],
        offsets=offsets_of(lengths),
        window=64,
        window_batches=4,
        parts=[cut, rows - cut],
        weights=[cut / rows, 1 - cut / rows],
    )


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Any kind with any parameters: sizes from 0, windows wider than the data, empty shards."""
    kind = draw(st.sampled_from(["sequential", *SHUFFLED]))
    seed = draw(st.integers(0, 2**63))
    rows = draw(st.integers(0, 300))
    if kind == "sequential":
        return Sequential(rows)
    if kind == "full":
        return Full(seed, rows)
    if kind == "block":
        shards = draw(st.lists(st.integers(0, 60), max_size=12))
        return Block(seed, shards, draw(st.integers(1, 400)))
    if kind == "length_bucketed":
        lengths = draw(st.lists(st.integers(0, 9), max_size=300))
        batch, windows = draw(st.integers(1, 40)), draw(st.integers(1, 6))
        return LengthBucketed(seed, offsets_of(lengths), batch, windows, draw(st.booleans()))
    parts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=7))
    total = sum(parts)
    return Weighted(seed, parts, [part / total for part in parts], None, draw(st.integers(1, 400)))


@settings(max_examples=200)
@given(orders(), st.integers(0, 10**6))
def test_an_epoch_holds_every_row_once(order: Order, epoch: int) -> None:
    ids = order.ids(epoch, 0, order.rows)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(order.rows))


@settings(max_examples=200)
@given(orders(), st.integers(0, 100), st.data())
def test_any_positions_in_any_sequence_give_the_same_ids(
    order: Order, epoch: int, data: st.DataObject
) -> None:
    whole = order.ids(epoch, 0, order.rows)
    start = data.draw(st.integers(0, order.rows))
    stop = data.draw(st.integers(start, order.rows))
    assert np.array_equal(order.ids(epoch, start, stop), whole[start:stop])
    positions = np.random.default_rng(start).integers(0, max(order.rows, 1), 50 if order.rows else 0)
    assert np.array_equal(order.at(epoch, positions), whole[positions])
    again = pickle.loads(pickle.dumps(order))  # noqa: S301 - ours, and never from a file
    assert np.array_equal(again.at(epoch, positions[::-1]), whole[positions[::-1]])


@pytest.mark.parametrize("kind", SHUFFLED)
def test_epochs_and_seeds_differ(kind: str) -> None:
    seen = [small(kind, seed).ids(epoch, 0, 997) for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            # Independent permutations agree at one place on average; at most 16 rows share a short batch.
            assert np.count_nonzero(one == other) < 30


@pytest.mark.parametrize("kind", ["sequential", *SHUFFLED])
def test_positions_outside_the_epoch_are_refused(kind: str) -> None:
    order = small(kind, 1)
    for start, stop in ((990, 998), (-1, 3)):
        with pytest.raises(ValueError, match="997 rows has positions 0 to 996"):
            order.ids(0, start, stop)


@pytest.mark.parametrize("kind", SHUFFLED)
def test_threads_do_not_disturb_each_other(kind: str) -> None:
    order = small(kind, 5)
    jobs = [(epoch, start) for epoch in range(6) for start in range(0, 960, 40)] * 2
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: order.ids(job[0], job[1], job[1] + 40), jobs))
    for (epoch, start), ids in zip(jobs, found, strict=True):
        assert np.array_equal(ids, small(kind, 5).ids(epoch, start, start + 40))


def test_permutations_with_one_tweak_each_are_those_of_a_call_of_their_own() -> None:
    keys = round_keys(1, "test")
    sizes = np.array([7] * 7 + [1] + [300] * 300 + [7] * 7)
    tweaks = np.array([0] * 7 + [1] + [2] * 300 + [3] * 7, dtype=np.uint64)
    values = np.concatenate([np.arange(n) for n in (7, 1, 300, 7)])
    together = permute(values, sizes, keys, tweaks)
    apart = [permute(np.arange(n), n, keys, t) for t, n in enumerate((7, 1, 300, 7))]
    assert np.array_equal(together, np.concatenate(apart))
    assert not np.array_equal(apart[0], apart[3])


def test_make_order_makes_what_its_words_say() -> None:
    lengths = offsets_of([3, 1, 2])
    assert make_order("full", seed=7, rows=9) == Full(7, 9)
    assert make_order("full", seed=7, rows=9, shuffle=False) == Sequential(9)
    assert make_order("block", seed=7, rows=9, shard_rows=[4, 5], shuffle=False) == Sequential(9)
    assert make_order("sequential", seed=7, rows=9) == Sequential(9)
    block = make_order("block", seed=7, rows=9, shard_rows=[4, 5])
    assert isinstance(block, Block)
    assert block.window == 10_000
    short_to_long = make_order("length_bucketed", seed=7, rows=3, offsets=lengths, batch=2, shuffle=False)
    assert short_to_long.ids(0, 0, 3).tolist() == [1, 2, 0]
    mixture = make_order("weighted", seed=7, rows=9, parts=[4, 5], weights=[0.5, 0.5], epoch_rows=20)
    assert mixture.rows == 20


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ful", {}, r"no order 'ful'; did you mean 'full'\? Orders: full, block, sequential"),
        (
            "packed",
            {},
            "packed is not an order but a view of the rows: wrap them in distdl.data.Packed",
        ),
        ("length_bucketed", {"batch": 4}, "length_bucketed needs a sequence column"),
        ("length_bucketed", {"offsets": np.arange(10)}, "needs the size of a batch"),
        ("length_bucketed", {"offsets": np.arange(10), "batch": 0}, "batch of order length_bucketed is 0"),
        ("length_bucketed", {"offsets": np.arange(5), "batch": 4}, "have 4 rows, and the data 9"),
        ("length_bucketed", {"offsets": np.arange(10.0), "batch": 4}, r"float64 \[10\]"),
        ("block", {}, "needs the rows of each shard"),
        ("block", {"shard_rows": [4, 4]}, "the shards have 8 rows, and the data 9"),
        ("block", {"shard_rows": [10, -1]}, "0 or more each"),
        ("block", {"shard_rows": [9], "window": 0}, "window of order block is 0"),
        ("weighted", {"parts": [9]}, "a weight for each"),
        ("weighted", {"parts": [4], "weights": [1.0]}, "have 4 rows, and the data 9"),
        ("weighted", {"parts": [9], "weights": [1.0], "shuffle": False}, "always shuffles"),
    ],
)
def test_make_order_refuses(kind: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_order(kind, seed=1, rows=9, **options)  # type: ignore[arg-type]
