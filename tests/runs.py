"""Whole runs without a launcher: ranks forked from a server that has imported everything already."""

from __future__ import annotations

import os
from pathlib import Path

from distdl.comm import World
from distdl.recipe import Recipe, load_recipe
from distdl.testing import run_world
from distdl.topology import Topology


def topology_of(world: World) -> Topology:
    """The place of a rank in a world that exists already."""
    return Topology(
        rank=world.rank,
        world_size=world.size,
        local_rank=world.rank,
        local_world_size=world.size,
        launcher="torchrun",
        master_addr="127.0.0.1",
        master_port=1,
        cpus=1,
    )


def train_rank(world: World, recipe: Recipe, allow_changed: bool = False) -> int:
    """One rank of a whole run, the last thing its world does: the run leaves the process group at its end."""
    import torch.distributed as dist

    from distdl.train.process import Options, train_process

    assert world.size == 1 or dist.is_initialized(), "the run before has left the process group"
    return train_process(recipe, topology_of(world), Options(allow_changed=allow_changed))


def train_here(recipe: Path, size: int = 2, *overrides: str, allow_changed: bool = False) -> None:
    """Train to the end, or go on, as `distdl launch RECIPE --procs SIZE` does, several seconds faster."""
    loaded = load_recipe(recipe, list(overrides))
    codes = run_world(train_rank, size, loaded, allow_changed, deadline_s=600, env=dict(os.environ))
    assert codes == [0] * size
