"""(Recipe, Topology, DataInfo) -> Plan: every decision that needs more than one of them. Pure, torch-free.

Later code obeys the plan and decides nothing again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from distdl.capabilities import ENGINES, check_engine, engine_of
from distdl.errors import PlanError
from distdl.samples import DataInfo, order_of, samples_of, sequence_column
from distdl.topology import Topology
from distdl.zero_config import deepspeed_config

if TYPE_CHECKING:
    from distdl.recipe import Recipe


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
    order, sequence = order_of(recipe, data), sequence_column(recipe, data)
    train_rows = samples_of(recipe, data, order, sequence, "train_split")
    eval_rows = samples_of(recipe, data, order, sequence, "eval_split")
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
        return "cuda" if topology.a_gpu_each else "cpu"
    if wanted == "cuda" and topology.launcher != "planned" and not topology.a_gpu_each:
        fewer = f"--procs {topology.gpus}, or " if topology.gpus else ""
        raise PlanError(
            f"hardware.device = 'cuda' with {topology.local_world_size} processes on this node, which has "
            f"{topology.gpus} GPUs: use {fewer}hardware.device=cpu"
        )
    return wanted


def _check_patience(recipe: Recipe, topology: Topology, data: DataInfo) -> None:
    """A rank that waits for a server keeps the others waiting in a collective."""
    retry, limit = recipe.hardware.retry_s, recipe.launch.timeout_s
    if data.remote and topology.world_size > 1 and retry >= limit:
        raise PlanError(
            f"hardware.retry_s = {retry:g} is not less than launch.timeout_s = {limit:g}: the other "
            "processes would give up on one that still waits for its data. Raise launch.timeout_s, or lower "
            "hardware.retry_s"
        )


def _too_few_windows(recipe: Recipe, rows: int, world_size: int) -> PlanError:
    batch, length = recipe.batch, recipe.data.pack_length
    fits = rows // batch.micro * batch.micro
    smaller = f"batch.global to at most {fits}, or " if fits >= batch.micro * world_size else ""
    return PlanError(
        f"data.order = 'lanes': the training text has {rows} windows of data.pack_length = {length} tokens, "
        f"fewer than batch.global = {batch.global_} lanes: set {smaller}data.pack_length to less"
    )


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
