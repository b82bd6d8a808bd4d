"""The fork server that workers come from: warm, so that a new attempt starts in a fraction of a second.

Imports no torch, so that the server's imports and the launcher's own go on side by side.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker

from distdl.plan import Plan
from distdl.record import RunDirectory
from distdl.train.stop import REQUESTS, code_of_a_stop


def start_server(plan: Plan, directory: RunDirectory, interface: str | None = "lo") -> None:
    """Set what workers inherit and start the fork server; returns at once, while it imports.

    The environment is set first, since libraries read it when they are loaded. gloo and nccl talk over
    `interface` unless the user chose one; None leaves that to them.
    """
    os.environ["DISTDL_LAUNCHER_PID"] = str(os.getpid())
    os.environ["OMP_NUM_THREADS"] = str(plan.threads)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    # The elastic agent would install handlers that raise, between ours and the first worker.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""
    multiprocessing.set_forkserver_preload(["distdl.launch.preload"])
    # Until the agent's handlers stand: a run that has something saved is to be started again.
    code = code_of_a_stop(directory)
    for number in REQUESTS:
        signal.signal(number, lambda *_: os._exit(code))
    with requests_held():
        forkserver.ensure_running()


@contextmanager
def requests_held() -> Iterator[None]:
    """Hold back requests to stop in this thread, and in every process that is started meanwhile.

    Workers, and the fork server they come from, are so born with these signals blocked, and let them in once
    their handlers stand; none is lost and none kills. (The launcher may still get one: it has threads.)
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    # Starting the resource tracker unblocks SIGINT and SIGTERM again; so it is started before the rest.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)
