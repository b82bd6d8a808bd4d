"""`World`: who I am among the ranks, and how the ranks exchange small values.

Small values (flags, counts, errors, file hashes) always travel over a CPU group, so that no flag costs a GPU
synchronisation. They are JSON on the wire: nothing received from another process is ever unpickled.
"""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from distdl.errors import EnvironmentProblem

if TYPE_CHECKING:
    from distdl.topology import Topology

Json = Any
"""What `json.dumps` takes: None, bool, int, float, str, and lists and string-keyed dicts of these."""


class World:
    """The ranks of one run. Size 1 needs no process group and communicates with nobody.

    Every method is a collective: all ranks call it, in the same order, and it blocks until they have.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def is_main(self) -> bool:
        """True on rank 0, the one that writes what is written once."""
        return self.rank == 0

    def sum_ints(self, values: list[int]) -> list[int]:
        """The element-wise sum over ranks of a short list of integers (same length on every rank)."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor)
        return [int(v) for v in tensor.tolist()]

    def gather(self, value: Json) -> list[Json]:
        """Every rank's `value`, in rank order, on every rank. Values may differ in size."""
        if self.size == 1:
            return [json.loads(json.dumps(value))]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([payload.numel()], dtype=torch.int64))
        longest = int(max(int(s) for s in sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: payload.numel()] = payload
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [json.loads(p[: int(s)].numpy().tobytes()) for p, s in zip(parts, sizes, strict=True)]

    def from_main(self, value: Json) -> Json:
        """Rank 0's `value`, on every rank; what the others pass is ignored."""
        return self.from_rank(0, value)

    def from_rank(self, rank: int, value: Json) -> Json:
        """The `value` of `rank`, the same on all ranks, on every rank; what the others pass is ignored."""
        payload = json.dumps(value if self.rank == rank else None).encode()
        if self.size == 1:
            return json.loads(payload)
        nbytes = torch.tensor([len(payload)], dtype=torch.int64)
        dist.broadcast(nbytes, rank)
        data = bytearray(payload if self.rank == rank else int(nbytes))
        dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), rank)
        return json.loads(data)

    def gather_rows(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Concatenate every rank's `rows` ([n_r, k], one dtype, on CPU) in rank order, on every rank.

        `counts` is n_r by rank, known to all beforehand, so that this is one collective.
        """
        return self.start_gather_rows(rows, counts)()

    def start_gather_rows(self, rows: torch.Tensor, counts: list[int]) -> Callable[[], torch.Tensor]:
        """`gather_rows` that does not block: the result of calling what is returned, which does."""
        if self.size == 1:
            return lambda: rows
        padded = rows.new_zeros((max(counts), rows.shape[1]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        work = dist.all_gather(parts, padded, async_op=True)

        def finish() -> torch.Tensor:
            work.wait()
            return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)])

        return finish

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self.sum_ints([0])


def join(rank: int, size: int, device: str, timeout_s: float, store: Store | None) -> World:
    """Form the process group of a run and return its `World`. All ranks call it; blocks until all have.

    CPU tensors always go over gloo; CUDA tensors over nccl.
    """
    if size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(
            backend, rank=rank, world_size=size, store=store, timeout=timedelta(seconds=timeout_s)
        )
    return World(rank, size)


def meet(topology: Topology, device: str, timeout_s: float) -> World:
    """`join` at the rendezvous that the topology names: the store of the agent that started this process, or
    one that rank 0 opens (on one machine, on loopback alone).
    """
    if topology.world_size == 1 or dist.is_initialized():
        return World(topology.rank, topology.world_size)
    store = rendezvous(topology, timeout_s)
    return join(topology.rank, topology.world_size, device, timeout_s, store)


class Unmet(EnvironmentProblem):
    """A rank that could not meet the others. It alone knows, so it tells this itself."""


def rendezvous(topology: Topology, timeout_s: float) -> Store:
    """The store where the ranks of `topology` meet, as in `meet`. Rank 0 opens it at once; the others block
    until they reach it. Raises Unmet.
    """
    host, port = str(topology.master_addr), int(topology.master_port or 0)
    hosting = topology.rank == 0 and not topology.agent_store
    try:
        listener = _listen(host, port) if hosting and topology.nodes == 1 else None
        store = TCPStore(
            host,
            port,
            is_master=hosting,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener,
        )
    except (OSError, RuntimeError) as error:  # torch's DistNetworkError is a RuntimeError
        if topology.agent_store:  # the agent that started this process is gone, and this process goes with it
            raise
        why = str(error).splitlines()[0]
        if hosting:
            raise Unmet(
                f"rank 0 cannot open the place where all meet, {host}:{port}: {why}. MASTER_ADDR has to be "
                "this machine, and MASTER_PORT a port that nobody listens on; `distdl doctor`, started like "
                "this run, names who does"
            ) from error
        raise Unmet(
            f"[rank {topology.rank} on {socket.gethostname()}] cannot reach the place where all meet, "
            f"{host}:{port}: {why}. See that rank 0 runs, that this is its machine, and that no firewall "
            "stands between; `distdl doctor`, started like this run, looks at all of it"
        ) from error
    # An agent keeps its store over restarts: without a prefix, gloo would dial the workers that died.
    return PrefixStore(f"distdl/attempt-{topology.attempt}", store)


def _listen(host: str, port: int) -> int:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(1024)
    return listener.detach()


def leave() -> None:
    """Take this process out of the group, if it is in one. Not called while an exception unwinds.

    Let go of engines before. One that outlives the group ends it when it is freed itself, with Python's lock
    held, which gloo's thread may be waiting for: the process then never ends (seen with torch 2.13).
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # engines in reference cycles
        dist.destroy_process_group()
