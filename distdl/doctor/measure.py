"""Measures communication: one plain TCP connection, and an all-reduce over all processes."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

from distdl.doctor.facts import Measured
from distdl.doctor.meeting import Meeting

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

SIZES = (4 << 10, 1 << 20, 16 << 20)
SECONDS_A_SIZE = 0.3
STREAM_BYTES, CHUNK = 64 << 20, 1 << 20
PATIENCE_S = 5.0


def stream(meeting: Meeting, peer: int, address: str) -> Measured:
    """Bytes a second from the process with number `peer` to rank 0, which listens on a free port of all its
    addresses. All processes call it; the others only wait. Raises Lost.
    """
    with contextlib.ExitStack() as stack:
        listener = None
        if meeting.main:
            listener = stack.enter_context(socket.create_server(("", 0)))
            listener.settimeout(PATIENCE_S)
        port = meeting.share("stream-port", listener.getsockname()[1] if listener else 0)
        error = None
        if meeting.number == peer:
            error = _send(address, port)
        rate, main_error = _receive(listener) if listener else (None, None)
        told = meeting.gather("stream-error", error)
    return Measured(stream=rate, stream_error=told.get(peer) or main_error)


def _send(address: str, port: int) -> str | None:
    data = bytes(CHUNK)
    try:
        with socket.create_connection((address, port), timeout=PATIENCE_S) as it:
            for _ in range(STREAM_BYTES // CHUNK):
                it.sendall(data)
    except OSError as error:
        return f"{address}:{port}: {error.strerror or error}"
    return None


def _receive(listener: socket.socket) -> tuple[float | None, str | None]:
    buffer, received = bytearray(CHUNK), 0
    try:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            began = time.perf_counter()
            while received < STREAM_BYTES and (n := connection.recv_into(buffer)):
                received += n
            return received / (time.perf_counter() - began), None
    except OSError as error:
        return None, f"nothing came within {PATIENCE_S:.0f} s: {error.strerror or error}"


def all_reduce(
    store: Store, rank: int, world_size: int, local_rank: int, *, cuda: bool, wait_s: float
) -> Measured:
    """Join the group that a run would form, and sum tensors in it. Collective; an error becomes a value."""
    backend = "nccl" if cuda else "gloo"
    try:
        return Measured(backend=backend, all_reduce=_timed(store, rank, world_size, local_rank, cuda, wait_s))
    except RuntimeError as error:  # torch's own errors are of this kind
        return Measured(backend=backend, all_reduce_error=str(error).partition("\n")[0])


def _timed(
    store: Store, rank: int, world_size: int, local_rank: int, cuda: bool, wait_s: float
) -> dict[int, float]:
    """Bytes -> seconds of one all-reduce, that of the slowest process."""
    import torch
    import torch.distributed as dist

    from distdl.comm.world import join, leave

    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    join(rank, world_size, device.type, wait_s, store)

    def seconds(tensor: torch.Tensor, times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(tensor)
        float(tensor[0])  # waits for the GPU
        taken = torch.full((1,), (time.perf_counter() - began) / times, device=device)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return float(taken)

    found = {}
    for nbytes in SIZES:
        tensor = torch.zeros(nbytes // 4, device=device)
        seconds(tensor, 1)  # connections are made when they are first used
        times = max(1, min(200, int(SECONDS_A_SIZE / seconds(tensor, 2))))
        found[nbytes] = seconds(tensor, times)
    leave()
    return found
