"""`loader`: batches of torch tensors for a person's own loop, with or without torch.distributed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from distdl.data.loading.microbatches import Transform, transformed
from distdl.data.loading.position import FORMAT, Steps, describe_order, read_state
from distdl.data.loading.prefetch import Prefetcher
from distdl.data.loading.tensors import Pad, Pinned, to_tensor_parts, to_tensors
from distdl.data.loading.workers import Workers
from distdl.data.order.kinds import Order, make_order
from distdl.data.table.ragged import Ragged
from distdl.data.table.rows import Batch, Rows, again, close, fingerprint
from distdl.errors import DataError
from distdl.keys import key

_ORDERED_AT_ONCE = 32768
"""Positions whose ids are computed in one go: the order costs a fixed time a call, too."""

_GATHERED_AT_ONCE = 4096
_GATHERED_BYTES = 8 * 2**20
"""Rows, and bytes, that are gathered in one go, for the same reason. The batches are views of the result."""

Tensors = dict[str, Any]
"""{column: torch.Tensor}; for strings and bytes, {column: list}."""


def loader(
    dataset: Rows,
    batch_size: int,
    *,
    order: str | Order = "full",
    order_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    drop_last: bool = False,
    transform: Transform | None = None,
    workers: int = 0,
    prefetch: int | None = None,
    pin_memory: bool = False,
    pad: Pad = 0,
) -> Loader:
    """Batches of `dataset` (a `ShardedDataset`, or any `Rows`) for this rank, epoch after epoch.

    `batch_size` is the batch of all ranks together; each takes a contiguous run of it. All make equally many
    steps: in the short last step of an epoch some ranks may get a batch of 0 rows, so weigh losses by counts.

    `order`: full, block, sequential, length_bucketed, weighted (`distdl.data.make_order`, which gets
    `order_options`; `column` there names the one whose lengths length_bucketed sorts by), or an `Order`.
    `rank`, `world_size`: those of torch.distributed where it is initialised, else 0 of 1.
    `transform(columns, key)` changes a rank's batch, key = (seed, epoch, position of its first row): in the
    prefetching thread, or in `workers` processes, with the same result. `prefetch` is how many batches are
    kept ready. 0: none, and no thread but those of `workers`. None: 2 with `workers` or CUDA; else batches
    are made when asked for, and one thread computes the order ahead. `pin_memory` has no effect without CUDA.
    `pad`: see `to_tensors`. Remote data are read with threads of the loader's own, which `close` ends.

    Raises DataError for arguments that do not fit together or do not fit the data.
    """
    rank, world_size = _place_in_world(rank, world_size)
    order_ahead = prefetch != 0
    if prefetch is None:
        prefetch = 2 if workers or _cuda() else 0
    _check_numbers(batch_size, workers, prefetch)
    if isinstance(order, str):
        order = _order(dataset, order, batch_size, seed, dict(order_options or {}))
    elif order_options:
        raise DataError("order_options go with the name of an order; this order is made already")
    used = order.rows - order.rows % batch_size if drop_last else order.rows
    if used == 0:
        raise DataError(
            f"an epoch has {order.rows} rows, which leaves no batch of {batch_size}"
            + (": set drop_last=False, or a smaller batch_size" if order.rows else "; the dataset is empty")
        )
    steps = Steps(used, batch_size, rank, world_size)
    rows = again(dataset)
    pool = Workers(rows, transform, workers) if workers and transform is not None else None
    return Loader(rows, order, steps, seed, transform, pool, workers, prefetch, pin_memory, pad, order_ahead)


class Loader:
    """What `loader` returns. `for batch in it` goes through the rest of the current epoch.

    A batch counts as done from the moment it is handed out. So call `state_dict` at the end of the loop's
    body, after the optimiser's step; what was prefetched beyond it never counts. After the last batch the
    next `for` goes through the next epoch. Use it from one thread; `close` it, or use `with`.
    """

    def __init__(
        self,
        rows: Rows,
        order: Order,
        steps: Steps,
        seed: int,
        transform: Transform | None,
        pool: Workers | None,
        workers: int,
        prefetch: int,
        pin_memory: bool,
        pad: Pad,
        order_ahead: bool = True,
    ) -> None:
        """See `loader`, which checks what is given here. `rows` are closed with the loader."""
        self._rows, self._order, self._seed = rows, order, seed
        self._transform, self._pool, self._pin, self._pad = transform, pool, pin_memory, pad
        self._look_ahead: Callable[[Order, int, int, int], None] | None = getattr(rows, "look_ahead", None)
        self._in_flight = workers * max(prefetch, 1) + prefetch
        self._prefetch, self._order_ahead = prefetch, int(order_ahead)
        self._closed = False
        self._ahead: Prefetcher[Tensors] | None = None
        self._sent: Prefetcher[Future[Batch]] | None = None
        self._steps = steps
        self._epoch, self._samples, self._number = 0, 0, 0
        self._ids: tuple[int, dict[int, npt.NDArray[np.int64]]] = (-1, {})
        self._ordering: Prefetcher[dict[int, npt.NDArray[np.int64]]] | None = None
        self._gathered: dict[int, Tensors] = {}
        self._row_bytes = 0

    def __len__(self) -> int:
        """Steps of a whole epoch, the same on every rank."""
        return self._steps.per_epoch

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self._epoch

    @property
    def samples(self) -> int:
        """Samples of the current epoch handed out so far, by all ranks together."""
        return self._samples

    @property
    def remaining(self) -> int:
        """Steps that the next `for` goes through."""
        return -(-max(0, self._steps.used - self._samples) // self._steps.batch)

    def __iter__(self) -> Iterator[Tensors]:
        if self._closed:
            raise RuntimeError("this loader is closed")
        epoch = self._epoch
        while self._epoch == epoch and self._samples < self._steps.used:
            batch = self._next()
            self._number += 1
            self._samples = min(self._samples + self._steps.batch, self._steps.used)
            yield batch
        if self._epoch == epoch:
            self._epoch, self._samples = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, under 1 kB of JSON: the same on every rank, for any number of them."""
        return {"format": FORMAT, "epoch": self._epoch, "samples": self._samples, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, in constant time.

        The number of ranks, workers and the batch size may be others (an order that sorts by batches keeps
        its own batch: order_options={"batch": ...}). Raises DataError for other data, seed or order.
        """
        epoch, samples = read_state(state, self._identity())
        old = self._steps
        self._stop()
        self._stand(Steps(old.used, old.batch, old.rank, old.world_size, epoch, samples))

    def close(self) -> None:
        """End the threads and the worker processes, without waiting for a server. May be called again.

        The dataset that `loader` was given can be read on: `ShardedDataset` and the views of it give each
        loader rows of its own. Other `Rows` are closed, if they have a `close`.
        """
        self._closed = True
        # What the thread may be waiting for goes first.
        if self._pool is not None:
            self._pool.close()
        close(self._rows)
        self._stop()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "rows": self._order.rows,
            "fingerprint": fingerprint(self._rows),
            "seed": self._seed,
            "order": describe_order(self._order),
        }

    def _stand(self, steps: Steps) -> None:
        self._steps, self._epoch, self._samples, self._number = steps, steps.epoch, steps.samples, 0
        self._ids = (-1, {})
        self._gathered = {}

    def _stop(self) -> None:
        # Each one's thread asks the next.
        for prefetcher in (self._ahead, self._sent, self._ordering):
            if prefetcher is not None:
                prefetcher.close()
        self._ahead = self._sent = self._ordering = None

    def _next(self) -> Tensors:
        if self._closed:
            raise RuntimeError("this loader is closed")
        if self._ahead is None:
            if self._pool is not None:
                self._sent = Prefetcher(self._submit, self._in_flight)
            self._ahead = Prefetcher(self._make, self._prefetch)
        return self._ahead.get(self._number)

    def _make(self, number: int) -> Tensors:
        """The batch of step `number`; the prefetching thread calls it."""
        if self._look_ahead is not None:
            self._look_ahead(self._order, *self._steps.mine(number))
        pinned = Pinned() if self._pin and _cuda() else None
        if self._sent is not None:
            return to_tensors(self._sent.get(number).result(), self._pad, pinned)
        if pinned is not None and self._transform is None:
            return to_tensors(self._rows.gather(self._ids_of(number), pinned), self._pad, pinned)
        if self._transform is None:
            return self._gather(number)
        batch = self._rows.gather(self._ids_of(number))
        return to_tensors(transformed(self._transform, batch, self._key(number)), self._pad, pinned)

    def _gather(self, number: int) -> Tensors:
        """The batch of step `number`. Where batches are small, those after it in the epoch are made too."""
        if number not in self._gathered:
            ids = self._together(number)
            ends = np.cumsum([len(part) for part in ids]).tolist()
            whole = self._rows.gather(np.concatenate(ids))
            self._row_bytes = _bytes(whole) // max(1, ends[-1])
            self._gathered = dict(enumerate(to_tensor_parts(whole, ends, self._pad), number))
        return self._gathered.pop(number)

    def _together(self, number: int) -> list[npt.NDArray[np.int64]]:
        """Ids of step `number` and of those that are best gathered with it."""
        epoch, ids = self._steps.mine(number)[0], [self._ids_of(number)]
        rows = min(_GATHERED_AT_ONCE, _GATHERED_BYTES // self._row_bytes) if self._row_bytes else 0
        for after in range(number + 1, number + max(1, rows // max(1, len(ids[0])))):
            if self._steps.mine(after)[0] != epoch:
                break
            ids.append(self._ids_of(after))
        return ids

    def _submit(self, number: int) -> Future[Batch]:
        assert self._pool is not None
        return self._pool.submit(self._ids_of(number), self._key(number))

    def _key(self, number: int) -> int:
        epoch, start, _ = self._steps.mine(number)
        return key(self._seed, "transform", epoch, start)

    def _ids_of(self, number: int) -> npt.NDArray[np.int64]:
        """Ids of this rank's part of step `number`. Computed for many steps together, in one thread."""
        steps = self._steps
        # No more than an epoch: the keys of each epoch cost time of their own.
        together = max(1, min(_ORDERED_AT_ONCE * steps.world_size // steps.batch, steps.per_epoch))
        chunk = number // together
        if self._ids[0] != chunk:
            if self._ordering is None:
                self._ordering = Prefetcher(
                    lambda c: self._ordered(range(c * together, (c + 1) * together)), self._order_ahead
                )
            self._ids = chunk, self._ordering.get(chunk)
        return self._ids[1][number]

    def _ordered(self, numbers: range) -> dict[int, npt.NDArray[np.int64]]:
        parts = [(n, *self._steps.mine(n)) for n in numbers]
        found = {}
        for epoch in sorted({part[1] for part in parts}):
            own = [(n, start, stop) for n, e, start, stop in parts if e == epoch]
            positions = np.concatenate([np.arange(a, b, dtype=np.int64) for _, a, b in own])
            ids, at = self._order.at(epoch, positions), 0
            for n, start, stop in own:
                found[n] = ids[at : at + stop - start]
                at += stop - start
        return found


def _order(dataset: Any, kind: str, batch: int, seed: int, options: dict[str, Any]) -> Order:
    column = options.pop("column", None)
    given: dict[str, Any] = {"seed": seed, "rows": len(dataset), "batch": batch}
    if kind == "length_bucketed" and "offsets" not in options:
        given["offsets"] = _offsets(dataset, column)
    given["shard_rows"] = getattr(dataset, "shard_rows", None)
    given["parts"] = getattr(dataset, "part_rows", None)
    try:
        return make_order(kind, **{**given, **options})
    except TypeError as error:
        raise DataError(f"order_options = {options!r}: {error}") from error


def _offsets(dataset: Any, column: str | None) -> Any:
    offsets: Callable[[str], Any] | None = getattr(dataset, "offsets", None)
    if offsets is None:
        return None
    if column is not None:
        return offsets(column)
    names = getattr(dataset, "sequence_columns", [])
    if len(names) > 1:
        raise DataError(
            f"several columns have lengths: {', '.join(names)}; say by which one to sort: "
            f"order_options={{'column': {names[0]!r}}}"
        )
    return offsets(names[0]) if names else None


def _check_numbers(batch_size: int, workers: int, prefetch: int) -> None:
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("prefetch", prefetch, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(f"{name} is {value!r}; expected a whole number, {least} or more")


def _place_in_world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if rank is None and world_size is None:
        # Whoever initialised a process group has imported it.
        dist = sys.modules.get("torch.distributed")
        if dist is not None and dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise DataError(f"rank is {rank} and world_size {world_size}; give both, with 0 <= rank < world_size")
    return rank, world_size


def _bytes(batch: Batch) -> int:
    return sum(_held(column) for column in batch.values())


def _held(column: npt.NDArray[Any] | Ragged) -> int:
    return _held(column.values) + column.lengths.nbytes if isinstance(column, Ragged) else column.nbytes


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
