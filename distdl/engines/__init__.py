"""Engines by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import torch

from distdl.comm import World
from distdl.engines.base import Applied, Engine, Forward, Group, Pass, microstep

if TYPE_CHECKING:
    from distdl.plan import Plan
    from distdl.recipe import Recipe

__all__ = ["Applied", "Engine", "Forward", "Group", "Pass", "build_engine", "microstep"]

_ENGINES = {
    "ddp": "distdl.engines.ddp:DdpEngine",
    "fsdp": "distdl.engines.fsdp:FsdpEngine",
    "zero0": "distdl.engines.zero:ZeroEngine",
    "zero1": "distdl.engines.zero:ZeroEngine",
    "zero2": "distdl.engines.zero:ZeroEngine",
    "zero3": "distdl.engines.zero:ZeroEngine",
    "accelerate": "distdl.engines.accelerate:AccelerateEngine",
}
"""Imported when it is chosen: DeepSpeed and Accelerate are optional, and slow to import."""


def build_engine(plan: Plan, recipe: Recipe, world: World, device: torch.device) -> Engine:
    """The engine that the plan names, not yet set up. Raises EngineError where its library is missing."""
    module, attribute = _ENGINES[plan.engine].split(":")
    engine: Engine = getattr(import_module(module), attribute)(plan, recipe, world, device)
    return engine
