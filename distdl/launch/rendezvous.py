"""Where launchers meet: a fresh store for the workers of every attempt.

Workers that reconnect to the port of an attempt before them are why restarts under gloo so often fail; so no
attempt's store outlives it. The kernel chooses its port and the socket goes to the store already bound: two
launches never meet on one. It listens on one address alone: 127.0.0.1, or node 0's own.
"""

from __future__ import annotations

import socket
import time
from abc import abstractmethod
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from distdl.errors import EnvironmentProblem, LaunchError
from distdl.topology import Agents

_POLL_S = 0.05


class Meeting(RendezvousHandler):
    """What a launcher needs of the others beside what torch's agent does."""

    @abstractmethod
    def from_first(self, make: Callable[[], str]) -> str:
        """The text that `make` returns on node 0, in this attempt, on every node; once an attempt."""

    @abstractmethod
    def leave(self, why: str) -> None:
        """Tell the others that this launcher takes part no more; without an effect if one has before."""

    @property
    def use_agent_store(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Launchers leave with a reason: see `leave`."""

    def shutdown(self) -> bool:
        return True


class LoopbackRendezvous(Meeting):
    """One node, world size 1 as agents count it."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def next_rendezvous(self) -> RendezvousInfo:
        store, port = _fresh_store("127.0.0.1")
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo("127.0.0.1", port))

    def from_first(self, make: Callable[[], str]) -> str:
        return make()

    def leave(self, why: str) -> None:
        """Nobody else is there."""

    def get_backend(self) -> str:
        return "loopback"

    def get_run_id(self) -> str:
        return self._run_id

    def num_nodes_waiting(self) -> int:
        return 0


class NodesRendezvous(Meeting):
    """Several nodes, each with one launcher. Node 0's keeps a board on which all of them read and write.

    A round is one attempt: all have to be there before it begins, and whoever comes to the next one calls the
    others to it, since its workers have failed.
    """

    def __init__(self, run_id: str, agents: Agents, timeout_s: float) -> None:
        """Blocks until node 0's launcher is there. Raises EnvironmentProblem where it cannot be reached."""
        self._run_id = run_id
        self._agents = agents
        self._limit_s = timeout_s
        self._round = 0
        self._board = self._open_board()

    def _open_board(self) -> TCPStore:
        agents = self._agents
        where = f"port {agents.port} of {agents.host} (node 0)"
        try:
            address = socket.getaddrinfo(agents.host, agents.port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise EnvironmentProblem(
                f"node {agents.node} ({socket.gethostname()}): the name {agents.host} of node 0 does not "
                f"resolve: {error}. Set MASTER_ADDR to an address that every node reaches"
            ) from error
        limit = timedelta(seconds=self._limit_s)
        try:
            if agents.node == 0:
                listener = _listen(address[0], address[4])
                return TCPStore(
                    agents.host, agents.port, None, True, limit, False, master_listen_fd=listener.detach()
                )
            return TCPStore(agents.host, agents.port, is_master=False, timeout=limit)
        except (OSError, DistError) as error:
            what = "cannot be opened" if agents.node == 0 else "does not answer"
            raise EnvironmentProblem(
                f"node {agents.node} ({socket.gethostname()}): {where} {what}: {error}. Is it blocked, or "
                "taken? MASTER_PORT chooses another"
            ) from error

    def next_rendezvous(self) -> RendezvousInfo:
        self._round += 1
        here, port = self._key("here"), self._key("port")
        self._board.add(here, 1)
        host = self._agents.host
        if self._agents.node == 0:
            self._wait(lambda: self._board.add(here, 0) == self._agents.nodes)
            store, number = _fresh_store(host)
            self._board.set(port, str(number))
        else:
            self._wait(lambda: self._board.check([port]))
            number = int(self._board.get(port))
            store = TCPStore(host, number, is_master=False, timeout=timedelta(seconds=self._limit_s))
        info = RendezvousStoreInfo(host, number)
        return RendezvousInfo(store, self._agents.node, self._agents.nodes, info)

    def from_first(self, make: Callable[[], str]) -> str:
        key = self._key("said")
        if self._agents.node == 0:
            self._board.set(key, make())
        else:
            self._wait(lambda: self._board.check([key]))
        return str(self._board.get(key).decode())

    def num_nodes_waiting(self) -> int:
        return self._board.add(f"{self._round + 1}/here", 0)

    def leave(self, why: str) -> None:
        name = f"node {self._agents.node} ({socket.gethostname()})"
        self._board.compare_set("left", "", f"{name} {why}")

    def _key(self, name: str) -> str:
        return f"{self._round}/{name}"

    def _wait(self, there: Callable[[], bool]) -> None:
        """Raises LaunchError where a launcher has left, or where one does not come in time."""
        end = time.monotonic() + self._limit_s
        while not there():
            if self._board.check(["left"]):
                raise LaunchError(self._board.get("left").decode())
            if time.monotonic() > end:
                raise LaunchError(
                    f"node {self._agents.node} waited {self._limit_s:g} s (launch.timeout_s) for the "
                    "launchers of the other nodes, in vain"
                )
            time.sleep(_POLL_S)

    def get_backend(self) -> str:
        return "nodes"

    def get_run_id(self) -> str:
        return self._run_id


def _fresh_store(host: str) -> tuple[TCPStore, int]:
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = _listen(family, address)
    port = listener.getsockname()[1]
    fd = listener.detach()
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=fd), port


def _listen(family: int, address: object) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)  # type: ignore[arg-type]
    listener.listen(128)
    return listener
