"""Whole runs without a launcher: ranks forked from a server that has imported everything already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distdl.comm import World
from distdl.recipe import Recipe, load_recipe, parse_recipe
from distdl.testing import run_world
from distdl.topology import Topology

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def shortened(
    name: str, data: Path, run: Path, model: dict[str, Any], /, **changes: dict[str, Any]
) -> Recipe:
    """A recipe of configs/ in exact mode, but for its size, its length, and a learning rate for few steps."""
    sections = load_recipe(CONFIGS / f"{name}.yaml").model_dump(mode="json", by_alias=True)
    sections["model"] |= model
    sections["data"] |= {"name": None, "path": str(data), "train_split": "train", "eval_split": "test"}
    sections["batch"] = {"global": 16, "micro": 4}
    sections["optim"] = {"name": "adamw", "lr": 0.003}
    sections["schedule"] = {"name": "constant"}
    sections["train"] = {"max_steps": 10, "seed": 3, "reduction": "exact"}
    sections["checkpoint"] = {"every_epochs": None}
    sections["eval"] |= {"every_epochs": None}
    sections["track"] = {"every_steps": 1}
    sections["hardware"] = {"threads": 1, "device": "cpu"}
    sections["run"] = {"dir": str(run)}
    for section, keys in changes.items():
        sections[section] |= keys
    return parse_recipe(sections)


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
