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

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from distdl.launch.failure import Casualty, write_failure
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
    """Restarts workers with a budget, forwards requests to stop, and leaves nobody behind.

    Where it differs from its parent: each attempt has a folder; survivors of a crash are ended at once with
    SIGKILL, so that SIGTERM only ever means a request to stop; a step gained beyond all earlier attempts
    refills the restart budget; signals are held back while workers are being started and are then passed on,
    so that none is lost. Of several nodes each has an agent; they meet anew for every attempt.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        meeting: Meeting,
        directory: RunDirectory,
        order: Callable[[Path], WorkOrder],
    ) -> None:
        super().__init__(spec, WorkerLogs(lambda: self.attempt), start_method="forkserver")
        self._meeting = meeting
        self._directory = directory
        self._order = order
        self._furthest = 0
        self._interrupts = 0
        self.attempt = directory.path
        self.stop_signal: signal.Signals | None = None
        self.casualties: list[Casualty] = []
        self.failure: dict[str, Any] | None = None

    def install_handlers(self) -> None:
        """Take over the signals that ask for a stop. A second Ctrl-C ends everything at once."""
        for number in REQUESTS:
            signal.signal(number, self._on_request)

    def _on_request(self, number: int, _frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._kill_workers()
            os._exit(130)
        if self.stop_signal is None:
            self.stop_signal = signal.Signals(number)
            with contextlib.suppress(OSError):  # the terminal may be what has gone
                os.write(
                    1, _STOPPING.format(self.stop_signal.name).encode()
                )  # print may not run in a handler
        self._pass_on(signal.Signals(number))

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

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self.stop_signal is not None:
            raise StoppedWhileDown
        with requests_held():
            self.attempt = Path(self._meeting.from_first(lambda: str(self._directory.new_attempt())))
            worker_group.spec.args = (self._order(self.attempt),)
            started: dict[int, Any] = super()._start_workers(worker_group)
            self.install_handlers()  # the parent class may have installed others
        self._pass_on_what_came()
        return started

    def _pass_on_what_came(self) -> None:
        if self.stop_signal is not None:
            self._pass_on(self.stop_signal)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self.casualties = self._find_casualties()
        if self.casualties:
            self._kill_workers()
            self._note_failure()
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _find_casualties(self) -> list[Casualty]:
        processes = self._pcontext._pc.processes if self._pcontext and self._pcontext._pc else []  # type: ignore[attr-defined]
        workers = self._worker_group.workers
        return [
            Casualty(w.global_rank, p.pid, p.exitcode)
            for w, p in zip(workers, processes, strict=False)
            if p.exitcode
        ]

    def _note_failure(self) -> None:
        self.failure = write_failure(self.attempt, self.casualties)
        step, _, _ = Heartbeat.read(self.attempt / "heartbeat")
        gained, self._furthest = step > self._furthest, max(step, self._furthest)
        if gained:
            self._remaining_restarts = self._worker_group.spec.max_restarts
        facts = {k: self.failure[k] for k in ("rank", "cause", "step", "phase")}
        left = self._remaining_restarts
        self._directory.event("rank_failed", **facts, attempt=self.attempt.name, restarts_left=left)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if self.stop_signal is not None:
            raise StoppedWhileDown
        failure = self.failure or {"rank": "?", "cause": "workers of another node failed"}
        text = f"[rank {failure['rank']}] {failure['cause']}; restarting from the last checkpoint"
        with contextlib.suppress(OSError):  # whoever read along may have gone away
            print(text, flush=True)  # noqa: T201
        self._directory.event("restart", after=self.attempt.name)
        super()._restart_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(signal.SIGKILL)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        super()._shutdown(signal.SIGKILL, timeout)
