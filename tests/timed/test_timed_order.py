"""Times that are promised, measured while nothing else runs: tests/run.sh runs this folder by itself."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distdl.data.order.kinds import Block, Full, LengthBucketed, Order, Sequential, Weighted

BIG = 10**9


def huge_offsets(folder: Path) -> np.ndarray:
    """Offsets of 10^9 rows on disk, all 0: a sparse file of 8 GB, which takes no room."""
    path = folder / "offsets.bin"
    with path.open("wb") as stream:
        stream.truncate(8 * (BIG + 1))
    offsets = np.memmap(path, np.int64, "r")
    offsets._mmap.madvise(mmap.MADV_RANDOM)  # reading ahead would bring in all 8 GB
    return offsets


HUGE: dict[str, Callable[[np.ndarray], Order]] = {
    "sequential": lambda _: Sequential(BIG),
    "full": lambda _: Full(3, BIG),
    "block": lambda _: Block(3, [10**6] * 1000),
    "weighted": lambda _: Weighted(3, [BIG // 2, BIG // 4, BIG // 4], [0.1, 0.2, 0.7], BIG),
    "length_bucketed": lambda offsets: LengthBucketed(3, offsets, 256),
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_batch_of_a_thousand_million_rows_takes_under_a_millisecond(kind: str, tmp_path: Path) -> None:
    offsets = huge_offsets(tmp_path)
    batches = 50  # a whole window of length_bucketed, sorted within the time
    start = 12_345 * 50 * 256

    def one_turn(order: Order) -> float:
        begun = time.thread_time()
        for number in range(batches):
            order.ids(3, start + number * 256, start + (number + 1) * 256)
        return (time.thread_time() - begun) / batches

    # Processor time, and the least of several turns, each of an order that has kept nothing: other processes
    # share the machine, and the first turn fetches the pages of the offsets that the others find in memory.
    assert min(one_turn(HUGE[kind](offsets)) for _ in range(8)) < 1e-3
