"""What the agents of a run agree on: who takes part in an attempt, how it ended, and that all are to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distdl.launch.failure import lost_node
from distdl.launch.relay import BACK, GIVE_UP, LOST, Alone, Link

_HERE, _READY, _ROUND, _STARTED, _GROW, _END, _STOP = (
    "here", "ready", "round", "started", "grow", "end", "stop",
)  # fmt: skip
_WAIT_S = 0.05
ANSWER_S = 15.0
"""When an attempt has failed on one node, the agents of the others, once they have started their workers,
end them and say so at once. One that says nothing for so long, and a fiftieth of a second for each node,
cannot be reached; the kernel would find that out later.
"""


class NodeLost(Exception):
    """A node's agent has ended, or cannot be reached, while the run needs it. `host` is None for node 0's."""

    def __init__(self, node: int, host: str | None) -> None:
        super().__init__(f"node {node} is lost")
        self.node = node
        self.host = host


class TooFew(Exception):
    """Fewer nodes than the run needs are left, and no other came."""


@dataclass(frozen=True)
class Crew:
    """How many nodes a run has: `nodes` at most, and where `least` is fewer, whoever is there of them.

    `gather_s`: how long node 0 waits for the rest once `least` are there; `timeout_s`: for `least`.
    """

    nodes: int = 1
    least: int = 1
    gather_s: float = 0.0
    timeout_s: float = 600.0

    @property
    def elastic(self) -> bool:
        return self.least < self.nodes


@dataclass(frozen=True)
class Member:
    """A node of a round. `life` counts how often it has come back: it is no longer the member if it has."""

    node: int
    procs: int
    life: int


@dataclass(frozen=True)
class Round:
    """One attempt, as node 0 says it: who takes part, in the order of nodes, what it is called, the port of
    the workers' store, and how far the run and its budget of restarts are, which a newcomer cannot know.
    """

    number: int
    members: tuple[Member, ...]
    attempt: str
    port: int
    restarts_left: int
    furthest: int

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Round:
        """From what was sent."""
        return cls(**{**said, "members": tuple(Member(**member) for member in said["members"])})

    def ranks_of(self, node: int) -> Sequence[int]:
        """The ranks of a member; none of who is none."""
        first = 0
        for member in self.members:
            if member.node == node:
                return range(first, first + member.procs)
            first += member.procs
        return ()

    def has(self, node: int, life: int) -> bool:
        """Whether it is a member, in its present life."""
        return any((m.node, m.life) == (node, life) for m in self.members)


@dataclass(frozen=True)
class Opening:
    """What node 0 brings to a round."""

    attempt: str
    port: int
    restarts_left: int
    furthest: int


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
    """One agent's view of all agents. Nodes keep step by rounds: the attempts, counted from 1.

    Every node hears everything in one order (`Hub`), so all draw the same conclusions.
    """

    def __init__(self, link: Link | Alone, node: int = 0, crew: Crew | None = None) -> None:
        self.node = node
        self.crew = crew or Crew()
        self.round = Round(0, (), "", 0, 0, 0)
        self._link = link
        self._wanted = 1
        self._stop_told = False
        self._silent_since: dict[int, float] = {}
        link.say(_HERE, True)

    @property
    def nodes(self) -> int:
        """How many take part in this round; before the first, how many are asked for."""
        return len(self.round.members) or self.crew.nodes

    def begin(self, procs: int, opening: Opening | None, meanwhile: Callable[[], None]) -> Round:
        """Begin the next attempt; node 0 brings its `opening`, and says who takes part: all nodes, and in an
        elastic crew all that are there.

        Blocks until then, and calls `meanwhile` again and again. Raises NodeLost; on node 0, TooFew.
        """
        self._wanted = self.round.number + 1
        self._ready(procs)
        began, announced = time.monotonic(), False
        while True:
            found = self._round()
            if found is not None and found.number >= self._wanted:
                if found.has(self.node, self._link.life):
                    break
                self._wanted = found.number + 1  # it began without this node, which may be in the next
                self._ready(procs)
            self._check_lost()
            meanwhile()
            if opening is not None and not announced:
                members = self._gathered(time.monotonic() - began)
                if members is not None:
                    announced = True
                    self._link.say(_ROUND, asdict(Round(self._wanted, members, **vars(opening))))
            self._link.listen(_WAIT_S)
        self.round, self._silent_since = found, {}
        return found

    def say_started(self) -> None:
        """Tell the others that this attempt's workers have been started here."""
        self._link.say(_STARTED, self.round.number)

    def say_end(self, end: End) -> None:
        """Tell the others how this attempt ended here."""
        self._link.say(_END, asdict(end))

    def ends(self) -> list[End] | None:
        """How the attempt ended on each node; None while one is missing. A lost node of an elastic crew has
        failed. Raises NodeLost.
        """
        self._link.listen()
        ends = [self._end_of(member) for member in self.round.members]
        found = [end for end in ends if end is not None]
        if len(found) < len(ends):
            if 0 in self._link.heard.get(LOST, {}):  # nothing more will come, also not this node's own word
                raise NodeLost(0, None)
            self._check_lost(unless_ended=True)
            self._give_up_who_is_silent(ends)
            return None
        return found

    def _give_up_who_is_silent(self, ends: Sequence[End | None]) -> None:
        """Node 0: of an attempt that has failed, those that started their workers and have had their time."""
        if self.node != 0 or not any(end is not None and end.failure is not None for end in ends):
            return
        now, started = time.monotonic(), self._link.heard.get(_STARTED, {})
        silent = []
        for member, end in zip(self.round.members, ends, strict=True):
            if end is None and member.node != 0 and started.get(member.node) == self.round.number:
                since = self._silent_since.setdefault(member.node, now)
                if now - since > ANSWER_S + len(ends) / 50:
                    silent.append(member.node)
                    self._silent_since[member.node] = math.inf  # once
        if silent:
            self._link.say(GIVE_UP, silent)

    @property
    def failed(self) -> bool:
        """Whether the attempt has failed on any node."""
        ends = [self._end_of(member) for member in self.round.members]
        return any(end is not None and end.failure is not None for end in ends)

    def missing(self) -> list[int]:
        """The nodes that have not come yet; waits a moment for them. Raises NodeLost."""
        here = self._link.heard.get(_HERE, {})
        absent = [n for n in range(self.crew.nodes) if n not in here]
        if absent:
            self._check_lost()
            self._link.listen(_WAIT_S)
        return absent

    def newcomers(self) -> list[int]:
        """The nodes that wait for the next round while this one goes on."""
        return [n for n in self._link.heard.get(_READY, {}) if self._is_ready(n, self.round.number + 1)]

    def tell_grow(self) -> None:
        """Node 0: this round ends at a step boundary, so that newcomers can take part in the next."""
        self._link.say(_GROW, self.round.number)

    @property
    def growing(self) -> bool:
        """Whether that was said of this round."""
        return bool(self._link.heard.get(_GROW, {}).get(0) == self.round.number)

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

    def _ready(self, procs: int) -> None:
        self._link.say(_READY, {"round": self._wanted, "procs": procs, "life": self._link.life})

    def _round(self) -> Round | None:
        said = self._link.heard.get(_ROUND, {}).get(0)
        return None if said is None else Round.of(said)

    def _gathered(self, waited_s: float) -> tuple[Member, ...] | None:
        """Who takes part in the next round; None while somebody is waited for. Raises TooFew."""
        heard = self._link.heard
        here, ready = heard.get(_HERE, {}), heard.get(_READY, {})
        present = sorted(n for n in here if n not in heard.get(LOST, {}))
        awaited = [n for n in present if not self._is_ready(n, self._wanted)]
        if len(present) < self.crew.least and waited_s > self.crew.timeout_s:
            raise TooFew(
                f"{len(present)} of at least {self.crew.least} nodes are left, and no other came within "
                f"{self.crew.timeout_s:g} s (launch.timeout_s)"
            )
        if awaited or len(present) < self.crew.least:
            return None
        return tuple(Member(n, ready[n]["procs"], self._lives(n)) for n in present)

    def _is_ready(self, node: int, number: int) -> bool:
        said = self._link.heard.get(_READY, {}).get(node)
        alive = node not in self._link.heard.get(LOST, {})
        return said is not None and alive and (said["round"], said["life"]) == (number, self._lives(node))

    def _lives(self, node: int) -> int:
        return int(self._link.heard.get(BACK, {}).get(node, 0))

    def _end_of(self, member: Member) -> End | None:
        said = self._link.heard.get(_END, {}).get(member.node)
        if said is not None and said["round"] == self.round.number:
            return End(**said)
        lost = self._link.heard.get(LOST, {})
        gone = member.node in lost or self._lives(member.node) != member.life  # it may be back already
        if not gone or not self.crew.elastic or member.node == 0:
            return None
        ranks = self.round.ranks_of(member.node)
        return End(self.round.number, failure=lost_node(member.node, lost.get(member.node), ranks))

    def _check_lost(self, *, unless_ended: bool = False) -> None:
        """Raise NodeLost for one that the run cannot do without; who has said how it ended may leave."""
        for node, host in self._link.heard.get(LOST, {}).items():
            said = self._link.heard.get(_END, {}).get(node) if unless_ended else None
            ended = said is not None and said["round"] == self.round.number
            if not ended and (node == 0 or not self.crew.elastic):
                raise NodeLost(node, host)
