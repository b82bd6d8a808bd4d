"""`distdl launch` on one machine."""

from __future__ import annotations

import uuid
from pathlib import Path

from torch.distributed.elastic.agent.server.api import WorkerSpec, WorkerState

from distdl import errors
from distdl.launch.agent import RunAgent, StoppedWhileDown
from distdl.launch.rendezvous import LoopbackRendezvous
from distdl.launch.worker import WorkOrder, work
from distdl.plan import Plan
from distdl.recipe import Recipe
from distdl.record import RunDirectory
from distdl.train.stop import code_of_a_stop


def launch(recipe: Recipe, plan: Plan, directory: RunDirectory, *, allow_changed: bool) -> int:
    """Run `plan.world_size` workers on this machine until the run ends; returns its exit code.

    The caller has locked the run directory and called `start_server`. Blocks. Raises LaunchError, naming the
    rank that failed and why, when the restart budget is spent.
    """
    spec = WorkerSpec(
        role="distdl",
        local_world_size=plan.world_size,
        entrypoint=work,
        rdzv_handler=LoopbackRendezvous(uuid.uuid4().hex[:8]),
        max_restarts=recipe.launch.max_restarts,
        monitor_interval=0.05,
    )
    agent = RunAgent(spec, directory, lambda attempt: WorkOrder(recipe, str(attempt), allow_changed))
    agent.install_handlers()
    directory.event("launch", procs=plan.world_size)
    try:
        result = agent.run()
    except StoppedWhileDown:
        return _stopped(agent, directory)
    if result.state is WorkerState.SUCCEEDED:
        codes = list(result.return_values.values())
        return max(codes) if codes else errors.DONE
    if agent.stop_signal is not None:
        return _stopped(agent, directory)
    raise errors.LaunchError(_story(agent))


def _stopped(agent: RunAgent, directory: RunDirectory) -> int:
    """The code of a run that was asked to stop and whose workers went down before they could agree."""
    code = code_of_a_stop(directory)
    directory.event("stop", signal=agent.stop_signal and agent.stop_signal.name, saved=code == errors.STOPPED)
    return code


def _story(agent: RunAgent) -> str:
    failure = agent.failure or {"rank": "?", "cause": "unknown", "step": "?", "log": "", "log_tail": ""}
    story = failure.get("traceback") or failure["log_tail"]
    budget = agent.get_worker_group().spec.max_restarts
    return (
        f"[rank {failure['rank']}] failed at step {failure['step']}: {failure['cause']}. "
        f"{budget} restarts without a step gained are spent (launch.max_restarts).\n"
        f"{story}\n"
        f"log: {failure['log']}\nall of it: {Path(agent.attempt) / 'failure.json'}"
    )
