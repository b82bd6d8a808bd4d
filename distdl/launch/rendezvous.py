"""Rendezvous of all nodes' agents: a fresh store for the workers of every attempt, beside node 0."""

from __future__ import annotations

import socket
from collections.abc import Callable

from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from distdl.launch.peers import Opening, Peers


class Meeting(RendezvousHandler):
    """All nodes, or those that are there. `address` is node 0's: there the workers' store listens alone.

    The kernel chooses the port and the socket goes to the store already bound, so two launches never meet on
    one. Each attempt gets a store of its own: workers that reconnect to the port of an attempt before them
    are why restarts under gloo so often fail.
    """

    def __init__(
        self, peers: Peers, address: str, run_id: str, procs: int, name_attempt: Callable[[], str]
    ) -> None:
        self.peers = peers
        self.progress: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Node 0's restarts left, and the furthest step."""
        self.meanwhile: Callable[[], None] = lambda: None
        self._name_attempt = name_attempt
        self._address = address
        self._run_id = run_id
        self._procs = procs
        self._store: TCPStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """Blocks until the next round begins. Raises NodeLost, TooFew."""
        opening = None
        if self.peers.node == 0:
            opening = Opening(self._name_attempt(), self._open_store(), *self.progress())
        round_ = self.peers.begin(self._procs, opening, self.meanwhile)
        group = [member.node for member in round_.members].index(self.peers.node)
        where = RendezvousStoreInfo(self._address, round_.port)
        return RendezvousInfo(self._store or HashStore(), group, len(round_.members), where)

    def _open_store(self) -> int:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((self._address, 0))
        listener.listen(1024)
        port: int = listener.getsockname()[1]
        self._store = TCPStore(
            self._address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return port

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "distdl"

    def get_run_id(self) -> str:
        return self._run_id

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody else could join."""

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        self._store = None
        return True
