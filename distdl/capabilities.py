"""What each engine can do, as plain data: the plan reads this table, so nothing asks which engine it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distdl.errors import PlanError

if TYPE_CHECKING:
    from distdl.recipe import Recipe
    from distdl.topology import AccelerateAsks

_ALL_PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Capabilities:
    """What a recipe may ask of an engine, and how the loop has to treat it.

    `equal_counts`: it communicates in each backward, so every rank must run equally many microbatches.
    `needs_one`: every rank must run at least one. `gathers`: its forward communicates as well (the parameters
    are sharded), so evaluation passes must be equally many too. `shards`: what a rank keeps only a part of.
    `flattens`: the optimiser sees slices of parameters, so one that looks at whole tensors would be wrong.
    `library`: what has to be installed beside torch. `exact_without`: keys of `hardware` that it cannot
    follow in exact mode. The others list the values of recipe keys that it takes.
    """

    library: str | None = None
    equal_counts: bool = False
    needs_one: bool = False
    gathers: bool = False
    flattens: bool = False
    shards: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    precisions: tuple[str, ...] = _ALL_PRECISIONS
    reductions: tuple[str, ...] = ("fast",)
    offloads: tuple[str, ...] = ("none",)
    shard_optimizer: tuple[bool, ...] = (False,)
    hybrid_shard: tuple[bool, ...] = (False,)
    compiles: tuple[bool, ...] = (False, True)
    own_optimizers: tuple[bool, ...] = (False, True)
    unused_parameters: tuple[bool, ...] = (False, True)
    exact_without: tuple[str, ...] = ()


ENGINES: dict[str, Capabilities] = {
    "ddp": Capabilities(needs_one=True, reductions=("fast", "exact"), shard_optimizer=(False, True)),
    "fsdp": Capabilities(
        equal_counts=True,
        needs_one=True,
        gathers=True,
        flattens=True,
        shards=("parameters", "gradients", "optimizer"),
        reductions=("fast", "exact"),
        offloads=("none", "parameters"),
        hybrid_shard=(False, True),
        exact_without=("hybrid_shard", "unused_parameters"),
    ),
    "zero0": Capabilities(library="deepspeed", needs_one=True),
    "zero1": Capabilities(
        library="deepspeed",
        needs_one=True,
        flattens=True,
        shards=("optimizer",),
        offloads=("none", "optimizer"),
        own_optimizers=(False,),
    ),
    "zero2": Capabilities(
        library="deepspeed",
        equal_counts=True,
        needs_one=True,
        flattens=True,
        shards=("gradients", "optimizer"),
        offloads=("none", "optimizer"),
        own_optimizers=(False,),
        # It sends gradients as they come: their order must be the same on all ranks.
        unused_parameters=(False,),
    ),
    "zero3": Capabilities(
        library="deepspeed",
        equal_counts=True,
        needs_one=True,
        gathers=True,
        flattens=True,
        shards=("parameters", "gradients", "optimizer"),
        offloads=("none", "optimizer", "parameters"),
        own_optimizers=(False,),
        # Its hooks gather and send in the order of the first step, on all ranks alike.
        compiles=(False,),
        unused_parameters=(False,),
    ),
    "accelerate": Capabilities(library="accelerate", needs_one=True),
}


def engine_of(recipe: Recipe, asks: AccelerateAsks) -> str:
    """The engine of a run: the recipe's, or for `accelerate` the one that its own configuration asks for.

    Raises PlanError where that configuration asks for what the recipe does not.
    """
    if recipe.hardware.engine != "accelerate":
        return recipe.hardware.engine
    if asks.wraps == "megatron":
        raise PlanError(
            "Accelerate's configuration asks for Megatron-LM (ACCELERATE_USE_MEGATRON_LM), which distdl does "
            "not run: choose distributed data parallel, FSDP or DeepSpeed in `accelerate config`"
        )
    if asks.precision not in (None, recipe.train.precision):
        raise PlanError(
            f"Accelerate's configuration asks for mixed precision {asks.precision!r}, the recipe for "
            f"train.precision = {recipe.train.precision!r}: make them the same, or set mixed_precision to "
            "'no', which leaves it to the recipe"
        )
    if asks.dynamo is not None and not recipe.hardware.compile:
        raise PlanError(
            f"Accelerate's configuration asks to compile the model ({asks.dynamo}), the recipe does not: set "
            "hardware.compile=true, or its dynamo_backend to 'no'"
        )
    return {"ddp": "accelerate", "fsdp": "fsdp", "deepspeed": f"zero{asks.zero_stage}"}[asks.wraps]


def check_engine(recipe: Recipe, engine: str, device: str) -> None:
    """Raise PlanError, naming the engines that can, where the recipe asks what its engine cannot do."""
    hardware, train = recipe.hardware, recipe.train
    asked: dict[str, tuple[object, str]] = {
        "hardware.device": (device, "devices"),
        "train.precision": (train.precision, "precisions"),
        "train.reduction": (train.reduction, "reductions"),
        "hardware.offload": (hardware.offload, "offloads"),
        "hardware.shard_optimizer": (hardware.shard_optimizer, "shard_optimizer"),
        "hardware.hybrid_shard": (hardware.hybrid_shard, "hybrid_shard"),
        "hardware.compile": (hardware.compile, "compiles"),
        "hardware.unused_parameters": (hardware.unused_parameters, "unused_parameters"),
    }
    for key, (value, attribute) in asked.items():
        allowed = getattr(ENGINES[engine], attribute)
        if value not in allowed:
            able = [name for name, can in ENGINES.items() if value in getattr(can, attribute)]
            raise PlanError(
                f"engine {engine!r} cannot do {key} = {_shown(value)} (it does "
                f"{', '.join(map(_plain, allowed))}); engines that can: {', '.join(able) or 'none'}"
            )
    for key in ENGINES[engine].exact_without if train.reduction == "exact" else ():
        if getattr(hardware, key):
            raise PlanError(
                f"engine {engine!r} cannot do hardware.{key} = true with train.reduction = 'exact': leave "
                "one of the two out"
            )
    if ":" in recipe.optim.name and True not in ENGINES[engine].own_optimizers:
        able = [name for name, can in ENGINES.items() if True in can.own_optimizers]
        raise PlanError(
            f"engine {engine!r} cannot save the state of an optimiser of your own (optim.name = "
            f"{recipe.optim.name!r}); engines that can: {', '.join(able)}"
        )
    if ENGINES[engine].flattens and _looks_at_whole_parameters(recipe):
        fitting = ", ".join(name for name, can in ENGINES.items() if not can.flattens)
        own = (
            ". If it updates each weight by its own gradient and state alone, say optim.elementwise=true"
            if ":" in recipe.optim.name
            else ""
        )
        raise PlanError(
            f"engine {engine!r} hands the optimiser slices of parameters, and optim.name = "
            f"{recipe.optim.name!r} has to see whole ones; engines that can: {fitting}{own}"
        )
    if hardware.deepspeed and not engine.startswith("zero"):
        raise PlanError(
            f"hardware.deepspeed has keys ({', '.join(hardware.deepspeed)}), and engine {engine!r} is not "
            f"DeepSpeed's: leave them out, or choose one of "
            f"{', '.join(name for name in ENGINES if name.startswith('zero'))}"
        )


def _looks_at_whole_parameters(recipe: Recipe) -> bool:
    optim = recipe.optim
    return optim.name in ("lamb", "adafactor") or not getattr(optim, "elementwise", True)


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str) else _plain(value)


def _plain(value: object) -> str:
    return str(value).lower()  # as YAML writes them
