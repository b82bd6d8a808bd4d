"""DeepSpeed itself: imported, given the process group that exists, and kept quiet. In this file alone."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore

from distdl.engines.zero_build import own_builds
from distdl.errors import EngineError

_MISSING = (
    "engine {engine!r} needs DeepSpeed, which cannot be imported ({error}): "
    'pip install "distdl[deepspeed]", or choose hardware.engine=fsdp, which shards with torch alone'
)
_NOISE: list[tuple[str, type[Warning]]] = [
    # Of torch's own files, and of calls that DeepSpeed makes: a user can do nothing about either.
    (r"`torch\.jit\.script", DeprecationWarning),
    (r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning),
    # cuDNN wants an LSTM's weights in one piece. ZeRO's buffers order them otherwise, and flattening them
    # again would part them from the optimiser: cuDNN copies them in each fp32 forward. Under autocast it is
    # torch that copies them, with any engine.
    (r"RNN module weights are not part of single contiguous", UserWarning),
]
_ON_PURPOSE = (
    "ZeRO with an untested optimizer",
    "torch.autocast is enabled outside DeepSpeed",
    "OVERFLOW! Skipping step",
)
_SHARED_MEMORY = "deepspeed_shm_comm"


def load_deepspeed(engine: str, device: torch.device) -> Any:
    """The module `deepspeed`, for this device. Raises EngineError where it is missing or not fit for use."""
    # Read when it is imported: on a machine with GPUs it would take them for a run on CPUs, too.
    os.environ["DS_ACCELERATOR"] = device.type
    try:
        import deepspeed  # type: ignore[import-untyped]
    except ImportError as error:
        raise EngineError(_MISSING.format(engine=engine, error=error)) from error
    name = deepspeed.accelerator.get_accelerator().device_name()
    if name.split(":")[0] != device.type:
        raise EngineError(
            f"this process has set up DeepSpeed for {name!r} before and cannot change to {device.type!r}: "
            "start another process"
        )
    return deepspeed


def start(
    library: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    device: torch.device,
) -> Any:
    """Collective. DeepSpeed's engine over the process group that exists, or over this process alone."""
    _hush()
    _join_alone(device)
    _without_shared_memory(library)
    # Read at setup and later; not every launcher sets it.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    trainable = [p for p in model.parameters() if p.requires_grad]
    # DeepSpeed compiles an optimiser that is not used here as it imports it, which loads all of torch's
    # compiler: seconds of every start.
    with own_builds(), torch._dynamo.config.patch(disable=True):
        engine, *_ = library.initialize(
            model=model,
            model_parameters=trainable,
            optimizer=optimizer,
            config=config,
            dist_init_required=False,
        )
    return engine


def _hush() -> None:
    """What DeepSpeed says goes to stderr, as warnings do, without what distdl does on purpose."""
    for message, category in _NOISE:
        warnings.filterwarnings("ignore", message, category)
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_unexpected)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)


def _unexpected(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(part in text for part in _ON_PURPOSE)


def _join_alone(device: torch.device) -> None:
    """One process has no group, and DeepSpeed cannot do without."""
    if dist.is_initialized():
        return
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    # gloo listens on an interface even when it is alone: not on one that others can reach.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=0, world_size=1, store=HashStore())
    finally:
        if before is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = before


def _without_shared_memory(library: Any) -> None:
    """gloo reduces on CPUs, not DeepSpeed's own op through shared memory.

    That would be compiled at its first use (a minute, a compiler, a lock file that a killed build leaves
    behind), and it spins on a flag in shared memory: where a process dies, gloo tells the others. DeepSpeed
    takes it where `deepspeed.ops.__compatible_ops__` says so (seen in 0.19.8; the table may be edited).
    """
    table = getattr(library.ops, "__compatible_ops__", None)
    if not isinstance(table, dict):
        raise EngineError(
            f"DeepSpeed {library.__version__} has no deepspeed.ops.__compatible_ops__, which says what it "
            "compiles: install 0.19.8"
        )
    table[_SHARED_MEMORY] = False
