"""Every id once an epoch, and equally many steps on every rank, whatever the sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl.data import ArrayRows, Batch, Loader, Packed, Ragged, Rows, loader
from distdl.data.loading.workers import Workers
from distdl.data.order.kinds import Order, make_order


def plus_key(batch: Batch, key: int) -> Batch:
    """A transform that shows which key it got."""
    return {**batch, "key": np.full(len(batch["id"]), key % 2**31)}


def rows_of(count: int) -> ArrayRows:
    return ArrayRows({"id": np.arange(count, dtype=np.int64)})


def order_of(kind: str, rows: int, batch: int) -> Order:
    sizes = np.random.default_rng(rows).integers(0, 9, rows)
    shards = [rows // 3, 0, rows - rows // 3]
    options: dict[str, Any] = {"shard_rows": shards, "window": 7, "window_batches": 3}
    if kind == "weighted":
        split = [(rows + 1) // 2, rows // 2] if rows > 1 else [rows]
        options |= {"parts": split, "weights": [n / rows for n in split]}
    return make_order(
        kind, seed=5, rows=rows, batch=batch, offsets=np.concatenate([[0], np.cumsum(sizes)]), **options
    )


def epoch_ids(ranks: list[Loader]) -> list[list[int]]:
    """The ids of each step of one epoch, all ranks end to end; every rank must make as many steps."""
    steps = [[batch["id"].tolist() for batch in rank] for rank in ranks]
    assert len({len(s) for s in steps}) == 1
    assert len(steps[0]) == len(ranks[0])
    return [[i for part in parts for i in part] for parts in zip(*steps, strict=True)]


KINDS = ["full", "block", "sequential", "length_bucketed", "weighted"]


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.sampled_from([1, 2, 3, 5, 7, 13, 31, 97, 128, 211]),
    batch=st.sampled_from([1, 2, 3, 8, 10, 64, 300]),
    world=st.integers(1, 8),
    prefetch=st.sampled_from([0, 0, 2]),
)
def test_each_id_once_an_epoch(kind: str, rows: int, batch: int, world: int, prefetch: int) -> None:
    data, order = rows_of(rows), order_of(kind, rows, batch)
    ranks = [
        loader(data, batch, order=order, rank=r, world_size=world, prefetch=prefetch) for r in range(world)
    ]
    for epoch in range(2):
        steps = epoch_ids(ranks)
        assert [len(s) for s in steps[:-1]] == [batch] * (len(steps) - 1)
        assert sorted(i for s in steps for i in s) == list(range(rows))
        assert [i for s in steps for i in s] == order.ids(epoch, 0, rows).tolist()
    for rank in ranks:
        rank.close()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 60), batch=st.integers(1, 20), world=st.integers(1, 4))
def test_dropping_the_last_batch_drops_that_much(rows: int, batch: int, world: int) -> None:
    if rows < batch:
        return
    ranks = [
        loader(rows_of(rows), batch, drop_last=True, rank=r, world_size=world, prefetch=0)
        for r in range(world)
    ]
    ids = [i for step in epoch_ids(ranks) for i in step]
    assert len(ids) == len(set(ids)) == rows - rows % batch


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, tuple[Rows, Workers]]]:
    """Workers for 97 rows, started once."""
    data = rows_of(97)
    found = {count: (data, Workers(data, plus_key, count)) for count in range(1, 5)}
    yield found
    for _, pool in found.values():
        pool.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 4])
def test_any_number_of_workers_gives_the_same(
    pools: dict[int, tuple[Rows, Workers]], kind: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import distdl.data.loading.loader as module

    data, order = pools[1][0], order_of(kind, 97, 10)
    plain = loader(data, 10, order=order, transform=plus_key, rank=1, world_size=3, prefetch=0)
    expected = [(b["id"].tolist(), b["key"].tolist()) for b in plain]
    if count:
        monkeypatch.setattr(module, "Workers", lambda *_: pools[count][1])
        monkeypatch.setattr(pools[count][1], "close", lambda: None)
    with loader(data, 10, order=order, transform=plus_key, rank=1, world_size=3, workers=count) as other:
        assert [(b["id"].tolist(), b["key"].tolist()) for b in other] == expected


@pytest.mark.parametrize("count", range(5))
def test_each_id_once_with_workers(
    pools: dict[int, tuple[Rows, Workers]], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import distdl.data.loading.loader as module

    if count:
        monkeypatch.setattr(module, "Workers", lambda *_: pools[count][1])
        monkeypatch.setattr(pools[count][1], "close", lambda: None)
    data = pools[1][0]
    found: list[list[int]] = [[], []]
    for rank in range(2):  # one after another: they share a pool
        with loader(data, 10, transform=plus_key, rank=rank, world_size=2, workers=count) as batches:
            for epoch in range(2):
                found[epoch] += [i for batch in batches for i in batch["id"].tolist()]
    assert [sorted(ids) for ids in found] == [list(range(97))] * 2


class Documents(ArrayRows):
    """Documents of other lengths, empty ones too, in three shards; each token is another number."""

    def __init__(self, count: int) -> None:
        lengths = np.random.default_rng(count).integers(0, 12, count)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        super().__init__({"tokens": Ragged(np.arange(self.offsets[-1]), lengths)})
        self.shard_rows = [count // 3, 0, count - count // 3]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["full", "block", "sequential"]),
    count=st.sampled_from([4, 7, 31, 97]),
    length=st.sampled_from([1, 4, 13, 50]),
    batch=st.sampled_from([1, 3, 8, 64]),
    world=st.integers(1, 4),
)
def test_each_token_but_the_first_is_a_target_once(
    kind: str, count: int, length: int, batch: int, world: int
) -> None:
    documents = Documents(count)
    packed = Packed(documents, "tokens", documents.offsets, length)
    options = {"window": 7} if kind == "block" else {}
    ranks = [
        loader(packed, batch, order=kind, order_options=options, rank=r, world_size=world, prefetch=0)
        for r in range(world)
    ]
    for _ in range(2):
        targets = [
            token
            for rank in ranks
            for b in rank
            for row, targets in zip(b["tokens"].tolist(), b["tokens_count"].tolist(), strict=True)
            for token in row[1 : targets + 1]
        ]
        assert sorted(targets) == list(range(1, documents.offsets[-1]))
