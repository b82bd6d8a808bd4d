"""`run_world`: a function on several ranks, in real processes, in a fraction of a second."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOAD = ["distdl.testing.preload"]


class WorldFailed(AssertionError):
    """One or more ranks raised, died or missed the deadline; the message has every rank's story."""


def run_world(
    fn: Callable[..., Any],
    size: int,
    *args: Any,
    deadline_s: float = 300.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call ``fn(world, *args)`` on `size` ranks and return their results in rank order.

    Ranks are forked from a server that has imported torch once, meet through a file, use gloo on loopback
    and one thread each. `fn` must be importable by name; results must pickle. Raises WorldFailed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="distdl-world-") as folder:
        store = str(Path(folder) / "store")
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = []
        for rank, (_, sender) in enumerate(pipes):
            process = context.Process(
                target=_rank_main, args=(rank, size, store, sender, env or {}, fn, args), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
        try:
            outcomes = _collect([receiver for receiver, _ in pipes], deadline_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
    failed = {rank: text for rank, (ok, text) in enumerate(outcomes) if not ok}
    if failed:
        stories = "\n".join(f"--- rank {rank} of {size} ---\n{text}" for rank, text in failed.items())
        raise WorldFailed(f"{len(failed)} of {size} ranks failed\n{stories}")
    return [value for _, value in outcomes]


def _collect(receivers: list[Connection], deadline_s: float) -> list[tuple[bool, Any]]:
    outcomes: list[tuple[bool, Any]] = [(False, f"no answer within {deadline_s} s")] * len(receivers)
    waiting: dict[Any, int] = {receiver: rank for rank, receiver in enumerate(receivers)}
    end = time.monotonic() + deadline_s
    while waiting and (left := end - time.monotonic()) > 0:
        for ready in multiprocessing.connection.wait(list(waiting), left):
            rank = waiting.pop(ready)
            try:
                outcomes[rank] = pickle.loads(receivers[rank].recv_bytes())  # noqa: S301 - our own process
            except EOFError:
                outcomes[rank] = (False, "the process died without a word (killed?)")
    return outcomes


def _rank_main(
    rank: int,
    size: int,
    store: str,
    sender: Connection,
    env: dict[str, str],
    fn: Callable[..., Any],
    args: Any,
) -> None:
    import torch
    from torch._C._distributed_c10d import FileStore

    from distdl.comm.world import join, leave
    from distdl.lifeline import die_with_parent
    from distdl.testing import faults

    die_with_parent()
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo", **env})
    torch.set_num_threads(1)
    faults.arm_from_environment(rank)
    try:
        world = join(rank, size, "cpu", 60.0, FileStore(store, size) if size > 1 else None)
        # Plain pickle: multiprocessing's would leave a tensor in shared memory that ends with this process.
        result = pickle.dumps((True, fn(world, *args)))
        leave()
    except BaseException:
        result = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(result)
    sender.close()
