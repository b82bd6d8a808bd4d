"""(Recipe, Topology, DataInfo) -> Plan: every decision that needs more than one of them. Pure, torch-free.

Later code obeys the plan and decides nothing again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from distdl.capabilities import ENGINES, check_engine, engine_of
from distdl.errors import DataError, PlanError, nearest
from distdl.topology import Topology
from distdl.zero_config import deepspeed_config

if TYPE_CHECKING:
    from distdl.recipe import Recipe
    from distdl.recipe.schema import Data

PACKED = ("packed", "lanes")
"""The orders whose rows are documents end to end, cut into one length."""


@dataclass(frozen=True)
class Field:
    """One column of a dataset: element type and shape of one row (None: varies); `num_classes` and
    the names of the `classes` for labels.

    `vocabulary`: how many different token ids there are, from 0, in a column of tokens.
    """

    dtype: str
    shape: tuple[int | None, ...] = ()
    num_classes: int | None = None
    vocabulary: int | None = None
    classes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class DataInfo:
    """What the plan and the model need to know about a dataset, read from its index alone.

    `elements`: split -> sequence column -> how many elements all its rows have, where an index says so.
    `remote`: its shards are fetched while it is read. `decode`: token ids to text, where the dataset has its
    tokenizer.
    """

    name: str
    rows: Mapping[str, int]
    fields: Mapping[str, Field]
    fingerprint: str
    elements: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    remote: bool = False
    decode: Callable[[Sequence[int]], str] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Microbatch:
    """One microbatch: its number in the step, and the positions [start, stop) of the epoch it holds.

    `weight` is 1, or 0 for a repeat that a rank runs only so that it takes part in the communication.
    """

    number: int
    start: int
    stop: int
    weight: int = 1


@dataclass(frozen=True)
class Plan:
    """Every decision of a run. Steps count optimiser steps of the whole world, never of a rank.

    `fuse`: microbatches that one forward and backward takes at most; `separate`: why no more than one.
    """

    engine: str
    device: str
    precision: str
    threads: int
    prefetch_steps: int
    nodes: int
    world_size: int
    global_batch: int
    micro_batch: int
    order: str
    sequence: str | None
    train_rows: int
    eval_rows: int
    steps_per_epoch: int
    total_steps: int
    dropped_rows: int
    eval_every: int | None
    save_every: int | None
    fuse: int
    separate: str | None

    @property
    def microbatches(self) -> int:
        """M: microbatches in a full step."""
        return self.global_batch // self.micro_batch

    @property
    def last_batch(self) -> int:
        """Samples in the last step of an epoch."""
        used = self.train_rows - self.dropped_rows
        return used - (self.steps_per_epoch - 1) * self.global_batch

    @property
    def shares(self) -> tuple[int, ...]:
        """Microbatches of a full step that each rank computes, by rank."""
        pairs = (share(self.microbatches, r, self.world_size) for r in range(self.world_size))
        return tuple(hi - lo for lo, hi in pairs)

    @property
    def balance(self) -> float:
        """Useful work over time held: 1.0 where all ranks compute equally many microbatches."""
        return self.microbatches / (max(self.shares) * self.world_size)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that step number `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def step_size(self, step: int) -> int:
        """Samples in step number `step`."""
        last = step % self.steps_per_epoch == self.steps_per_epoch - 1
        return self.last_batch if last else self.global_batch

    def counts(self, step: int) -> list[int]:
        """How many real microbatches each rank computes in step number `step`, by rank."""
        total = -(-self.step_size(step) // self.micro_batch)
        return [hi - lo for lo, hi in (share(total, r, self.world_size) for r in range(self.world_size))]

    def microbatches_of(self, step: int, rank: int) -> list[Microbatch]:
        """What `rank` computes in step number `step`. Which microbatches exist does not depend on ranks."""
        first = step % self.steps_per_epoch * self.global_batch
        end = first + self.step_size(step)
        total = -(-(end - first) // self.micro_batch)
        lo, hi = share(total, rank, self.world_size)
        real = [self._microbatch(i, first, end) for i in range(lo, hi)]
        can = ENGINES[self.engine]
        wanted = -(-total // self.world_size) if can.equal_counts else int(can.needs_one)
        last = self._microbatch(total - 1, first, end)
        repeat = Microbatch(last.number, last.start, last.stop, weight=0)
        return real + [repeat] * (wanted - len(real))

    def _microbatch(self, number: int, first: int, end: int) -> Microbatch:
        start = first + number * self.micro_batch
        return Microbatch(number, start, min(start + self.micro_batch, end))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the derived ones, for plan.json."""
        derived = {
            "microbatches": self.microbatches,
            "shares": list(self.shares),
            "balance": self.balance,
            "last_batch": self.last_batch,
        }
        return asdict(self) | derived


def share(items: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous run [lo, hi) of `items` that `rank` takes; sizes differ by at most one."""
    base, extra = divmod(items, world_size)
    lo = rank * base + min(rank, extra)
    return lo, lo + base + (rank < extra)


def make_plan(recipe: Recipe, topology: Topology, data: DataInfo) -> Plan:
    """Settle everything, or raise PlanError (DataError for unsuitable data) with the nearest that works."""
    batch, train = recipe.batch, recipe.train
    _check_batch(batch.global_, batch.micro, topology.world_size)
    _check_world(batch.global_, batch.micro, topology.world_size)
    order, sequence = _order(recipe, data), sequence_column(recipe, data)
    train_rows = _samples(recipe, data, order, sequence, "train_split")
    eval_rows = _samples(recipe, data, order, sequence, "eval_split")
    lanes = order == "lanes"
    dropped = train_rows % batch.global_ if recipe.data.drop_last or lanes else 0
    if train_rows - dropped == 0:
        if lanes:
            raise _too_few_windows(recipe, train_rows, topology.world_size)
        fits = train_rows // batch.micro * batch.micro
        smaller = f"batch.global to at most {fits}, or " if fits >= batch.micro * topology.world_size else ""
        raise PlanError(
            f"data.drop_last drops all {train_rows} training rows, fewer than batch.global = "
            f"{batch.global_}: set {smaller}data.drop_last to false"
        )
    per_epoch = -(-(train_rows - dropped) // batch.global_)
    bounds = [train.epochs * per_epoch if train.epochs else None, train.max_steps]
    total = min(b for b in bounds if b is not None)
    device = _device(recipe, topology)
    engine = engine_of(recipe, topology.accelerate)
    check_engine(recipe, engine, device)
    _check_patience(recipe, topology, data)
    fuse, separate = _fuse(recipe, topology, device)
    plan = Plan(
        engine=engine,
        device=device,
        precision=train.precision,
        threads=_threads(recipe, topology, device),
        prefetch_steps=_prefetch_steps(recipe, device),
        nodes=topology.nodes,
        world_size=topology.world_size,
        global_batch=batch.global_,
        micro_batch=batch.micro,
        order=order,
        sequence=sequence,
        train_rows=train_rows,
        eval_rows=eval_rows,
        steps_per_epoch=per_epoch,
        total_steps=total,
        dropped_rows=dropped,
        eval_every=_every(recipe.eval.every_steps, recipe.eval.every_epochs, per_epoch),
        save_every=_every(recipe.checkpoint.every_steps, recipe.checkpoint.every_epochs, per_epoch),
        fuse=fuse,
        separate=separate,
    )
    if recipe.hardware.deepspeed:
        deepspeed_config(plan, recipe)  # refuses what contradicts the recipe
    return plan


def _every(steps: int | None, epochs: int | None, per_epoch: int) -> int | None:
    return steps if steps else epochs * per_epoch if epochs else None


def _fuse(recipe: Recipe, topology: Topology, device: str) -> tuple[int, str | None]:
    """How many neighbouring microbatches a pass takes at most, and what forbids more than one."""
    batch, hardware = recipe.batch, recipe.hardware
    for forbids, why in (
        (recipe.data.order == "lanes", "data.order: lanes hands state on from one microbatch to the next"),
        (recipe.train.reduction == "exact", "train.reduction: exact adds gradients microbatch by microbatch"),
        (hardware.gradient_checkpointing, "hardware.gradient_checkpointing saves memory, which this takes"),
        (hardware.compile, "hardware.compile fixes what a pass computes"),
        (hardware.fuse == 1, "hardware.fuse: 1"),
    ):
        if forbids:
            return 1, why
    most = -(-batch.global_ // batch.micro // topology.world_size)
    if hardware.fuse != "auto":
        return min(most, hardware.fuse), None
    if device == "cpu" and most > 1:
        return 1, "on a CPU by default: small batches cost it little"
    return most, None


def _prefetch_steps(recipe: Recipe, device: str) -> int:
    wanted = recipe.hardware.prefetch_steps
    if wanted != "auto":
        return wanted
    return 2 if device == "cuda" else 0


def _threads(recipe: Recipe, topology: Topology, device: str) -> int:
    if recipe.hardware.threads != "auto":
        return recipe.hardware.threads
    if recipe.train.reduction == "exact" and device == "cpu":
        return 1  # sums inside a kernel depend on its threads, which must not depend on the number of ranks
    return max(1, topology.cpus // topology.local_world_size)


def _device(recipe: Recipe, topology: Topology) -> str:
    wanted = recipe.hardware.device
    if wanted == "auto":
        return "cuda" if topology.gpus >= topology.local_world_size else "cpu"
    if wanted == "cuda" and topology.launcher != "planned" and topology.gpus < topology.local_world_size:
        fewer = f"--procs {topology.gpus}, or " if topology.gpus else ""
        raise PlanError(
            f"hardware.device = 'cuda' with {topology.local_world_size} processes on this node, which has "
            f"{topology.gpus} GPUs: use {fewer}hardware.device=cpu"
        )
    return wanted


def _order(recipe: Recipe, data: DataInfo) -> str:
    """The kind of order, as `distdl.data.make_order` calls it, or "packed". DataError for weights of a
    mixture that are not a distribution.
    """
    wanted = recipe.data
    if wanted.mixture:
        check_weights(list(wanted.mixture.values()), len(wanted.mixture))
    kind = "weighted" if wanted.mixture is not None else wanted.order
    if not wanted.shuffle and kind in ("full", "block"):
        kind = "sequential"
    if data.remote and kind not in ("block", "sequential"):
        raise PlanError(
            f"data.order = {kind!r} would fetch shards of {data.name!r} again and again, in any order: use "
            "data.order=block, which reads a few at a time, or copy the folder here first with the store's "
            "own tool, or prepare it locally (`distdl data prepare`)"
        )
    return kind


def _check_patience(recipe: Recipe, topology: Topology, data: DataInfo) -> None:
    """A rank that waits for a server keeps the others waiting in a collective."""
    retry, limit = recipe.hardware.retry_s, recipe.launch.timeout_s
    if data.remote and topology.world_size > 1 and retry >= limit:
        raise PlanError(
            f"hardware.retry_s = {retry:g} is not less than launch.timeout_s = {limit:g}: the other "
            "processes would give up on one that still waits for its data. Raise launch.timeout_s, or lower "
            "hardware.retry_s"
        )


def check_weights(weights: Sequence[float], parts: int) -> None:
    """Raises DataError unless there is a weight above 0 for each of `parts` datasets, and they sum to 1."""
    shown = ", ".join(f"{weight:g}" for weight in weights)
    if not parts or len(weights) != parts:
        raise DataError(
            f"a mixture of {parts} datasets needs as many weights; {len(weights)} given: [{shown}]"
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(
                f"the weights [{shown}] of the mixture are not a distribution: {weight:g} is not above 0. "
                "Give each dataset a positive share, and leave out those that should have none."
            )
    total = math.fsum(weights)
    if abs(total - 1) > 1e-6:
        normalised = ", ".join(f"{weight / total:.7g}" for weight in weights)
        raise DataError(
            f"the weights [{shown}] of the mixture sum to {total:.7g}, not to 1. "
            f"In the same proportions: [{normalised}]."
        )


def sequence_column(recipe: Recipe, data: DataInfo) -> str | None:
    """The column that `data.sequence` names, or the only one of varying length; None where there is none.

    One of a single length will do for augmentation, and has to be named. Raises DataError where the column
    is needed and not there, or not the only one.
    """
    given = recipe.data.sequence
    by_length = recipe.data.order in ("length_bucketed", *PACKED)
    found = [name for name, f in data.fields.items() if f.shape[:1] == (None,)]
    if given is not None:
        able = found if by_length else [name for name, f in data.fields.items() if f.shape]
        if given not in able:
            varying = " of varying length" if by_length else ""
            raise DataError(
                f"data.sequence = {given!r}: dataset {data.name!r} has no such column of sequences{varying}"
                f"{nearest(given, able) or '.'} It has {', '.join(able) or 'none'}."
            )
        return given
    if len(found) == 1:
        return found[0]
    if by_length:
        what = f"several ({', '.join(found)}): name one in data.sequence" if found else "none"
        raise DataError(
            f"data.order = {recipe.data.order!r} needs a column of varying length, and dataset {data.name!r} "
            f"has {what}"
        )
    return None


def packed_rows(elements: int, length: int) -> int:
    """Rows of `length` targets that a stream of `elements` tokens gives; its first token is no target."""
    return -(-max(elements - 1, 0) // length)


def pack_length(data: Data, split: str) -> int:
    """Targets in one packed row of `split`: those that are evaluated alone may be longer."""
    assert data.pack_length is not None, "the recipe says how long"
    return data.pack_length if split == data.train_split else data.eval_pack_length or data.pack_length


def _too_few_windows(recipe: Recipe, rows: int, world_size: int) -> PlanError:
    batch, length = recipe.batch, recipe.data.pack_length
    fits = rows // batch.micro * batch.micro
    smaller = f"batch.global to at most {fits}, or " if fits >= batch.micro * world_size else ""
    return PlanError(
        f"data.order = 'lanes': the training text has {rows} windows of data.pack_length = {length} tokens, "
        f"fewer than batch.global = {batch.global_} lanes: set {smaller}data.pack_length to less"
    )


def _samples(recipe: Recipe, data: DataInfo, order: str, sequence: str | None, which: str) -> int:
    """Samples of one epoch of training, or of the evaluation."""
    split, key = getattr(recipe.data, which), f"data.{which}"
    rows = _rows(data, split, key)
    if order == "weighted" and which == "train_split":
        return recipe.data.epoch_rows or rows
    if order not in PACKED:
        return rows
    assert sequence is not None
    elements = data.elements.get(split, {}).get(sequence)
    if elements is None:
        raise DataError(
            f"data.order = {order!r} needs to know how many tokens {data.name!r} has, and only a prepared "
            "dataset says so: run `distdl data prepare` on it"
        )
    packed = packed_rows(elements, pack_length(recipe.data, split))
    if not packed:
        raise DataError(f"{key} = {split!r}: column {sequence!r} has {elements} tokens; two are the least")
    return packed


def _rows(data: DataInfo, split: str, key: str) -> int:
    if split not in data.rows:
        raise DataError(
            f"{key} = {split!r}: dataset {data.name!r} has no such split; it has {', '.join(data.rows)}"
        )
    if data.rows[split] == 0:
        raise DataError(f"{key} = {split!r}: this split of dataset {data.name!r} is empty")
    return data.rows[split]


def _check_batch(total: int, micro: int, world_size: int) -> None:
    if total % micro == 0:
        return
    least = micro * world_size  # one microbatch a process
    totals = sorted({max(n, least) for n in (total // micro * micro, (total // micro + 1) * micro)})
    divisors = [d for d in range(1, total // world_size + 1) if total % d == 0]
    micros = sorted(sorted(divisors, key=lambda d: (abs(d - micro), d))[:2])
    other = f", or batch.micro = {' or '.join(map(str, micros))}" if micros else ""
    raise PlanError(
        f"batch.global = {total} is not a multiple of batch.micro = {micro}: nearest valid are "
        f"batch.global = {' or '.join(map(str, totals))}{other}"
    )


def _check_world(total: int, micro: int, world_size: int) -> None:
    count = total // micro
    if world_size <= count:
        return
    fitting = [d for d in range(1, micro + 1) if total % d == 0 and total // d >= world_size]
    smaller = f", or batch.micro = {fitting[-1]} ({total // fitting[-1]} microbatches)" if fitting else ""
    raise PlanError(
        f"{world_size} processes for {count} microbatches (batch.global = {total} / batch.micro = {micro}): "
        f"each process needs at least one. Use at most {count} processes{smaller}. "
        "Mind that batch.micro is part of the mathematics where the model has BatchNorm"
    )
