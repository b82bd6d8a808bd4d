"""What the agents of a run tell each other: a hub beside node 0, and a link from every node to it.

Messages are JSON, one a line, so that nothing received is ever unpickled. What a node says goes to all,
itself included, in one order; a node whose connection ends is reported to the others as lost.
"""

from __future__ import annotations

import contextlib
import json
import select
import selectors
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from distdl.errors import EnvironmentProblem
from distdl.launch.address import keep_alive

Json = Any
LOST, BACK, GIVE_UP = "lost", "back", "give up"
"""What the hub says of a node whose connection has ended (the value is its host), and of one that has come
again, which is lost no longer (the value says how often). Node 0 has it give up nodes that do not answer: it
ends their connections.
"""

_LONGEST = 1 << 22  # bytes of a line; a traceback and the end of a log are far shorter
_HELLO_S = 10.0
_PARTING_S = 5.0
_STRANGER = "what listens there is not node 0 of a distdl run: another program has the port; choose another"


class Lines:
    """The lines of a connection, as they come in."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._over = False
        self._rest = b""

    def read(self) -> list[Json]:
        """What has come since; blocks where the connection is not readable. `over` is true after its end."""
        try:
            data = self.connection.recv(1 << 16)
        except OSError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._over = not data or len(self._rest) > _LONGEST
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            self._over = True  # somebody else's protocol
            return []

    def over(self) -> bool:
        """Whether it has ended, or speaks another protocol."""
        return self._over

    def write(self, value: Json) -> None:
        """Blocks while the kernel's buffer is full. A connection that has ended is left to `read`."""
        self.write_line(line_of(value))

    def write_line(self, line: bytes) -> None:
        """The same, of what `line_of` gave."""
        with contextlib.suppress(OSError):
            self.connection.sendall(line)


def line_of(value: Json) -> bytes:
    """As it is sent."""
    return json.dumps(value).encode() + b"\n"


class Hub(threading.Thread):
    """Passes on to every node what each one says. Lives beside node 0, in a thread of its own.

    A node is let in by its hello: its number, its host, and `identity`, which must be the hub's own (the
    recipe's hash, the number of nodes): nodes that would train different things never meet. Where nodes may
    `come_back`, one that was lost is let in again.
    """

    def __init__(
        self, listener: socket.socket, identity: Mapping[str, str], *, come_back: bool = False
    ) -> None:
        super().__init__(name="distdl-hub", daemon=True)
        self._listener = listener
        self._identity = dict(identity)
        self._come_back = come_back
        self._strangers: set[Lines] = set()
        self._members: dict[int, Lines] = {}
        self._hosts: dict[int, str] = {}
        self._said: dict[tuple[int, str], Json] = {}
        self._selector = selectors.DefaultSelector()
        self._closing = threading.Event()

    def run(self) -> None:
        """Serve until `close`, and then until the others have left."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        while not (self._closing.is_set() and not self._members):
            for key, _ in self._selector.select(0.1):
                if key.data is None:
                    self._accept()
                else:
                    self._serve(key.data)
        for lines in [*self._strangers]:
            self._dismiss(lines)
        self._selector.close()
        self._listener.close()

    def close(self) -> None:
        """Let the others read what was said last and leave; blocks for a few seconds at most."""
        self._closing.set()
        self.join(_PARTING_S)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            lines = Lines(keep_alive(connection))
            self._strangers.add(lines)
            self._selector.register(connection, selectors.EVENT_READ, lines)

    def _serve(self, lines: Lines) -> None:
        if lines.connection.fileno() < 0:  # dismissed since it was found readable
            return
        for message in lines.read():
            if lines in self._strangers:
                self._admit(lines, message)
            elif isinstance(message, dict) and message.keys() == {"key", "value"}:
                node = next(n for n, member in self._members.items() if member is lines)
                if node == 0 and message["key"] == GIVE_UP:
                    self._give_up(message["value"])
                else:
                    self._say(node, str(message["key"]), message["value"])
            else:  # not our protocol: what says it is no agent any more
                self._dismiss(lines)
                return
        if lines.over():
            self._dismiss(lines)

    def _admit(self, lines: Lines, hello: Json) -> None:
        refused = self._refusal(hello)
        if refused is not None:
            lines.write({"refused": refused})
            return
        node = hello["node"]
        life = self._said.get((node, BACK), 0)
        if self._said.pop((node, LOST), None) is not None:
            life += 1
            self._say(node, BACK, life)
        lines.write({"refused": None, "life": life})
        self._strangers.remove(lines)
        for (who, key), value in self._said.items():
            lines.write({"node": who, "key": key, "value": value})
        self._members[node] = lines
        self._hosts[node] = hello["host"]

    def _refusal(self, hello: Json) -> str | None:
        try:
            node, host, identity = int(hello["node"]), str(hello["host"]), dict(hello["identity"])
        except (KeyError, TypeError, ValueError):
            return "this is where the nodes of a distdl run meet"
        if node in self._hosts and not (self._come_back and node not in self._members):
            again = ". A machine that was switched off is missed within 30 s: then it can come back"
            return (
                f"node {node} is {self._hosts[node]}, and {host} says that it is too: give every node a "
                f"--node-rank of its own{again if self._come_back else ''}"
            )
        for name, mine in self._identity.items():
            if identity.get(name) != mine:
                return (
                    f"node 0 has {name} {mine}, and node {node} ({host}) has {identity.get(name)}: start "
                    "the same command on every node, with the same files and packages"
                )
        return None

    def _say(self, node: int, key: str, value: Json) -> None:
        self._said[node, key] = value
        line = line_of({"node": node, "key": key, "value": value})
        # Node 0 last: it may end this process as soon as it has heard.
        for _, member in sorted(self._members.items(), reverse=True):
            member.write_line(line)

    def _give_up(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            if node in self._members:
                self._dismiss(self._members[node])

    def _dismiss(self, lines: Lines) -> None:
        self._selector.unregister(lines.connection)
        lines.connection.close()
        self._strangers.discard(lines)
        gone = [node for node, member in self._members.items() if member is lines]
        for node in gone:
            del self._members[node]
            self._say(node, LOST, self._hosts[node])


class Link:
    """A node's connection to the hub. `heard` is the newest of what each node said: key -> node -> value."""

    def __init__(self, connection: socket.socket, node: int, identity: Mapping[str, str]) -> None:
        """Introduces this node; blocks until it is let in. Raises EnvironmentProblem where it is not."""
        self.heard: dict[str, dict[int, Json]] = {}
        self._lines = Lines(connection)
        connection.settimeout(_HELLO_S)
        self._lines.write({"node": node, "host": socket.gethostname(), "identity": dict(identity)})
        messages = self._lines.read()
        while not messages and not self._lines.over():
            messages = self._lines.read()
        connection.settimeout(None)
        refused = messages[0].get("refused", _STRANGER) if messages else _STRANGER
        self.life = int(messages[0].get("life", 0)) if messages else 0
        """How often this node has come back."""
        if refused is not None:
            connection.close()
            raise EnvironmentProblem(refused)
        self._take(messages[1:])

    def say(self, key: str, value: Json) -> None:
        """Tell all nodes, this one included, which hears it when the hub has passed it on."""
        self._lines.write({"key": key, "value": value})

    def listen(self, wait_s: float = 0.0) -> None:
        """Take in what has come; where nothing has, wait so long for something."""
        lines = self._lines
        if not lines.over() and select.select([lines.connection], [], [], wait_s)[0]:
            self._take(lines.read())
            if lines.over():
                self.heard.setdefault(LOST, {})[0] = None  # the hub ends with node 0

    def close(self) -> None:
        """Leave; what was said before still reaches the others."""
        self._lines.connection.close()

    def _take(self, messages: list[Json]) -> None:
        for message in messages:
            self.heard.setdefault(message["key"], {})[message["node"]] = message["value"]
            if message["key"] == BACK:
                self.heard.get(LOST, {}).pop(message["node"], None)


class Alone:
    """The link of a single node: it hears what it says."""

    life = 0

    def __init__(self) -> None:
        self.heard: dict[str, dict[int, Json]] = {}

    def say(self, key: str, value: Json) -> None:
        """Hear it."""
        self.heard.setdefault(key, {})[0] = value

    def listen(self, wait_s: float = 0.0) -> None:
        """Nobody else speaks."""

    def close(self) -> None:
        """Nobody else listens."""
