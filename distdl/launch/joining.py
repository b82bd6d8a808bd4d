"""From the place that was typed to peers that have met. Imports no torch: a port in use is told at once."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from distdl.errors import EnvironmentProblem
from distdl.launch.address import connect, interface_towards, is_a_trap, listen, resolve
from distdl.launch.peers import Crew, Peers
from distdl.launch.place import Nodes, Place
from distdl.launch.relay import Alone, Hub, Link
from distdl.recipe import Recipe, recipe_hash
from distdl.version import __version__

_SAY_AFTER_S = 5.0


@dataclass(frozen=True)
class Ground:
    """Where this node meets the others: node 0's addresses, the interface towards it, node 0's socket."""

    place: Place
    addresses: tuple[str, ...] = ("127.0.0.1",)
    interface: str | None = "lo"
    listener: socket.socket | None = None


def find_ground(place: Place, say: Callable[[str], None]) -> Ground:
    """Resolve the rendezvous, and listen there on node 0. Raises EnvironmentProblem, naming what to check."""
    at = place.rendezvous
    if at is None:
        return Ground(place)
    addresses = resolve(at, say)
    listener = listen(at, addresses[0]) if place.node == 0 else None
    if listener is not None and is_a_trap(at, addresses[0]):
        say(
            f"warning: {at.host} is {addresses[0]} here, which no other machine can reach (a line of "
            "/etc/hosts): if the others do not come, give this machine's address in --rendezvous"
        )
    return Ground(place, tuple(addresses), interface_towards(at, addresses[0]), listener)


@contextmanager
def joined(ground: Ground, recipe: Recipe, say: Callable[[str], None]) -> Iterator[tuple[Peers, str]]:
    """The peers, once all are there, and node 0's address; leaves them at the end.

    Blocks for at most `launch.timeout_s`. Raises EnvironmentProblem; NodeLost for one that goes again.
    """
    place, at = ground.place, ground.place.rendezvous
    if at is None:
        yield Peers(Alone()), ground.addresses[0]
        return
    crew = Crew(place.nodes, place.fewest or place.nodes, recipe.launch.gather_s, recipe.launch.timeout_s)
    identity = {
        "recipe": recipe_hash(recipe),
        "--nodes": str(Nodes(place.nodes, place.fewest)),
        "distdl": __version__,
    }
    hub = None
    if ground.listener is not None:
        hub = Hub(ground.listener, identity, come_back=crew.elastic)
        hub.start()
    connection = connect(at, list(ground.addresses), recipe.launch.timeout_s, say)
    address = str(connection.getpeername()[0])
    peers = Peers(Link(connection, place.node, identity), place.node, crew)
    try:
        if place.node == 0 or not crew.elastic:  # of an elastic crew, node 0 says when it begins
            _wait_for_all(peers, place, say)
        yield peers, address
    finally:
        peers.leave()
        if hub is not None:
            hub.close()


def _wait_for_all(peers: Peers, place: Place, say: Callable[[str], None]) -> None:
    """Blocks until all are there; of an elastic crew, until enough are and the rest have had their time."""
    crew = peers.crew
    began, told = time.monotonic(), False
    while missing := peers.missing():
        waited = time.monotonic() - began
        if crew.elastic and crew.nodes - len(missing) >= crew.least and waited > crew.gather_s:
            return
        names = f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {place.nodes}"
        if waited > crew.timeout_s:
            raise EnvironmentProblem(
                f"{names} did not come to {place.rendezvous} within {crew.timeout_s:g} s (launch.timeout_s): "
                "see what their launchers say. Every node needs the same --nodes and --rendezvous, a "
                "--node-rank of its own, and a way to this address that no firewall blocks"
            )
        if not told and waited > _SAY_AFTER_S:
            say(f"waiting at {place.rendezvous} for {names}")
            told = True
