"""torch's elastic agent with distdl's manners: see `RunAgent`."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from distdl import errors
from distdl.launch.failure import Casualty, find_failure, first_failure, lost_node, write_failure
from distdl.launch.peers import End, NodeLost
from distdl.launch.rendezvous import Meeting
from distdl.launch.server import requests_held
from distdl.launch.worker import WorkOrder
from distdl.record import Heartbeat, RunDirectory
from distdl.train.stop import REQUESTS

logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
logging.getLogger("torch.multiprocessing").setLevel(logging.CRITICAL)


_STOPPING = "\n{}: stopping at the next step boundary, all ranks together (Ctrl-C twice ends at once)\n"


class StoppedWhileDown(Exception):
    """A stop was asked for and the workers are down: there is nothing to restart."""


class WorkerLogs(LogsSpecs):
    """Workers redirect their own output (launch/logs.py); the agent needs a place for its error files."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        super().__init__()
        self._folder = folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        none = dict.fromkeys(envs, "")
        errors = {i: str(self._folder() / f".elastic-error-{env['RANK']}.json") for i, env in envs.items()}
        return LogsDest(dict(none), dict(none), dict(none), dict(none), errors)

    @property
    def root_log_dir(self) -> str:
        return str(self._folder())


class RunAgent(LocalElasticAgent):
    """One node's agent: restarts workers with a budget, forwards requests to stop, and leaves nobody behind.

    Where it differs from its parent: each attempt has a folder; survivors of a crash are ended at once with
    SIGKILL, so that SIGTERM only ever means a request to stop; a step gained beyond all earlier attempts
    refills the restart budget; signals are held back while workers are being started and are then passed on,
    so that none is lost. With several nodes, all agents hear how an attempt ended on each of them and draw
    the same conclusions; node 0 writes them down. In an elastic crew a lost node is such an end, and one that
    comes has the attempt end at a step boundary, so that the next begins with it.
    """

    def __init__(
        self, spec: WorkerSpec, meeting: Meeting, directory: RunDirectory, order: Callable[[Path], WorkOrder]
    ) -> None:
        super().__init__(spec, WorkerLogs(lambda: self.attempt), start_method="forkserver")
        self._meeting = meeting
        self._peers = meeting.peers
        meeting.meanwhile = self._stop_while_down
        meeting.progress = lambda: (self._remaining_restarts, self._furthest)
        self._directory = directory
        self._order = order
        self._furthest = 0
        self._interrupts = 0
        self._ended = False
        self._growing = False
        self._finished: RunResult | None = None
        self.attempt = directory.path
        self.stop_signal: signal.Signals | None = None
        self.casualties: list[Casualty] = []
        self.failure: dict[str, Any] | None = None
        self.code = 0

    def install_handlers(self) -> None:
        """Take over the signals that ask for a stop. A second Ctrl-C ends everything at once."""
        for number in REQUESTS:
            signal.signal(number, self._on_request)

    def _on_request(self, number: int, _frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._kill_workers()
            os._exit(130)
        self._stop(signal.Signals(number))

    def _stop(self, number: signal.Signals) -> None:
        if self.stop_signal is None:
            self.stop_signal = number
            with contextlib.suppress(OSError):  # the terminal may be what has gone
                os.write(
                    1, _STOPPING.format(self.stop_signal.name).encode()
                )  # print may not run in a handler
        self._pass_on(number)

    def _pass_on(self, number: signal.Signals) -> None:
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _pids(self) -> list[int]:
        if self._pcontext is None:
            return []
        processes = self._pcontext._pc.processes if self._pcontext._pc else []  # type: ignore[attr-defined]
        return [p.pid for p in processes if p.is_alive()]

    def _kill_workers(self) -> None:
        self._pass_on(signal.SIGKILL)

    def _share_stop(self) -> None:
        """Tell the other nodes of a request to stop, and heed theirs."""
        if self.stop_signal is not None:
            self._peers.tell_stop(self.stop_signal.name)
        elif self._peers.stop is not None:
            self._stop(signal.Signals[self._peers.stop])

    def _stop_while_down(self) -> None:
        self._share_stop()
        if self.stop_signal is not None:
            raise StoppedWhileDown

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._stop_while_down()  # before an attempt gets its folder
        super()._rendezvous(worker_group)

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Ranks in the order of nodes. The parent asks the store, and would wait there for a lost node."""
        members, mine = self._peers.round.members, self._peers.round.ranks_of(self._peers.node)
        world = sum(member.procs for member in members)
        return [Worker(i, rank, rank, world, world) for i, rank in enumerate(mine)]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with requests_held():
            agreed = self._peers.round
            self.attempt = self._directory.attempts / agreed.attempt
            (self.attempt / "logs").mkdir(parents=True, exist_ok=True)
            self._ended, self._growing, self._finished = False, False, None
            # What a node that has just come cannot know.
            self._remaining_restarts, self._furthest = agreed.restarts_left, agreed.furthest
            if self._peers.crew.elastic and self._peers.node == 0:
                members = [member.node for member in agreed.members]
                self._directory.event("nodes", nodes=members, attempt=agreed.attempt)
            worker_group.spec.args = (self._order(self.attempt),)
            started: dict[int, Any] = super()._start_workers(worker_group)
            self.install_handlers()  # the parent class may have installed others
            self._peers.say_started()
        if self.stop_signal is not None:
            self._pass_on(self.stop_signal)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ends = self._peers.ends()
        if ends is None:
            self._share_stop()
            self._let_newcomers_in()
            if not self._ended:
                self._watch(worker_group)
            ends = self._peers.ends()
        return RunResult(WorkerState.HEALTHY) if ends is None else self._conclude(ends)

    def _let_newcomers_in(self) -> None:
        """Node 0: have the workers save at a step boundary and leave, as for a stop that is none."""
        if self._growing or self._ended or self._peers.node != 0 or self.stop_signal is not None:
            return
        if newcomers := self._peers.newcomers():
            self._growing = True
            self._peers.tell_grow()
            names = f"node{'s' * (len(newcomers) > 1)} {', '.join(map(str, newcomers))}"
            self._tell(f"{names} came: saving at the next step boundary, to go on together")
            self._pass_on(signal.SIGUSR1)

    def _watch(self, worker_group: WorkerGroup) -> None:
        """Once the attempt has ended on this node, say how."""
        self.casualties = self._find_casualties()
        if not self.casualties and not self._peers.failed:
            result: RunResult = super()._monitor_workers(worker_group)
            if result.state is WorkerState.SUCCEEDED:
                self._finished = result
                self._say_end(code=max(result.return_values.values(), default=0))
            elif result.state is not WorkerState.HEALTHY:  # it has noticed before us, and ended the others
                failed = result.failures.items()
                self.casualties = [Casualty(rank, f.pid, f.exitcode) for rank, f in failed]
        if self.casualties or (self._peers.failed and not self._ended):
            self._kill_workers()
            found = self.casualties and find_failure(self.attempt, self.casualties, self._peers.node)
            self._say_end(failure=found or None)

    def _say_end(self, code: int | None = None, failure: dict[str, Any] | None = None) -> None:
        self._ended = True
        step, phase, _ = Heartbeat.read(self.attempt / "heartbeat")
        stopping = self.stop_signal is not None
        self._peers.say_end(End(self._peers.round.number, code, failure, stopping, step, phase))

    def _find_casualties(self) -> list[Casualty]:
        processes = self._pcontext._pc.processes if self._pcontext and self._pcontext._pc else []  # type: ignore[attr-defined]
        ranks = [worker.global_rank for worker in self._worker_group.workers]
        return [Casualty(r, p.pid, p.exitcode) for r, p in zip(ranks, processes, strict=False) if p.exitcode]

    def _conclude(self, ends: list[End]) -> RunResult:
        """The same on every node: all are done, or all start again or give up."""
        failures = [end.failure for end in ends if end.failure is not None]
        code = max(end.code or 0 for end in ends)
        stopping = any(end.stopping for end in ends)
        if not failures and self._peers.growing and code in errors.STOPS and not stopping:
            self.failure = None
            self._remaining_restarts += 1  # the parent class takes one, and nothing has failed
            return RunResult(WorkerState.FAILED)
        if not failures:
            assert self._finished is not None
            self.code = code
            return self._finished
        step = ends[0].step
        self.failure = first_failure(failures, step, ends[0].phase)
        gained, self._furthest = step > self._furthest, max(step, self._furthest)
        if gained:
            self._remaining_restarts = self._worker_group.spec.max_restarts
        if stopping and self.stop_signal is None:
            self.stop_signal = signal.SIGTERM
        if self._peers.node == 0:
            self._write_down(self.failure)
        return RunResult(WorkerState.FAILED)

    def _write_down(self, failure: dict[str, Any]) -> None:
        write_failure(self.attempt, failure)
        facts = {k: failure[k] for k in ("rank", "node", "cause", "step", "phase")}
        left = self._remaining_restarts
        self._directory.event("rank_failed", **facts, attempt=self.attempt.name, restarts_left=left)

    def note_loss(self, lost: NodeLost) -> dict[str, Any]:
        """Write down that a node is lost; returns what `failure.json` has."""
        step, phase, _ = Heartbeat.read(self.attempt / "heartbeat")
        ranks = self._peers.round.ranks_of(lost.node)
        self.failure = first_failure([lost_node(lost.node, lost.host, ranks)], step, phase)
        if self._peers.node == 0:
            if self._peers.round.number:
                write_failure(self.attempt, self.failure)
            self._directory.event("node_lost", node=lost.node, lost_host=lost.host, step=step)
        return self.failure

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self._stop_while_down()
        self._stop_workers(worker_group)  # whoever reads of a restart finds nobody of the attempt before
        if self._peers.node == 0 and self.failure is not None:
            self._tell(f"{self.blamed()} {self.failure['cause']}; restarting from the last checkpoint")
            self._directory.event("restart", after=self.attempt.name)
        super()._restart_workers(worker_group)

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError):  # whoever read along may have gone away
            print(text, flush=True)  # noqa: T201

    def blamed(self) -> str:
        """The rank that failed, as messages begin; with its node where there are several."""
        failure = self.failure or {"rank": "?", "node": 0, "host": "?"}
        if failure["rank"] is None:
            return f"[node {failure['node']}]"
        where = f" on node {failure['node']} ({failure['host']})" if self._peers.nodes > 1 else ""
        return f"[rank {failure['rank']}{where}]"

    def _exit_barrier(self) -> None:
        """All agents know already that all are done."""

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(signal.SIGKILL)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        super()._shutdown(signal.SIGKILL, timeout)
