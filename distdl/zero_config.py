"""DeepSpeed's configuration, derived whole from the recipe and the plan. Pure, torch-free.

Keys of the user's own may be added under `hardware.deepspeed`. What the recipe or the plan settles cannot be
said a second time with another value: such a key is refused, on a login node already.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from distdl.errors import PlanError

if TYPE_CHECKING:
    from distdl.recipe import Recipe


class Decided(Protocol):
    """What is read of a `Plan`, which imports this file."""

    @property
    def engine(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def shares(self) -> tuple[int, ...]: ...


BUCKET = 25 * 2**20 // 4
"""Elements that are sent or gathered at once, 25 MiB in fp32. DeepSpeed's own default, 2 GB, is a whole model
of 500 million parameters in one piece, beside the model."""

GROUP = 2 * BUCKET
"""Elements, about, that are updated at once."""


@dataclass(frozen=True)
class Settled:
    """A value that follows from the recipe or the plan, and what to change in its stead."""

    value: Any
    instead: str


_FOREIGN: dict[str, str] = {
    "optimizer": "set `optim`",
    "scheduler": "set `schedule`",
    "amp": "set train.precision",
    "data_efficiency": "set `data` and `batch`",
    "curriculum_learning": "set `data` and `batch`",
    "progressive_layer_drop": "put it into the model",
    "compression_training": "leave it out: it changes the weights beside the optimiser",
    "sparse_gradients": "leave it out: gradients are dense",
    "gradient_allreduce_op": "leave it out: gradients are summed, weighted by their counts",
    "managed_gradient_accumulation": "leave it out: it follows from `batch` and the number of processes",
    "elasticity": "leave it out: any number of processes gives the same run",
    "hybrid_engine": "leave it out: distdl drives the training engine",
    "tensor_parallel": "leave it out: distdl shares out data alone",
    "sequence_parallel_size": "leave it out: distdl shares out data alone",
    "data_parallel_size": "set launch.procs",
    "expert_parallel": "leave it out: distdl shares out data alone",
    "pipeline": "leave it out: distdl shares out data alone",
    "compile": "set hardware.compile",
    "zero_optimization.zenflow": "leave it out: it updates weights late, which is another computation",
    "zero_optimization.cpu_offload": "set hardware.offload",
    "zero_optimization.cpu_offload_param": "set hardware.offload",
    "zero_optimization.mics_shard_size": "leave it out: parts of a shard are not supported",
}
"""Keys that distdl has nothing to compare with, and what stands for them."""

_SAME = {"bfloat16": "bf16"}
"""DeepSpeed's second names for a section."""


def deepspeed_config(plan: Decided, recipe: Recipe) -> dict[str, Any]:
    """What `deepspeed.initialize` is given as `config`; the plan's engine must be one of zero0 to zero3.

    Weights and DeepSpeed's arithmetic stay fp32, so that a checkpoint fits every engine: bf16 and fp16 are
    distdl's own autocast. Raises PlanError for a key in `hardware.deepspeed` that contradicts.
    """
    given = {_SAME.get(key, key): value for key, value in recipe.hardware.deepspeed.items()}
    settled = _settled(plan, recipe)
    _refuse_contradictions(given, settled)
    config = _defaults(plan)
    _merge(config, copy.deepcopy(given))
    for dotted, derived in settled.items():
        _put(config, dotted, derived.value)
    _complete_batch(config, plan)
    return config


def _settled(plan: Decided, recipe: Recipe) -> dict[str, Settled]:
    """Dotted key -> what it must be."""
    stage = int(plan.engine.removeprefix("zero"))
    offload = recipe.hardware.offload
    where = {True: "cpu", False: "none"}
    precision = "set train.precision"
    found = {
        "train_batch_size": Settled(plan.global_batch, "set batch.global"),
        "train_micro_batch_size_per_gpu": Settled(plan.micro_batch, "set batch.micro"),
        "gradient_accumulation_steps": Settled(
            max(plan.shares), "set batch.global or batch.micro, or another number of processes"
        ),
        "gradient_clipping": Settled(recipe.optim.clip_norm or 0.0, "set optim.clip_norm"),
        "fp16.enabled": Settled(False, precision),
        "bf16.enabled": Settled(False, precision),
        "torch_autocast.enabled": Settled(False, precision),
        "communication_data_type": Settled("fp32", "leave it out: gradients are summed in fp32"),
        "data_types.grad_accum_dtype": Settled("fp32", "leave it out: gradients are summed in fp32"),
        "zero_allow_untested_optimizer": Settled(True, "leave it out: optimisers are torch's"),
        "zero_force_ds_cpu_optimizer": Settled(False, "leave it out: optimisers are torch's"),
        "zero_optimization.stage": Settled(stage, "set hardware.engine"),
        "zero_optimization.offload_optimizer.device": Settled(
            where[offload != "none"], "set hardware.offload"
        ),
        "zero_optimization.offload_param.device": Settled(
            where[offload == "parameters"], "set hardware.offload"
        ),
        "zero_optimization.offload_optimizer.ratio": Settled(1.0, "leave it out: all or nothing"),
    }
    full = "leave it out: weights and gradients travel in fp32"
    for key in ("weights", "nontrainable_weights", "gradients"):
        found[f"zero_optimization.zero_quantized_{key}"] = Settled(False, full)
    found["zero_optimization.zero_hpz_partition_size"] = Settled(1, "leave it out: it is not supported")
    return found


def _defaults(plan: Decided) -> dict[str, Any]:
    """What a user may override: it changes speed and memory alone."""
    cuda = plan.device == "cuda"
    return {
        "steps_per_print": None,
        "zero_optimization": {
            # A CPU has no streams that a copy could overlap on.
            "overlap_comm": cuda,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "sub_group_size": GROUP // plan.world_size,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_max_live_parameters": 2 * BUCKET,
            "stage3_max_reuse_distance": 0,
            "offload_optimizer": {"pin_memory": cuda},
            "offload_param": {"pin_memory": cuda},
        },
    }


def _refuse_contradictions(given: Mapping[str, Any], settled: Mapping[str, Settled]) -> None:
    for dotted, instead in _FOREIGN.items():
        value = _get(given, dotted)
        if value not in (_ABSENT, None, False):
            raise PlanError(
                f"hardware.deepspeed: {dotted} = {value!r} cannot be given: {instead}"
                + ("" if instead.startswith("leave") else " instead")
            )
    for section in sorted({d.rpartition(".")[0] for d in settled} - {""}):
        for prefix in _prefixes(section):
            value = _get(given, prefix)
            if value is not _ABSENT and not isinstance(value, Mapping):
                raise PlanError(
                    f"hardware.deepspeed: {prefix} is a section; {value!r} was given: write its keys below it"
                )
    for dotted, derived in settled.items():
        value = _get(given, dotted)
        if value is not _ABSENT and value != "auto" and not _equal(value, derived.value):
            raise PlanError(
                f"hardware.deepspeed: {dotted} = {value!r}, but the recipe and the plan make it "
                f"{derived.value!r}: {derived.instead}"
                + ("" if derived.instead.startswith("leave") else ", and leave this key out")
            )


def _complete_batch(config: dict[str, Any], plan: Decided) -> None:
    # DeepSpeed insists that every process runs equally many microbatches, of one size. Where they do not, its
    # total (which it only prints) is left for it to compute. The loop counts microbatches itself.
    if plan.micro_batch * max(plan.shares) * plan.world_size != plan.global_batch:
        del config["train_batch_size"]


_ABSENT = object()


def _equal(given: Any, derived: Any) -> bool:
    """8 is 8.0, but True is not 1."""
    return isinstance(given, bool) == isinstance(derived, bool) and bool(given == derived)


def _prefixes(dotted: str) -> Iterator[str]:
    parts = dotted.split(".")
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _get(tree: Mapping[str, Any], dotted: str) -> Any:
    found: Any = tree
    for part in dotted.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return _ABSENT
        found = found[part]
    return found


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value


def _merge(into: dict[str, Any], given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
