"""From positions to a rank's microbatches: one gather, then the user's transform and the augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from distdl.data.loading.workers import Workers
from distdl.data.order.kinds import Order
from distdl.data.table.rows import Batch, Rows, cut, row_count
from distdl.errors import DataError
from distdl.keys import key

Share = list[tuple[int, int, int]]
"""One rank's part of a step: (microbatch number in the step, start position, stop position in the epoch)."""

Transform = Callable[[Batch, int], Batch]
"""(columns of a microbatch, its key of 64 bits) -> columns. Pure: all its randomness comes from the key."""


def gather_microbatches(
    rows: Rows,
    order: Order,
    epoch: int,
    share: Share,
    seed: int,
    step: int,
    augment: Transform | None = None,
    transform: Transform | None = None,
) -> list[Batch]:
    """The microbatches of `share`, in its order: one gather for all of them, then `transform` and `augment`.

    Both get a key of (seed, step, microbatch) alone. Pure: any rank, in any thread, gets the same.
    """
    if not share:
        return []
    positions = np.concatenate([np.arange(start, stop, dtype=np.int64) for _, start, stop in share])
    gathered = rows.gather(order.at(epoch, positions))
    ends = np.cumsum([stop - start for _, start, stop in share]).tolist()
    batches = [cut(gathered, end - (b - a), end) for (_, a, b), end in zip(share, ends, strict=True)]
    numbers = [number for number, _, _ in share]
    if transform is not None:
        batches = [
            transformed(transform, b, key(seed, "transform", step, n))
            for n, b in zip(numbers, batches, strict=True)
        ]
    return _augmented(batches, numbers, augment, seed, step)


def submit_microbatches(
    workers: Workers, order: Order, epoch: int, share: Share, seed: int, step: int
) -> Sequence[Future[Batch]]:
    """`gather_microbatches` for a transform in worker processes: returns at once, a future a microbatch."""
    return [
        workers.submit(order.ids(epoch, start, stop), key(seed, "transform", step, number))
        for number, start, stop in share
    ]


def collect_microbatches(
    futures: Sequence[Future[Batch]], share: Share, seed: int, step: int, augment: Transform | None = None
) -> list[Batch]:
    """Wait for what `submit_microbatches` began, and augment it: the same bits as without workers."""
    numbers = [number for number, _, _ in share]
    return _augmented([future.result() for future in futures], numbers, augment, seed, step)


def transformed(transform: Transform, batch: Batch, chosen: int) -> Batch:
    """`transform(batch, chosen)`. Raises DataError where it does not return columns of as many rows."""
    before = row_count(batch)
    result = transform(batch, chosen)
    if not isinstance(result, dict):
        raise DataError(f"{_named(transform)} returned {type(result).__name__}; expected a dict of columns")
    wrong = [f"{len(column)} rows of {name!r}" for name, column in result.items() if len(column) != before]
    if wrong or not result:
        raise DataError(
            f"{_named(transform)} was given {before} rows and returned {', '.join(wrong) or 'no column'}; "
            "expected as many rows in every column. To leave rows out, do so before: `distdl data prepare` a "
            "source without them"
        )
    return result


def _named(transform: Transform) -> str:
    name = getattr(transform, "__qualname__", None)
    return f"the transform {transform.__module__}:{name}" if name else f"the transform {transform!r}"


def _augmented(
    batches: list[Batch], numbers: Sequence[int], augment: Transform | None, seed: int, step: int
) -> list[Batch]:
    if augment is None:
        return batches
    return [augment(b, key(seed, "augment", step, n)) for n, b in zip(numbers, batches, strict=True)]
