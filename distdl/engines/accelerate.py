"""Hugging Face Accelerate, where its own configuration asks for DDP; for what else it may ask, the plan names
the engine (`distdl.capabilities.engine_of`).

Accelerate falls back in silence, so what it has become is held against what was asked for.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distdl.comm import World
from distdl.engines.ddp import DdpEngine
from distdl.errors import EngineError

if TYPE_CHECKING:
    from distdl.plan import Plan
    from distdl.recipe import Recipe


class AccelerateEngine(DdpEngine):
    """See `Engine`. Accelerate wraps the model; the rest is the recipe's, as in `DdpEngine`: arithmetic,
    accumulation, clipping, optimiser and schedule.

    Raises EngineError where Accelerate is missing, and where it has become something else.
    """

    def __init__(self, plan: Plan, recipe: Recipe, world: World, device: torch.device) -> None:
        unused = recipe.hardware.unused_parameters

        def wrap(model: nn.Module) -> nn.Module:
            with accelerator(world, device, plan.nodes, unused) as found:
                check_accelerator(found, world, device)
                with warnings.catch_warnings():
                    # Accelerate knows one name alone of a switch that newer torch calls otherwise.
                    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
                    wrapped: nn.Module = found.prepare_model(model, device_placement=False)
            return check_wrapped(wrapped, world)

        super().__init__(plan, recipe, world, device, wrap)


@contextmanager
def accelerator(world: World, device: torch.device, nodes: int, unused_parameters: bool) -> Iterator[Any]:
    """Collective. An `Accelerator` in the process group that is there; its state, which is one for a process,
    is gone afterwards.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState, is_initialized
    except ImportError as error:
        raise EngineError(
            'hardware.engine=accelerate needs the library: pip install "distdl[accelerate]" '
            f"({type(error).__name__}: {error})"
        ) from error
    theirs = is_initialized()  # by code of the user, who may go on using it
    options = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True, find_unused_parameters=unused_parameters, broadcast_buffers=False
    )
    try:
        with _environment(_places(world, device, nodes)):
            yield Accelerator(
                mixed_precision="no",
                cpu=device.type == "cpu",
                kwargs_handlers=[options],
                dynamo_backend="no",
            )
    finally:
        if not theirs:
            AcceleratorState._reset_state(reset_partial_state=True)


def check_accelerator(found: Any, world: World, device: torch.device) -> None:
    """Raises EngineError unless Accelerate is what the plan says: kind, number of processes, rank, device."""
    kind = "NO" if world.size == 1 else "MULTI_GPU" if device.type == "cuda" else "MULTI_CPU"
    wanted = {
        "distributed_type": kind,
        "num_processes": world.size,
        "process_index": world.rank,
        "device": device.type,
    }
    real = {
        "distributed_type": found.distributed_type.value,
        "num_processes": found.num_processes,
        "process_index": found.process_index,
        "device": found.device.type,
    }
    if real != wanted:
        differ = ", ".join(f"{k} = {real[k]} instead of {v}" for k, v in wanted.items() if real[k] != v)
        raise EngineError(
            f"Accelerate is not what the plan says: {differ}. Look at `accelerate env` and at the variables "
            "ACCELERATE_*, start with `distdl launch` or torchrun, or use hardware.engine=ddp"
        )


def check_wrapped(wrapped: nn.Module, world: World) -> nn.Module:
    """Raises EngineError unless several ranks have DistributedDataParallel, and one rank has none."""
    if (world.size > 1) != isinstance(wrapped, DistributedDataParallel):
        raise EngineError(
            f"Accelerate has made a {type(wrapped).__name__} of the model for {world.size} processes: "
            "expected DistributedDataParallel for several, the model alone for one. Use hardware.engine=ddp"
        )
    return wrapped


def _places(world: World, device: torch.device, nodes: int) -> dict[str, str | None]:
    """What Accelerate reads of this process's place. None: unset, or it forms a group for one rank."""
    if world.size == 1:
        return dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    local_size = max(1, world.size // nodes)
    local_rank = device.index if device.index is not None else world.rank % local_size
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        # Without them it would set the number of threads itself, and want an address for a group of its own.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads())),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
    }


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """The process's environment with `changes`, as long as the block runs."""
    before = dict(os.environ)
    try:
        for name, value in changes.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
