"""The data order: a bijection, random, in constant memory, and the same for ever."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl.data.order.kinds import MAX_ROWS, Full, Sequential


@settings(max_examples=150, deadline=None)
@given(rows=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_every_row_comes_exactly_once(rows: int, seed: int, epoch: int) -> None:
    ids = Full(seed, rows).ids(epoch, 0, rows)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(rows))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_slice_is_that_part_of_the_whole(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3000))
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    order = Full(5, rows)
    whole = order.ids(3, 0, rows)
    assert np.array_equal(order.ids(3, start, stop), whole[start:stop])
    backwards = np.arange(rows)[::-1]
    assert np.array_equal(order.at(3, backwards), whole[::-1])


def test_seeds_and_epochs_differ() -> None:
    orders = [Full(seed, 2000).ids(epoch, 0, 2000) for seed in range(4) for epoch in range(4)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two independent permutations agree at one place on average (Poisson).
            assert np.count_nonzero(one == other) < 10


def test_without_shuffle_it_is_the_order_of_the_file() -> None:
    assert np.array_equal(Sequential(100).ids(7, 10, 20), np.arange(10, 20))


def _chi_square(counts: np.ndarray) -> float:
    """Chi-square against equal counts, in standard deviations from its mean (good for many cells)."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_ids_are_spread_evenly_over_positions() -> None:
    rows, cells = 4099, 16
    counts = np.zeros((cells, cells))
    for epoch in range(40):
        ids = Full(11, rows).ids(epoch, 0, rows)
        np.add.at(counts, (np.arange(rows) * cells // rows, ids * cells // rows), 1)
    # Row and column sums are fixed, so the spread is a little below that of free cells.
    assert -5 < _chi_square(counts) < 4


def test_neighbours_in_the_order_are_unrelated_in_the_file() -> None:
    rows, cells = 4099, 64
    counts = np.zeros(cells)
    for epoch in range(40):
        ids = Full(12, rows).ids(epoch, 0, rows)
        np.add.at(counts, ((ids[1:] - ids[:-1]) % rows) * cells // rows, 1)
    assert abs(_chi_square(counts)) < 4


def test_neighbours_in_the_file_are_unrelated_in_the_order() -> None:
    rows, cells = 4099, 64
    counts = np.zeros(cells)
    for epoch in range(40):
        places = np.argsort(Full(13, rows).ids(epoch, 0, rows))
        np.add.at(counts, ((places[1:] - places[:-1]) % rows) * cells // rows, 1)
    assert abs(_chi_square(counts)) < 4


def test_successive_epochs_are_unrelated() -> None:
    rows, cells = 4099, 64
    counts = np.zeros(cells)
    order = Full(14, rows)
    for epoch in range(40):
        step = order.ids(epoch, 0, rows) - order.ids(epoch + 1, 0, rows)
        np.add.at(counts, (step % rows) * cells // rows, 1)
    assert abs(_chi_square(counts)) < 4


def test_all_permutations_of_a_tiny_dataset_are_equally_frequent() -> None:
    seen: dict[tuple[int, ...], int] = {}
    for epoch in range(6000):
        ids = tuple(Full(3, 5).ids(epoch, 0, 5).tolist())
        seen[ids] = seen.get(ids, 0) + 1
    assert len(seen) == 120
    assert abs(_chi_square(np.array(list(seen.values())))) < 4


@pytest.mark.parametrize("rows", [10**9, 10**12 + 39, MAX_ROWS])
def test_memory_does_not_grow_with_the_rows(rows: int) -> None:
    order = Full(1, rows)
    tracemalloc.start()
    ids = order.ids(0, rows - 1000, rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6
    assert len(np.unique(ids)) == 1000
    assert ids.min() >= 0
    assert ids.max() < rows
    assert ids.std() > rows / 5


def test_the_order_never_changes_between_versions() -> None:
    assert Full(7, 1000).ids(0, 0, 8).tolist() == [238, 688, 293, 521, 19, 530, 555, 331]
    assert Full(7, 10**9).ids(3, 10**8, 10**8 + 3).tolist() == [899257415, 819238812, 704635905]


def test_positions_outside_the_epoch_are_refused() -> None:
    with pytest.raises(ValueError, match="positions 0 to 9"):
        Full(1, 10).ids(0, 5, 11)
    with pytest.raises(ValueError, match="positions"):
        Sequential(10).ids(0, -1, 3)
    assert Full(1, 0).ids(0, 0, 0).shape == (0,)
