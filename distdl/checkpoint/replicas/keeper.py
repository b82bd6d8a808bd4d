"""`Replicas`: each rank's file of a save, in the memory of its own node and in that of the next one.

The snapshot that a save takes anyway is taken straight into a file in memory, and is sent from there while
training goes on. Two generations take turns in the same memory: one is a checkpoint while the other is being
written. The manifest makes it one, on each node, when the checkpoint it is a copy of has been committed.

Copies are worth having, but no run fails over them: where memory is short or a transfer fails, all ranks say
so once and go on without.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distdl.checkpoint.manifest import MANIFEST, step_name
from distdl.checkpoint.replicas.home import Home, mark_of, put, sweep
from distdl.checkpoint.replicas.mapped import Mapped
from distdl.checkpoint.replicas.nodes import Nodes
from distdl.checkpoint.replicas.room import free_memory
from distdl.comm.world import Json, World
from distdl.testing import faults

REPLICA_POINTS = (
    "replica.sent",  # begun, on every rank
    "replica.received",  # on every rank, all of them
    "replica.manifest_written",  # the lowest rank of each node; the copies of the save before are there yet
)


@dataclass
class _Generation:
    """The files of one save that this rank has mapped: its own, and those it keeps for others, by rank."""

    name: str
    files: dict[int, Mapped]
    transfer: _Transfer | None = None


class _Transfer:
    """Waits for messages that are under way, in a thread: that is no collective, and they move without it.

    `problem`: what went wrong before they were all posted.
    """

    def __init__(self, works: Sequence[Any], problem: str | None) -> None:
        self._works = works
        self._problem = problem
        # Not one that the interpreter waits for at its end, when another rank may be gone.
        self._thread = threading.Thread(target=self._wait, name="distdl-replica", daemon=True)
        self._started = attempt(self._thread.start)[1] is None

    def _wait(self) -> None:
        for work in self._works:
            problem = attempt(work.wait)[1]
            self._problem = self._problem or problem

    def done(self) -> bool:
        return self._started and not self._thread.is_alive()

    def result(self) -> str | None:
        """Blocks until all have arrived or failed; what went wrong."""
        if self._started:
            self._thread.join()
        else:
            self._wait()
        return self._problem


@dataclass
class Replicas:
    """One rank's part. Made by `open_replicas`; `begin`, `send` and `commit` belong to one save each."""

    world: World
    home: Home
    nodes: Nodes
    group: Any
    """Of all ranks, over gloo, for these messages alone: training's never wait behind them."""
    say: Callable[[str], None]
    on: bool = True
    _last: _Generation | None = None
    _next: _Generation | None = None
    _spare: dict[int, Mapped] = field(default_factory=dict)

    @property
    def node(self) -> int:
        """Of this rank."""
        return self.nodes.of(self.world.rank)

    @property
    def leads(self) -> bool:
        """Whether this rank does what is done once a node."""
        return self.nodes.leads(self.world.rank)

    # --- a save ---

    def begin(self, step: int, file: str, nbytes: int) -> Tensor | None:
        """Collective. Memory for this rank's file of a save: [nbytes] of uint8; None where there is none.

        On CUDA it is registered, so that a GPU writes into it as into pinned memory. What became of a save
        that was begun before and not committed does not matter any more.
        """
        if not self.on:
            return None
        self._take_back(self._next)
        self._next = None
        sizes = {str(rank): spare.nbytes for rank, spare in self._spare.items()}
        free, problem = attempt(lambda: free_memory(self.home.path))
        told = self.world.gather([file, nbytes, sizes, free, secrets.token_hex(4)])
        if problem is None:
            problem = self._lacking(told)
        if problem is None:
            made, problem = attempt(lambda: self._prepare(f"{step_name(step)}-{told[0][4]}", told))
        if self.failed(problem) or made is None:
            return None
        mine: Mapped = made.files[self.world.rank]
        if torch.cuda.is_initialized():
            mine.register()
        return mine.tensor

    def _lacking(self, told: Sequence[Json]) -> str | None:
        """What is wrong where this node's memory is too small. `told`: what each rank said in `begin`."""
        needed = 0
        for rank in self.nodes.members[self.node]:
            for kept in [rank, *self.nodes.kept_by(rank)]:
                needed += told[kept][1] if told[rank][2].get(str(kept)) != told[kept][1] else 0
        free = min(told[rank][3] or 0 for rank in self.nodes.members[self.node])
        if needed <= free:
            return None
        return f"copies need {needed:,} bytes of memory, {free:,} can be taken, in {self.home.path}"

    def _prepare(self, name: str, told: Sequence[Json]) -> _Generation:
        folder = self.home.path / name
        folder.mkdir(mode=0o700, exist_ok=True)
        # Kept from here on: what fails half way is removed with it.
        self._next = made = _Generation(name, {})
        for rank in [self.world.rank, *self.nodes.kept_by(self.world.rank)]:
            file, nbytes = told[rank][:2]
            spare = self._spare.get(rank)
            if spare is not None and spare.nbytes == nbytes:
                spare.move(folder / file)
                made.files[rank] = self._spare.pop(rank)
                continue
            if spare is not None:
                self._spare.pop(rank).remove()
            made.files[rank] = Mapped.create(folder / file, nbytes)
        return made

    def send(self) -> None:
        """Collective, without waiting. The file is complete: copies of it are under way from here on."""
        made, rank = self._next, self.world.rank
        if made is None:
            return
        keeper, works = self.nodes.keeper(rank), []

        def post() -> None:
            for other in self.nodes.kept_by(rank):  # one by one: those posted are waited for if one fails
                work = dist.irecv(made.files[other].tensor, other, group=self.group)
                works.append(work)
            if keeper is not None:
                works.append(dist.isend(made.files[rank].tensor, keeper, group=self.group))
            faults.point("replica.sent")

        # A connection that is lost meanwhile is no reason to fail here alone: the commit tells it to all.
        problem = attempt(post)[1]
        made.transfer = _Transfer(works, problem)

    def arrived(self) -> bool:
        """Local. Whether nothing of this rank is under way."""
        return self._next is None or self._next.transfer is None or self._next.transfer.done()

    def commit(self, manifest: bytes | None) -> None:
        """Collective. What was sent is a checkpoint. `manifest` is taken from rank 0.

        Waits for what has not arrived. The copies of the save before go once all nodes have these.
        """
        made = self._next
        if made is None or made.transfer is None:
            return
        text = self.world.from_main(manifest.decode() if manifest is not None else None)
        if self.failed(made.transfer.result()):
            return
        faults.point("replica.received")
        before = self._last
        if self.failed(attempt(lambda: self._publish(made, text))[1]):
            return
        self._last, self._next = made, None
        if self.leads:
            kept = [made.name] if before is None else [made.name, before.name]
            problem = attempt(lambda: self._retire(before, kept))[1]
            if problem:
                self.say(f"copies in memory of earlier checkpoints were not all removed: {problem}")
        self._take_back(before)

    def _publish(self, made: _Generation, manifest: str) -> None:
        if self.leads:
            put(self.home.path / made.name / MANIFEST, manifest.encode())
            faults.point("replica.manifest_written")

    def _retire(self, before: _Generation | None, kept: Sequence[str]) -> None:
        if before is not None:
            (self.home.path / before.name / MANIFEST).unlink(missing_ok=True)
        self.home.clear(*kept)

    def _take_back(self, made: _Generation | None) -> None:
        """Its memory is for the next save. Waits for what is under way: its memory is in use until then."""
        if made is not None:
            if made.transfer is not None:
                made.transfer.result()
            self._spare.update(made.files)

    # --- when something is wrong, and at the end ---

    def failed(self, problem: str | None) -> bool:
        """Collective. Whether any rank has a problem: then there are no copies from here on."""
        told = problem and f"[rank {self.world.rank}/{self.world.size} on {socket.gethostname()}] {problem}"
        problems = [p for p in self.world.gather(told) if p]
        if not problems:
            return False
        self.on = False
        self.say(
            f"checkpoint.replicas: no copies in memory from here on; resuming is from disk: {problems[0]}"
        )
        self.settle()
        kept = [self._spare, *(made.files for made in (self._next, self._last) if made is not None)]
        for files in kept:
            for mapped in files.values():
                mapped.remove()
        self._spare, self._next, self._last = {}, None, None
        if self.leads:
            with contextlib.suppress(OSError):
                self.home.clear()
        return True

    def settle(self) -> None:
        """Local. Wait for what is under way, well or not."""
        if self._next is not None and self._next.transfer is not None:
            self._next.transfer.result()

    def forget(self) -> None:
        """Local, on every rank, after all of them have finished: the run is over and on disk."""
        self.on = False
        if self.leads:
            with contextlib.suppress(OSError):
                self.home.remove()


def open_replicas(run: Path, world: World, say: Callable[[str], None], timeout_s: float) -> Replicas | None:
    """Collective. The copies of the run in the directory `run`, which is there; None, and a word about it,
    where some node has no place for them. `say`: called on every rank, to be heard from one.
    """
    named, problem = attempt(lambda: [str(run.absolute()), mark_of(run)] if world.is_main else None)
    path, mark = world.from_main(named) or ("", "")
    home, refused = attempt(lambda: Home(path, mark)) if mark else (None, problem)
    answers = world.gather([home and home.node, refused])
    problems = [f"rank {rank}: {told}" for rank, (_, told) in enumerate(answers) if told]
    if problems or home is None:
        say(f"checkpoint.replicas: no copies are kept in memory: {'; '.join(problems[:4])}")
        return None
    nodes = Nodes([node for node, _ in answers])
    group = None
    if nodes.count > 1:
        # Half of what the others wait at most: who is done early waits for who is not, over the main group.
        limit = timedelta(seconds=timeout_s / 2)
        group, problem = attempt(lambda: dist.new_group(timeout=limit, backend="gloo"))
        problems = [told for told in world.gather(problem) if told]
        if problems:
            say(f"checkpoint.replicas: no copies are kept in memory: {problems[0]}")
            return None
    else:
        say(
            "checkpoint.replicas: all processes are on one node, so no neighbour keeps a copy; the one in "
            "this node's memory outlives its processes, not the node"
        )
    replicas = Replicas(world, home, nodes, group, say)
    if replicas.leads:
        with contextlib.suppress(OSError):
            for gone in sweep(home.path.parent):
                say(f"copies in memory were removed: {gone} is gone")
    return replicas


def attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `work` returns, or in one line what it raised."""
    try:
        return work(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
