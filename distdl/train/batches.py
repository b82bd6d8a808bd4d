"""This rank's microbatches, a step at a time: gathered, transformed, augmented, collated, ahead of need."""

from __future__ import annotations

import operator
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from distdl.data import Order, Prefetcher, Rows, Workers
from distdl.data.augment.augmentation import Augmentation, TokenDropout
from distdl.data.loading.microbatches import (
    Transform,
    collect_microbatches,
    gather_microbatches,
    submit_microbatches,
)
from distdl.data.stream.retry import never
from distdl.data.table.rows import Batch as Gathered
from distdl.data.table.rows import close
from distdl.errors import RecipeError, Stopped
from distdl.imports import import_attribute
from distdl.plan import Plan
from distdl.recipe import Recipe
from distdl.tasks import Batch, Columns, Task

_GLANCE_S = 0.1
"""How often a wait for worker processes looks whether the run was told to stop."""

_SEQUENCE = "a column of sequences: name it in data.sequence, where it is not the only one of varying length"


@dataclass(frozen=True)
class Micro:
    """One collated microbatch: its number in the step, its tensors (on CPU), its count and weight."""

    number: int
    batch: Batch
    count: int
    weight: int


class Batches:
    """Microbatches of one step after another. Call `get` and `close` from one thread."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        task: Task,
        rows: Rows,
        order: Order,
        rank: int,
        stopped: Callable[[], bool] = never,
    ) -> None:
        """Raises RecipeError for augmentations that the task's data cannot have, DataError for a transform
        that worker processes cannot import. `stopped` ends a wait for those: `get` raises Stopped then.
        """
        self._stopped = stopped
        self._plan, self._task, self._rows, self._order, self._rank = plan, task, rows, order, rank
        self._seed = recipe.train.seed
        self._augment = augmentation(recipe, plan, task)
        self._transform = transform_of(recipe)
        count = recipe.hardware.workers
        self._workers = Workers(rows, self._transform, count) if count and self._transform else None
        self._sent: dict[int, list[Future[Gathered]]] = {}
        self._ahead = max(plan.prefetch_steps, 1)
        self._prefetcher = Prefetcher(self._make, plan.prefetch_steps)

    def get(self, step: int) -> list[Micro]:
        """This rank's microbatches of step number `step`; waits, and raises what making them raised: Stopped
        where the run was told to stop meanwhile.
        """
        return self._prefetcher.get(step)

    def close(self) -> None:
        """End the thread and the worker processes. May be called again."""
        # What the thread may be waiting for goes first.
        if self._workers is not None:
            self._workers.close()
        close(self._rows)
        self._prefetcher.close()

    def _make(self, step: int) -> list[Micro]:
        self._look_ahead(step)
        wanted = self._plan.microbatches_of(step, self._rank)
        found = self._from_workers(step) if self._workers else self._gather(step)
        batches = [self._pinned(self._task.collate(Columns(rows))) for rows in found]
        return [
            Micro(m.number, batch, whole_count(self._task.count(batch)), m.weight)
            for m, batch in zip(wanted, batches, strict=True)
        ]

    def _pinned(self, batch: Batch) -> Batch:
        """In page-locked memory on CUDA, from which the GPU copies while the program goes on."""
        if self._plan.device != "cuda":
            return batch
        return {name: tensor.pin_memory() for name, tensor in batch.items()}

    def _share(self, step: int) -> list[tuple[int, int, int]]:
        return [(m.number, m.start, m.stop) for m in self._plan.microbatches_of(step, self._rank)]

    def _look_ahead(self, step: int) -> None:
        """Rows that are fetched while they are read hear which come next."""
        look_ahead = getattr(self._rows, "look_ahead", None)
        share = self._share(step)
        if look_ahead is not None and share:
            start, stop = min(a for _, a, _ in share), max(b for _, _, b in share)
            epoch = self._plan.epoch_of(step)
            again = epoch < self._plan.epoch_of(self._plan.total_steps - 1)
            look_ahead(self._order, epoch, start, stop, again=again)

    def _gather(self, step: int) -> list[Gathered]:
        return gather_microbatches(
            self._rows,
            self._order,
            self._plan.epoch_of(step),
            self._share(step),
            self._seed,
            step,
            self._augment,
            self._transform,
        )

    def _from_workers(self, step: int) -> list[Gathered]:
        """Steps ahead are handed out before this one is waited for, so that the workers are never idle."""
        assert self._workers is not None
        self._sent = {n: futures for n, futures in self._sent.items() if n >= step}
        for n in range(step, min(step + self._ahead, self._plan.total_steps - 1) + 1):
            if n not in self._sent:
                epoch, share = self._plan.epoch_of(n), self._share(n)
                self._sent[n] = list(
                    submit_microbatches(self._workers, self._order, epoch, share, self._seed, n)
                )
        while wait(self._sent[step], _GLANCE_S).not_done:
            if self._stopped():
                raise Stopped("stopped while worker processes were waited for")
        return collect_microbatches(self._sent.pop(step), self._share(step), self._seed, step, self._augment)


def transform_of(recipe: Recipe) -> Transform | None:
    """The user's function that `data.transform` names. Raises RecipeError for what cannot be called."""
    path = recipe.data.transform
    if path is None:
        return None
    found: Transform = import_attribute(path, "data.transform")
    if not callable(found):
        raise RecipeError(f"data.transform = {path!r} is {found!r}: expected a function of (rows, key)")
    return found


def augmentation(recipe: Recipe, plan: Plan, task: Task) -> Transform | None:
    """All of `data.augment` as one function of (columns, key); None where there is nothing to do.

    Raises RecipeError for augmentations of images without an image column, or of a sequence without one.
    """
    a = recipe.data.augment
    changes: list[Callable[[Any, int], Any]] = []
    if a.flip or a.crop_padding or a.cutout:
        column = _column(
            "flip, crop_padding or cutout", task.image_field, "an image column, and the task names none"
        )
        changes.append(Augmentation(flip=a.flip, crop_padding=a.crop_padding, cutout=a.cutout).on(column))
    if a.token_dropout:
        column = _column("token_dropout", plan.sequence, _SEQUENCE)
        _is_read("token_dropout", column, task)
        dropout = TokenDropout(a.token_dropout, a.token_dropout_id)
        changes.append(Augmentation(token_dropout=dropout).on(column))
    if a.jitter:
        column = _column("jitter", plan.sequence, _SEQUENCE)
        _is_read("jitter", column, task)
        changes.append(Augmentation(jitter=a.jitter).on(column))
    if not changes:
        return None

    def augment(batch: Gathered, key: int) -> Gathered:
        for change in changes:
            batch = change(batch, key)
        return batch

    return augment


def _column(what: str, found: str | None, needed: str) -> str:
    if found is None:
        raise RecipeError(f"data.augment: {what} needs {needed}")
    return found


def _is_read(what: str, column: str, task: Task) -> None:
    """Raises RecipeError for a column that the task does not predict from: it would be the labels."""
    inputs = getattr(task, "inputs", None)
    if inputs and column not in inputs:
        raise RecipeError(
            f"data.augment: {what} would change column {column!r}, and the task predicts from "
            f"{', '.join(inputs)}: name what it is to change in data.sequence, or leave it out"
        )


def whole_count(count: Any) -> int:
    """What a task's `count` returned, checked. Raises TypeError for anything but a whole number from 0."""
    try:
        whole = operator.index(count)
    except TypeError:
        whole = -1
    if whole < 0:
        raise TypeError(f"task.count(batch) returned {count!r}: expected a whole number, 0 or more")
    return whole
