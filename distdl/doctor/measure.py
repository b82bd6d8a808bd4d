"""Measures communication: one plain TCP connection, and an all-reduce over all processes."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
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
LARGE_BYTES = 256 << 10
"""More than fits into one packet of any network, and arrives at once over any that is fit for training."""


def large_messages(meeting: Meeting, rank: int, label: str, address: str) -> dict[int, str]:
    """Rank -> label of the processes that this one exchanges small messages with, and no large ones: on rank
    0 all of them, which it then waits for no more, elsewhere rank 0 or none. All processes call it. Raises
    Lost.

    A large message is cut into packets as long as the interface allows. What passes packets on may allow
    less, and then drops them without a word: connections open, and stand still at the first large message.
    """
    with contextlib.ExitStack() as stack:
        port = 0
        if meeting.main:
            kind = type("_Echo", (_Echo,), {"address_family": socket.AF_INET6}) if ":" in address else _Echo
            server = stack.enter_context(kind(("", 0), _EchoOne))
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(server.shutdown)
            port = server.server_address[1]
        port = meeting.share("large-port", port)
        # Twice: a link that is merely busy lets the second through.
        stuck = not meeting.main and _is_stuck(address, port) and _is_stuck(address, port)
        told = meeting.gather("large", [rank, label] if stuck else None)
    if not meeting.main:
        return {0: "rank 0"} if stuck else {}
    found = {number: value for number, value in told.items() if value is not None}
    meeting.leave_out(found)
    return {int(r): str(name) for r, name in found.values()}


class _Echo(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024


class _EchoOne(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.request.settimeout(PATIENCE_S)
            if _receive_all(self.request, LARGE_BYTES) == LARGE_BYTES:
                self.request.sendall(bytes(LARGE_BYTES))


def _is_stuck(address: str, port: int) -> bool:
    try:
        it = socket.create_connection((address, port), timeout=PATIENCE_S)
    except OSError:
        return False  # nothing passes at all, which is told elsewhere
    with it:
        try:
            it.sendall(bytes(LARGE_BYTES))
            return _receive_all(it, LARGE_BYTES) < LARGE_BYTES
        except OSError:
            return True


def _receive_all(it: socket.socket, nbytes: int) -> int:
    """Bytes that came, until there were enough or the other side closed. Raises OSError after a time-out."""
    received = 0
    while received < nbytes and (chunk := it.recv(nbytes - received)):
        received += len(chunk)
    return received


def stream(meeting: Meeting, peer: int, address: str) -> Measured:
    """Bytes a second from the process with number `peer` to rank 0, which listens on a free port of all its
    addresses. All processes call it; the others only wait. Raises Lost.
    """
    with contextlib.ExitStack() as stack:
        listener = None
        if meeting.main:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
            stack.enter_context(listener)
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


def all_reduce(store: Store, rank: int, world_size: int, gpu: int, *, cuda: bool, wait_s: float) -> Measured:
    """Join the group that a run would form, and sum tensors in it. Collective; an error becomes a value."""
    backend = "nccl" if cuda else "gloo"
    try:
        return Measured(backend=backend, all_reduce=_timed(store, rank, world_size, gpu, cuda, wait_s))
    except RuntimeError as error:  # torch's own errors are of this kind
        return Measured(backend=backend, all_reduce_error=str(error).partition("\n")[0])


def _timed(store: Store, rank: int, world_size: int, gpu: int, cuda: bool, wait_s: float) -> dict[int, float]:
    """Bytes -> seconds of one all-reduce, that of the slowest process."""
    import torch
    import torch.distributed as dist

    from distdl.comm.world import join, leave

    device = torch.device("cuda", gpu) if cuda else torch.device("cpu")
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
