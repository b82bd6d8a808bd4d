"""Stop after any step, go on from the saved state: the ids that are left are those of the calm run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distdl.data import ArrayRows, Batch, Concatenated, Loader, Packed, Ragged, loader
from distdl.errors import DataError


class Parts(ArrayRows):
    def part(self, rows: int) -> ArrayRows:
        return ArrayRows({name: column[:rows] for name, column in self._columns.items()})


ROWS = Parts({"id": np.arange(61, dtype=np.int64)})
OFFSETS = np.concatenate([[0], np.cumsum(np.random.default_rng(1).integers(0, 9, 61))])
ORDERS = {
    "full": {},
    "block": {"shard_rows": [20, 0, 41], "window": 11},
    "sequential": {},
    "length_bucketed": {"offsets": OFFSETS, "window_batches": 3, "batch": 8},
    "weighted": {"parts": [30, 31], "weights": [0.25, 0.75]},
}


def world(kind: str, size: int, batch: int = 8, prefetch: int = 0, seed: int = 3) -> list[Loader]:
    return [
        loader(ROWS, batch, order=kind, order_options=ORDERS[kind], seed=seed, rank=r, world_size=size,
               prefetch=prefetch)
        for r in range(size)
    ]  # fmt: skip


def run(ranks: list[Loader], steps: int) -> list[int]:
    """The ids of the next steps, over as many epochs as that takes."""
    found: list[int] = []
    while steps:
        taken = 0
        for batches in zip(*ranks, strict=True):
            found += [i for batch in batches for i in batch["id"].tolist()]
            taken += 1
            if taken == steps:
                break
        steps -= taken
    return found


def load(ranks: list[Loader], state: str) -> list[Loader]:
    for rank in ranks:
        rank.load_state_dict(json.loads(state))
    return ranks


@pytest.mark.parametrize("kind", list(ORDERS))
def test_resume_at_every_step_twice_and_on_other_ranks(kind: str) -> None:
    calm = run(world(kind, 1), 16)
    for stop in range(1, 12):
        first = world(kind, 2, prefetch=2 * (stop % 2))
        ids = run(first, stop)
        for size in (1, 3, 2):
            state = json.dumps(first[0].state_dict())
            assert all(json.dumps(r.state_dict()) == state for r in first)
            assert len(state) < 1000
            for rank in first:
                rank.close()
            first = load(world(kind, size, prefetch=2 * (stop % 2)), state)
            ids += run(first, 1)
        ids += run(first, 16 - stop - 3)
        for rank in first:
            rank.close()
        assert ids == calm, f"stopped after step {stop}"


def test_another_batch_size_goes_on_at_the_same_sample() -> None:
    calm = run(world("full", 1), 8)
    for batch in (1, 5, 64):
        first = world("full", 1)
        ids = run(first, 3)
        (second,) = load(world("full", 1, batch=batch), json.dumps(first[0].state_dict()))
        assert second.remaining == -(-(61 - 24) // batch)
        ids += [i for b in second for i in b["id"].tolist()]
        assert ids == calm


def test_a_state_counts_what_was_handed_out_and_nothing_prefetched() -> None:
    with loader(ROWS, 8, prefetch=5) as batches:
        assert batches.state_dict()["samples"] == 0
        for number, _ in enumerate(batches, 1):
            assert batches.state_dict()["samples"] == min(8 * number, 61)
            assert batches.epoch == 0
        assert (batches.epoch, batches.samples) == (1, 0)


def test_a_state_after_the_last_batch_leaves_an_empty_rest() -> None:
    first = world("full", 1)
    run(first, 8)
    state = json.dumps(first[0].state_dict())
    (again,) = load(world("full", 1), state)
    assert list(again) == []
    assert again.epoch == 1
    assert len(list(again)) == 8


def test_load_state_discards_what_was_prefetched() -> None:
    with loader(ROWS, 8, prefetch=3) as batches:
        state = batches.state_dict()
        once = run([batches], 3)
        batches.load_state_dict(state)
        assert run([batches], 3) == once


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (loader(ROWS, 8, seed=4), "another seed"),
        (loader(ArrayRows({"id": np.arange(60)}), 8, seed=3), "another number of rows"),
        (loader(ArrayRows({"id": np.arange(61, dtype=np.int32)}), 8, seed=3), "are other data"),
        (loader(Concatenated([ROWS, ROWS.part(0)]), 8, seed=3), "are other data"),
        (loader(ROWS, 8, seed=3, order="sequential"), "another order"),
    ],
)
def test_other_data_seeds_and_orders_are_refused(other: Loader, words: str) -> None:
    state = world("full", 1)[0].state_dict()
    with pytest.raises(DataError, match=words):
        other.load_state_dict(state)


@pytest.mark.parametrize("change", [{"format": 9}, {"samples": -1}, {"epoch": "1"}, {"samples": 62}])
def test_damaged_states_are_refused(change: dict[str, object]) -> None:
    (it,) = world("full", 1)
    with pytest.raises(DataError):
        it.load_state_dict(it.state_dict() | change)


def test_a_bucketed_order_keeps_its_own_batch() -> None:
    (first,) = world("length_bucketed", 1)
    state = first.state_dict()
    other = dict(ORDERS["length_bucketed"], batch=16)
    with pytest.raises(DataError, match="order_options"):
        loader(ROWS, 16, order="length_bucketed", order_options=other, seed=3).load_state_dict(state)
    loader(
        ROWS, 16, order="length_bucketed", order_options=ORDERS["length_bucketed"], seed=3
    ).load_state_dict(state)


def plus_key(batch: Batch, key: int) -> Batch:
    """A transform that shows which key it got."""
    return {**batch, "key": np.full(len(batch["id"]), key % 2**31)}


@pytest.mark.parametrize("stop", [1, 7, 8])
def test_resume_with_workers_and_without_again(stop: int) -> None:
    """Positions within an epoch, before its short last step, and at its end."""

    def steps(batches: Loader, count: int) -> list[tuple[list[int], list[int]]]:
        found = []
        while len(found) < count:
            for batch in batches:
                found.append((batch["id"].tolist(), batch["key"].tolist()))
                if len(found) == count:
                    break
        return found

    def made(workers: int) -> Loader:
        return loader(ROWS, 8, seed=3, transform=plus_key, workers=workers, rank=0, world_size=1)

    with made(0) as calm:
        expected = steps(calm, stop + 5)
    found, state = [], None
    for workers, count in ((0, stop), (2, 3), (0, 2)):
        with made(workers) as batches:
            if state is not None:
                batches.load_state_dict(json.loads(state))
            found += steps(batches, count)
            state = json.dumps(batches.state_dict())
    assert found == expected


class Documents(ArrayRows):
    """61 documents in three shards, each token another number."""

    shard_rows = (20, 0, 41)


DOCUMENTS = Documents({"tokens": Ragged(np.arange(OFFSETS[-1], dtype=np.int32), np.diff(OFFSETS))})


@pytest.mark.parametrize("kind", ["full", "block", "sequential"])
def test_resume_at_every_step_of_packed_rows(kind: str) -> None:
    options = {"window": 9} if kind == "block" else {}

    def made(rank: int = 0, size: int = 1, length: int = 5) -> Loader:
        packed = Packed(DOCUMENTS, "tokens", OFFSETS, length)
        return loader(packed, 8, order=kind, order_options=options, rank=rank, world_size=size, prefetch=0)

    def tokens(ranks: list[Loader], count: int) -> list[list[int]]:
        found: list[list[int]] = []
        while count:
            for batches in zip(*ranks, strict=True):
                found += [row for batch in batches for row in batch["tokens"].tolist()]
                count -= 1
                if not count:
                    break
        return found

    steps = 2 * len(made())
    calm = tokens([made()], steps)
    for stop in range(1, steps):
        first = made()
        found = tokens([first], stop)
        state = json.dumps(first.state_dict())
        assert len(state) < 1000
        found += tokens(load([made(r, 2) for r in range(2)], state), steps - stop)
        assert found == calm, f"stopped after step {stop}"
    with pytest.raises(DataError):
        made(length=6).load_state_dict(json.loads(state))
