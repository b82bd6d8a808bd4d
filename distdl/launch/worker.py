"""The process of one rank, as `distdl launch` starts it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from distdl.launch.logs import redirect
from distdl.lifeline import die_with_parent
from distdl.recipe import Recipe
from distdl.topology import Topology


@dataclass(frozen=True)
class WorkOrder:
    """What the launcher tells a worker: the run, and the folder of this attempt."""

    recipe: Recipe
    attempt: str
    allow_changed: bool


def work(order: WorkOrder) -> int:
    """Entry point of a worker; returns the run's exit code. A crash ends the process with code 70 instead."""
    # Not above: the launcher, which names this function, would import it all too.
    from distdl.train.process import Options, train_process

    die_with_parent()
    rank = int(os.environ["RANK"])  # the agent's; whatever else is wrong is told in the log
    log = Path(order.attempt) / "logs" / f"rank-{rank:05d}.log"
    terminal = redirect(log, to_terminal=rank == 0)
    topology = Topology.from_env(os.environ)
    options = Options(
        allow_changed=order.allow_changed, attempt=Path(order.attempt), locked=True, terminal=terminal
    )
    return train_process(order.recipe, topology, options)
