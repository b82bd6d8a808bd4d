"""Engines by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from distdl.comm import World
from distdl.engines.base import Applied, Engine
from distdl.engines.ddp import DdpEngine

if TYPE_CHECKING:
    from distdl.plan import Plan
    from distdl.recipe import Recipe

__all__ = ["Applied", "Engine", "build_engine"]

_ENGINES = {"ddp": DdpEngine}


def build_engine(plan: Plan, recipe: Recipe, world: World, device: torch.device) -> Engine:
    """The engine that the plan names, not yet set up."""
    return _ENGINES[plan.engine](plan, recipe.optim, world, device, recipe.hardware)
