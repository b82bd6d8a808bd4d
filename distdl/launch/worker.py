"""The process of one rank, as `distdl launch` starts it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from distdl.launch.logs import redirect
from distdl.lifeline import die_with_parent
from distdl.recipe import Recipe
from distdl.topology import Topology
from distdl.train.process import Options, train_process


@dataclass(frozen=True)
class WorkOrder:
    """What the launcher tells a worker: the run, and the folder of this attempt."""

    recipe: Recipe
    attempt: str
    allow_changed: bool


def work(order: WorkOrder) -> int:
    """Entry point of a worker; returns the run's exit code. A crash ends the process with code 70 instead."""
    die_with_parent()
    topology = Topology.from_env(os.environ)
    log = Path(order.attempt) / "logs" / f"rank-{topology.rank:05d}.log"
    terminal = redirect(log, to_terminal=topology.rank == 0)
    options = Options(
        allow_changed=order.allow_changed, attempt=Path(order.attempt), locked=True, terminal=terminal
    )
    return train_process(order.recipe, topology, options)
