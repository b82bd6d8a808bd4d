"""What the agents of a run agree on: when an attempt begins, how it ended, and that all are to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from distdl.launch.relay import LOST, Alone, Link

_HERE, _BEGIN, _END, _STOP = "here", "begin", "end", "stop"
_WAIT_S = 0.05


class NodeLost(Exception):
    """A node's agent has ended, or cannot be reached, while the run needs it. `host` is None for node 0's."""

    def __init__(self, node: int, host: str | None) -> None:
        super().__init__(f"node {node} is lost")
        self.node = node
        self.host = host


@dataclass(frozen=True)
class Begin:
    """What a node brings to an attempt; node 0 also the attempt's name and the port of the workers' store."""

    round: int
    procs: int
    attempt: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class End:
    """How an attempt ended on a node: its workers' code, or a failure, or neither, where another node's ended
    it. Node 0 also says how far the run was.
    """

    round: int
    code: int | None = None
    failure: dict[str, Any] | None = None
    stopping: bool = False
    step: int = 0
    phase: str = ""


class Peers:
    """One agent's view of all agents. Nodes keep step by rounds: the attempts, counted from 1."""

    def __init__(self, link: Link | Alone, node: int = 0, nodes: int = 1) -> None:
        self.node = node
        self.nodes = nodes
        self.round = 0
        self._link = link
        self._stop_told = False
        link.say(_HERE, True)

    def begin(
        self, procs: int, attempt: str | None, port: int | None, meanwhile: Callable[[], None]
    ) -> list[Begin]:
        """Begin the next attempt with all nodes; returns what each brings, in the order of nodes.

        Blocks until all are there, and calls `meanwhile` again and again. Raises NodeLost.
        """
        self.round += 1
        self._link.say(_BEGIN, asdict(Begin(self.round, procs, attempt, port)))
        while (found := self._all(_BEGIN)) is None:
            self._check_lost()
            meanwhile()
            self._link.listen(_WAIT_S)
        return [Begin(**said) for said in found]

    def say_end(self, end: End) -> None:
        """Tell the others how this attempt ended here."""
        self._link.say(_END, asdict(end))

    def ends(self) -> list[End] | None:
        """How the attempt ended on each node; None while one is missing. Raises NodeLost."""
        self._link.listen()
        found = self._all(_END)
        if found is None:
            self._check_lost(unless_said=_END)
        return None if found is None else [End(**said) for said in found]

    @property
    def failed(self) -> bool:
        """Whether a node has said that the attempt failed there."""
        said = self._link.heard.get(_END, {}).values()
        return any(end["failure"] is not None for end in said if end["round"] == self.round)

    def missing(self) -> list[int]:
        """The nodes that have not come yet; waits a moment for them. Raises NodeLost."""
        here = self._link.heard.get(_HERE, {})
        absent = [n for n in range(self.nodes) if n not in here]
        if absent:
            self._check_lost()
            self._link.listen(_WAIT_S)
        return absent

    def tell_stop(self, name: str) -> None:
        """Tell the others that this node was asked to stop, by the signal of that name; once."""
        if not self._stop_told:
            self._stop_told = True
            self._link.say(_STOP, name)

    @property
    def stop(self) -> str | None:
        """The signal by which any node was asked to stop."""
        return next(iter(self._link.heard.get(_STOP, {}).values()), None)

    def leave(self) -> None:
        """Say nothing more."""
        self._link.close()

    def _all(self, key: str) -> list[dict[str, Any]] | None:
        said = self._link.heard.get(key, {})
        mine = [said[n] for n in range(self.nodes) if n in said and said[n]["round"] == self.round]
        return mine if len(mine) == self.nodes else None

    def _check_lost(self, unless_said: str | None = None) -> None:
        """`unless_said`: who has said that in this round is no longer needed."""
        for node, host in self._link.heard.get(LOST, {}).items():
            said = self._link.heard.get(unless_said, {}) if unless_said else {}
            if node not in said or said[node]["round"] != self.round:
                raise NodeLost(node, host)
