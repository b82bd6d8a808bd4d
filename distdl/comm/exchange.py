"""Sums over ranks in the order of one fixed tree: the same bits at any world size.

Each rank holds the maximal subtrees of its run of microbatches, one flat buffer each. Two ranks that hold the
two children of the root need one all-reduce, since a sum of two terms has one order. Where ranks are the
leaves of a perfect tree, they add by recursive halving and doubling (Thakur, Rabenseifner and Gropp, 2005),
distance 1 first, so that neighbours in the tree meet first. Otherwise each rank sends its subtrees, a segment
to its owner, who adds them along the tree. The first two move as much as a ring does.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from distdl.comm.tree import Node, fold_in_place, maximal_subtrees, parent
from distdl.comm.world import World
from distdl.plan import share


@dataclass(frozen=True)
class Route:
    """Who holds what in a step of `count` microbatches: each rank's maximal subtrees, by rank.

    `perfect`: one subtree a rank, and they are the leaves of a perfect binary tree.
    """

    count: int
    nodes: tuple[tuple[Node, ...], ...]
    perfect: bool


@lru_cache(maxsize=64)
def route_of(count: int, size: int) -> Route:
    """The route of a step of `count` microbatches (1 or more) over `size` ranks."""
    nodes = tuple(maximal_subtrees(*share(count, rank, size), count) for rank in range(size))
    return Route(count, nodes, _perfect(nodes, count))


def _perfect(nodes: Sequence[Sequence[Node]], count: int) -> bool:
    if any(len(held) != 1 for held in nodes):
        return False
    level = [held[0] for held in nodes]
    while len(level) > 1:
        if len(level) % 2:
            return False
        above = [parent(node, count) for node in level]
        if above[::2] != above[1::2]:
            return False
        level = [node for node in above[::2] if node is not None]
    return True


_Transfer = tuple[Callable[..., object], Tensor, int]
"""dist.isend or dist.irecv, what, and to or from which rank."""


def even_cuts(length: int, size: int) -> tuple[int, ...]:
    """Where `length` elements divide into `size` segments of nearly one size: size + 1 bounds."""
    return tuple(length * i // size for i in range(size + 1))


class Exchange:
    """The exchanges of one rank, one after another. All ranks start the same ones in the same order.

    On CPU a thread runs them, so that the backward goes on meanwhile; no other collective may be issued until
    they have ended. On CUDA they are put into a stream of their own.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self._world = world
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = None if self._stream else _Thread()
        self._kept: dict[torch.dtype, Tensor] = {}

    def start(self, job: Callable[[], None]) -> Callable[[], None]:
        """Begin `job`; what is returned waits for its end (CUDA: makes the current stream wait) and raises
        what it raised.
        """
        if self._thread is not None:
            return self._thread.submit(job).result
        assert self._stream is not None
        side = self._stream
        side.wait_stream(torch.cuda.current_stream(side.device))
        with torch.cuda.stream(side):
            job()
        return lambda: torch.cuda.current_stream(side.device).wait_stream(side)

    def start_sum(self, route: Route, held: Sequence[Tensor], out: Tensor) -> Callable[[], None]:
        """Collective. Begin to leave in `out` the sum over the whole tree, on every rank.

        `held`: this rank's subtrees, in order: flat, of one length and dtype; they are overwritten. `out` is
        the first of them, or a buffer of its own where there is none.
        """
        if self._world.size == 1:
            return lambda: None
        if route.perfect and self._world.size == 2:
            work = dist.all_reduce(out, async_op=True)
            assert work is not None
            return lambda: _wait(work)
        if route.perfect:
            return self.start(lambda: self._halve_and_double(out))
        cuts = even_cuts(out.numel(), self._world.size)

        def job() -> None:
            self.sum_to_owners(route, held, cuts, out)
            self.gather_segments(out, cuts)

        return self.start(job)

    def sum_to_owners(self, route: Route, held: Sequence[Tensor], cuts: Sequence[int], out: Tensor) -> None:
        """Collective; blocks. Rank r gets the sum over the tree of elements [cuts[r], cuts[r + 1]), in `out`;
        its other elements are undefined. `held` and `out` as in `start_sum`.
        """
        rank, size = self._world.rank, self._world.size
        mine = slice(cuts[rank], cuts[rank + 1])
        length = mine.stop - mine.start
        parts = {node: flat[mine] for node, flat in zip(route.nodes[rank], held, strict=True)}
        others = [(r, node) for r in range(size) if r != rank for node in route.nodes[r]]
        kept = self._scratch(out, length * len(others))
        receives: list[_Transfer] = []
        for i, (r, node) in enumerate(others):
            parts[node] = kept[i * length : (i + 1) * length]
            receives.append((dist.irecv, parts[node], r))
        # Each rank begins with the one after it, so that not all send to the same at first.
        peers = [(rank + i) % size for i in range(1, size)]
        sends: list[_Transfer] = [
            (dist.isend, flat[cuts[r] : cuts[r + 1]], r) for r in peers for flat in held
        ]
        _exchange(receives + sends)
        if length:
            total = fold_in_place(parts, (0, route.count))
            if total.data_ptr() != out[mine].data_ptr():
                out[mine].copy_(total)

    def gather_segments(self, flat: Tensor, cuts: Sequence[int]) -> None:
        """Collective; blocks. Rank r's elements [cuts[r], cuts[r + 1]) of `flat` reach all, in place."""
        rank, size = self._world.rank, self._world.size
        mine = flat[cuts[rank] : cuts[rank + 1]]
        peers = [(rank + i) % size for i in range(1, size)]
        receives: list[_Transfer] = [(dist.irecv, flat[cuts[r] : cuts[r + 1]], r) for r in reversed(peers)]
        _exchange(receives + [(dist.isend, mine, r) for r in peers])

    def _halve_and_double(self, flat: Tensor) -> None:
        rank, lo, hi = self._world.rank, 0, flat.numel()
        kept = self._scratch(flat, (hi + 1) // 2)
        done = []
        distance = 1
        while distance < self._world.size:
            halves = (lo, (lo + hi) // 2), ((lo + hi) // 2, hi)
            keep, give = halves if rank & distance == 0 else halves[::-1]
            received = kept[: keep[1] - keep[0]]
            _swap(flat[slice(*give)], received, rank ^ distance)
            flat[slice(*keep)].add_(received)
            done.append((keep, give, distance))
            (lo, hi), distance = keep, 2 * distance
        for keep, give, distance in reversed(done):
            _swap(flat[slice(*keep)], flat[slice(*give)], rank ^ distance)

    def _scratch(self, like: Tensor, length: int) -> Tensor:
        """`length` elements whose content is undefined: kept, since a first touch costs more than a copy."""
        if like.dtype not in self._kept or self._kept[like.dtype].numel() < length:
            self._kept[like.dtype] = like.new_empty(length)
        return self._kept[like.dtype]


def _swap(send: Tensor, receive: Tensor, peer: int) -> None:
    _exchange([(dist.irecv, receive, peer), (dist.isend, send, peer)])


def _exchange(transfers: Sequence[_Transfer]) -> None:
    """Send and receive, all at once (nccl needs that), and wait. What is empty is left out on both sides."""
    ops = [dist.P2POp(op, tensor, peer) for op, tensor, peer in transfers if tensor.numel()]
    for work in dist.batch_isend_irecv(ops) if ops else []:
        work.wait()


def _wait(work: dist.Work) -> None:
    work.wait()


class _Thread:
    """Runs jobs one after another. A daemon: a process that has failed must not wait for its peers."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
        self._started = False

    def submit(self, job: Callable[[], None]) -> Future[None]:
        if not self._started:
            threading.Thread(target=self._run, name="distdl-exchange", daemon=True).start()
            self._started = True
        future: Future[None] = Future()
        self._jobs.put((job, future))
        return future

    def _run(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
