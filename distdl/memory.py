"""How much memory one rank needs to train: a prediction from the model's sizes. Pure and torch-free.

It counts tensors that live at the fullest moment of a step, the end of backward: weights, gradients,
optimiser state, what the engine keeps to communicate, and activations. Not counted is what a process needs
before it has a model: the interpreter, libraries, a CUDA context, and the data loader's mapped files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from distdl.capabilities import ENGINES
from distdl.plan import Plan
from distdl.recipe import Recipe

FP32 = 4
BUCKET = 25 * 2**20
"""Bytes that are exchanged at once in exact mode and, by default, by ZeRO."""

_SLOTS = {"adamw": 2, "lamb": 2, "lion": 1}
"""Tensors of optimiser state as large as the parameters; Adafactor's are negligible."""


@dataclass(frozen=True)
class ModelSizes:
    """Elements of a model (`train.sizes.model_sizes` measures them).

    `units`: of each part that an engine gathers by itself. `activations`: bytes kept for the backward of one
    microbatch. `largest`: of the largest parameter.
    """

    parameters: int
    trainable: int
    largest: int
    units: tuple[int, ...]
    buffers: int
    activations: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    communication: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        """Bytes by name, and their total."""
        return asdict(self) | {"total": self.total}

    def shown(self) -> dict[str, str]:
        """For a person: name -> MiB, what is not needed left out."""
        return {name: f"{size / 2**20:,.0f} MiB" for name, size in self.as_dict().items() if size}


def predict(recipe: Recipe, plan: Plan, sizes: ModelSizes) -> Memory:
    """The memory of one rank of `plan`, the fullest."""
    can, world = ENGINES[plan.engine], plan.world_size
    shards = can.shards if world > 1 else ()
    parts = world // plan.nodes if recipe.hardware.hybrid_shard else world  # replicated over nodes

    def part(what: str, size: int) -> int:
        return -(-size // parts) if what in shards else size

    weights, trained = FP32 * sizes.parameters, FP32 * sizes.trainable
    state = slots(recipe) * trained
    optimizer = part("optimizer", state)
    if recipe.hardware.shard_optimizer and world > 1:
        optimizer = -(-state // world)
    gradients = part("gradients", trained)
    if recipe.train.reduction == "exact":
        # One buffer for each sum that waits for its neighbour in the tree.
        waiting = (max(plan.shares) - 1).bit_length()
        # Sharded, each rank keeps its shard of those of all ranks.
        gradients = waiting * trained or gradients
    return Memory(
        weights=part("parameters", weights) + FP32 * sizes.buffers,
        gradients=gradients,
        optimizer=optimizer,
        average=part("parameters", weights) if recipe.train.ema_decay is not None else 0,
        communication=_communication(recipe, plan, sizes) if world > 1 else 0,
        activations=sizes.activations * plan.fuse,
    )


def slots(recipe: Recipe) -> int:
    """Tensors of optimiser state for each parameter, each of its size."""
    if recipe.optim.name == "sgd":
        return 1 if getattr(recipe.optim, "momentum", 0.0) else 0
    return _SLOTS.get(recipe.optim.name, 0)


def _communication(recipe: Recipe, plan: Plan, sizes: ModelSizes) -> int:
    trained = FP32 * sizes.trainable
    if recipe.train.reduction == "exact" and not ENGINES[plan.engine].gathers:
        return max(BUCKET, FP32 * sizes.largest)
    if recipe.hardware.shard_optimizer:
        return 2 * trained  # DDP's buckets, and the updated weights on their way
    unit = FP32 * max(sizes.units, default=sizes.parameters)
    buckets = min(2 * BUCKET, 2 * trained)
    # What is accumulated before the last backward of a step lies outside DDP's buckets.
    twice = trained if max(plan.shares) > 1 else 0
    return {
        "ddp": twice,
        "accelerate": twice,
        "fsdp": 4 * unit,
        "zero0": trained,  # all gradients, copied into one piece
        "zero1": buckets + 2 * unit,
        # With several microbatches the sum so far, and the gradients that come, each of a shard.
        "zero2": trained // plan.world_size + buckets + 2 * unit,
        "zero3": 2 * buckets + 4 * unit,  # weights that are live or fetched ahead; buckets of gradients
    }[plan.engine]
