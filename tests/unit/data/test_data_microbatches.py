"""Microbatches: the same whoever gathers them; and the prefetching thread."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from distdl.data.augment.augmentation import Augmentation
from distdl.data.loading.microbatches import Share, gather_microbatches
from distdl.data.loading.prefetch import Prefetcher
from distdl.data.order.kinds import Full
from distdl.data.table.rows import ArrayRows, Batch
from distdl.keys import key

IMAGES = np.random.default_rng(0).integers(0, 255, (500, 8, 8), dtype=np.uint8)
ROWS = ArrayRows({"image": IMAGES, "label": np.arange(500)})
ORDER = Full(7, 500)
CHANGE = Augmentation(flip=True, crop_padding=2)
STEP: Share = [(0, 100, 132), (1, 132, 164), (2, 164, 196), (3, 196, 201)]


def gather(share: Share, rows: ArrayRows = ROWS, image: str | None = "image") -> list[Batch]:
    return gather_microbatches(rows, ORDER, 2, share, 7, 9, CHANGE.on(image) if image else None)


def test_microbatches_hold_the_rows_of_their_positions() -> None:
    for (_, start, stop), batch in zip(STEP, gather(STEP, image=None), strict=True):
        ids = ORDER.ids(2, start, stop)
        assert np.array_equal(batch["label"], ids)
        assert np.array_equal(batch["image"], IMAGES[ids])


def test_augmentation_is_keyed_by_seed_step_and_microbatch() -> None:
    plain = gather(STEP, image=None)
    for number, batch in enumerate(gather(STEP)):
        expected = CHANGE(plain[number]["image"], key(7, "augment", 9, number))
        assert np.array_equal(batch["image"], expected)
        assert not np.array_equal(batch["image"], plain[number]["image"])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_sharing_out_gives_the_same_microbatches(world: int) -> None:
    whole = gather(STEP)
    shares = [[STEP[i] for i in part] for part in np.array_split(np.arange(4), world)]
    apart = [batch for share in shares for batch in gather(share)]
    for one, other in zip(whole, apart, strict=True):
        assert np.array_equal(one["image"], other["image"])
        assert np.array_equal(one["label"], other["label"])


def test_one_gather_serves_the_whole_share(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    rows = ArrayRows({"image": IMAGES, "label": np.arange(500)})
    monkeypatch.setattr(rows, "gather", lambda ids: calls.append(len(ids)) or ROWS.gather(ids))
    gather(STEP, rows)
    assert calls == [101]
    assert gather([], rows) == []
    assert calls == [101]


def test_repeats_and_gaps_are_served_as_asked() -> None:
    first, repeat, last = gather([STEP[3], STEP[3], STEP[0]])
    whole = gather(STEP)
    assert np.array_equal(first["image"], whole[3]["image"])
    assert np.array_equal(repeat["image"], whole[3]["image"])
    assert np.array_equal(last["image"], whole[0]["image"])


class Recorder:
    """A `make` that notes its calls, and its threads."""

    def __init__(self, bad: frozenset[int] = frozenset()) -> None:
        self.calls: list[int] = []
        self.threads: set[str] = set()
        self.bad = bad

    def __call__(self, step: int) -> str:
        self.calls.append(step)
        self.threads.add(threading.current_thread().name)
        if step in self.bad:
            raise KeyError(f"step {step}")
        return f"made {step}"


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_steps_come_in_order_and_once_each(depth: int) -> None:
    make = Recorder()
    with Prefetcher(make, depth) as ahead:
        assert [ahead.get(step) for step in range(5, 15)] == [f"made {step}" for step in range(5, 15)]
    assert make.calls[:10] == list(range(5, 15))
    assert len(make.calls) <= 10 + depth
    main = threading.current_thread().name
    assert (make.threads == {main}) == (depth == 0)
    assert len(make.threads) == 1


def test_the_next_steps_are_made_while_this_one_is_used() -> None:
    made = [threading.Event() for _ in range(10)]
    with Prefetcher(lambda step: made[step].set(), depth=2) as ahead:
        ahead.get(0)
        assert made[1].wait(20)
        assert made[2].wait(20)
        assert not made[3].wait(0.05)
        ahead.get(1)
        assert made[3].wait(20)


def test_a_step_out_of_sequence_starts_anew() -> None:
    make = Recorder()
    with Prefetcher(make, depth=2) as ahead:
        assert [ahead.get(step) for step in (0, 1, 7, 8, 8, 2)] == [
            f"made {step}" for step in (0, 1, 7, 8, 8, 2)
        ]


@pytest.mark.parametrize("depth", [0, 2])
def test_a_failure_is_raised_by_its_own_step_and_only_there(depth: int) -> None:
    make = Recorder(bad=frozenset({2}))
    with Prefetcher(make, depth) as ahead:
        assert ahead.get(0) == "made 0"
        assert ahead.get(1) == "made 1"
        with pytest.raises(KeyError, match="step 2"):
            ahead.get(2)
        assert ahead.get(3) == "made 3"


def test_a_failure_beyond_the_end_is_never_seen() -> None:
    with Prefetcher(Recorder(bad=frozenset({3, 4, 5})), depth=3) as ahead:
        assert [ahead.get(step) for step in range(3)] == ["made 0", "made 1", "made 2"]


def test_close_ends_the_thread_and_what_was_waiting() -> None:
    before = set(threading.enumerate())
    release, started = threading.Event(), threading.Event()
    calls = []

    def make(step: int) -> int:
        calls.append(step)
        if step == 1:
            started.set()
            release.wait(20)
        return step

    ahead = Prefetcher(make, depth=4)
    assert ahead.get(0) == 0
    assert started.wait(20)
    threading.Timer(0.05, release.set).start()
    ahead.close()
    ahead.close()
    assert calls == [0, 1]
    assert {t for t in threading.enumerate() if t.name.startswith("distdl-prefetch")} <= before
    with pytest.raises(RuntimeError, match="closed"):
        ahead.get(1)


def test_a_negative_depth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="depth is -1"):
        Prefetcher(Recorder(), -1)
