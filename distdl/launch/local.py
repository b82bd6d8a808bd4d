"""`distdl launch`: the agent of one node, which may be the only one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from torch.distributed.elastic.agent.server.api import WorkerSpec, WorkerState

from distdl import errors
from distdl.launch.agent import RunAgent, StoppedWhileDown
from distdl.launch.joining import Ground, joined
from distdl.launch.peers import NodeLost, Peers, TooFew
from distdl.launch.rendezvous import Meeting
from distdl.launch.slurm.requeue import start_again_from_here
from distdl.launch.worker import WorkOrder, work
from distdl.plan import Plan
from distdl.recipe import Recipe
from distdl.record import RunDirectory
from distdl.train.stop import code_of_a_stop


def launch(
    recipe: Recipe,
    plan: Plan,
    directory: RunDirectory,
    ground: Ground,
    say: Callable[[str], None],
    *,
    allow_changed: bool,
) -> int:
    """Run this node's workers, together with the other nodes', until the run ends; returns its exit code.

    The caller has locked the run directory on node 0, and called `start_server`. Blocks. Raises LaunchError,
    naming the rank that failed and why, when the restart budget is spent, or the node that is lost.
    """
    procs = plan.world_size // plan.nodes
    try:
        with joined(ground, recipe, say) as (peers, address):
            return _run(recipe, procs, directory, peers, address, allow_changed)
    except NodeLost as lost:  # before the first attempt
        raise errors.LaunchError(f"node {lost.node} has gone again, before all were there") from lost


def _run(
    recipe: Recipe, procs: int, directory: RunDirectory, peers: Peers, address: str, allow_changed: bool
) -> int:
    meeting = Meeting(peers, address, uuid.uuid4().hex[:8], procs, lambda: directory.new_attempt().name)
    spec = WorkerSpec(
        role="distdl",
        local_world_size=procs,
        entrypoint=work,
        rdzv_handler=meeting,
        max_restarts=recipe.launch.max_restarts,
        monitor_interval=0.05,
    )
    agent = RunAgent(spec, meeting, directory, lambda attempt: WorkOrder(recipe, str(attempt), allow_changed))
    agent.install_handlers()
    directory.event("launch", procs=procs, node=peers.node, nodes=peers.nodes)
    try:
        result = agent.run()
    except StoppedWhileDown:
        return _stopped(agent, peers, directory)
    except NodeLost as lost:
        if agent.stop_signal is not None:  # it has left first
            return _stopped(agent, peers, directory)
        if lost.node == 0 and peers.node != 0:
            start_again_from_here(os.environ, directory, lambda: agent.stop_signal is not None)
        raise errors.LaunchError(
            f"{agent.note_loss(lost)['cause']}. The run has ended on every node; start it again on all of "
            "them, and it goes on from the last checkpoint"
        ) from lost
    except TooFew as few:
        raise errors.LaunchError(
            f"{few}; start the run again, and it goes on from the last checkpoint"
        ) from few
    if result.state is WorkerState.SUCCEEDED:
        return agent.code
    if agent.stop_signal is not None:
        return _stopped(agent, peers, directory)
    raise errors.LaunchError(_story(agent))


def _stopped(agent: RunAgent, peers: Peers, directory: RunDirectory) -> int:
    """The code of a run that was asked to stop and whose workers went down before they could agree."""
    code = code_of_a_stop(directory)
    name = agent.stop_signal and agent.stop_signal.name
    if name:
        peers.tell_stop(name)
    if peers.node == 0:
        directory.event("stop", signal=name, saved=code == errors.STOPPED)
    return code


def _story(agent: RunAgent) -> str:
    failure = agent.failure or {"step": "?", "cause": "unknown", "log": "", "log_tail": ""}
    story = failure.get("traceback") or failure["log_tail"]
    budget = agent.get_worker_group().spec.max_restarts
    return (
        f"{agent.blamed()} failed at step {failure['step']}: {failure['cause']}. "
        f"{budget} restarts without a step gained are spent (launch.max_restarts).\n"
        f"{story}\n"
        f"log: {failure['log']}\nall of it: {Path(agent.attempt) / 'failure.json'}"
    )
