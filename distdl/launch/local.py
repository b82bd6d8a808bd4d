"""`distdl launch` on this machine: alone, or as the launcher of one node among several."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState

from distdl import errors
from distdl.launch.agent import RunAgent, StoppedWhileDown
from distdl.launch.rendezvous import LoopbackRendezvous, Meeting, NodesRendezvous
from distdl.launch.worker import WorkOrder, work
from distdl.plan import Plan
from distdl.recipe import Recipe
from distdl.record import RunDirectory
from distdl.topology import Agents
from distdl.train.stop import code_of_a_stop


def launch(
    recipe: Recipe, plan: Plan, agents: Agents, directory: RunDirectory, *, allow_changed: bool
) -> int:
    """Run this node's workers until the run ends; returns its exit code. Every node's launcher calls it.

    The caller has locked the run directory, on node 0, and called `start_server`. Blocks. Raises LaunchError,
    naming the rank that failed and why, when the restart budget is spent.
    """
    meeting = _meet(agents, recipe.launch.timeout_s)
    spec = WorkerSpec(
        role="distdl",
        local_world_size=plan.world_size // plan.nodes,
        entrypoint=work,
        rdzv_handler=meeting,
        max_restarts=recipe.launch.max_restarts,
        monitor_interval=0.05,
    )
    agent = RunAgent(spec, meeting, directory, lambda attempt: WorkOrder(recipe, str(attempt), allow_changed))
    agent.install_handlers()
    directory.event("launch", procs=plan.world_size, node=agents.node)
    why = "gave up"
    try:
        code = _run(agent, directory)
        why = f"has ended with {code}"
        return code
    finally:
        with contextlib.suppress(DistError):  # node 0 has left before
            meeting.leave(why)


def _meet(agents: Agents, timeout_s: float) -> Meeting:
    run_id = uuid.uuid4().hex[:8]
    return LoopbackRendezvous(run_id) if agents.nodes == 1 else NodesRendezvous(run_id, agents, timeout_s)


def _run(agent: RunAgent, directory: RunDirectory) -> int:
    try:
        result: RunResult = agent.run()
    except StoppedWhileDown:
        return _stopped(agent, directory)
    except (DistError, errors.LaunchError) as error:
        if agent.stop_signal is not None:
            return _stopped(agent, directory)
        raise errors.LaunchError(f"lost the launchers of the other nodes: {error}") from error
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
