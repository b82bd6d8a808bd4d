"""Several nodes before anything is trained: what is typed, who meets whom, and what is said otherwise."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from distdl.errors import EnvironmentProblem, PlanError
from distdl.launch import address, relay
from distdl.launch.peers import End, NodeLost, Peers
from distdl.launch.place import Endpoint, Place
from distdl.launch.relay import Hub, Link

SAME = {"recipe": "abc"}


def nobody_says(text: str) -> None:
    raise AssertionError(text)


# --- what is typed ---


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("node01:1234", "node01", 1234, "node01:1234"),
        ("node01", "node01", 29400, "node01:29400"),
        ("10.0.0.1:80", "10.0.0.1", 80, "10.0.0.1:80"),
        ("[::1]:1234", "::1", 1234, "[::1]:1234"),
        ("[fe80::1%eth0]", "fe80::1%eth0", 29400, "[fe80::1%eth0]:29400"),
        ("2001:db8::1", "2001:db8::1", 29400, "[2001:db8::1]:29400"),
    ],
)
def test_a_rendezvous(text: str, host: str, port: int, shown: str) -> None:
    found = Endpoint.parse(text)
    assert (found.host, found.port, str(found)) == (host, port, shown)


@pytest.mark.parametrize("text", ["", ":1", "a:b", "a b:1", "a:0", "a:65536", "[::1", "a:1:2x"])
def test_no_rendezvous(text: str) -> None:
    with pytest.raises(PlanError, match="--rendezvous"):
        Endpoint.parse(text)


def test_a_place_says_what_is_missing() -> None:
    assert Place.of(1, None, None) == Place()
    assert Place.of(2, 1, "a:1") == Place(1, 2, Endpoint("a", 1))
    with pytest.raises(PlanError, match=r"no --node-rank and --rendezvous: .*--node-rank 0 to 2 "):
        Place.of(3, None, None)
    with pytest.raises(PlanError, match="no --rendezvous: "):
        Place.of(3, 0, None)
    with pytest.raises(PlanError, match="--node-rank 3 of 3 nodes: expected 0 to 2"):
        Place.of(3, 3, "a:1")
    with pytest.raises(PlanError, match="numbered from 0"):
        Place.of(1, 1, None)


# --- addresses ---


def test_loopback_is_an_interface_of_this_machine() -> None:
    at = Endpoint("127.0.0.1", 1)
    assert address.resolve(at, nobody_says) == ["127.0.0.1"]
    assert address.interface_towards(at, "127.0.0.1") == "lo"
    assert ("lo", "127.0.0.1") in address.addresses_here()


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "_RESOLVE_S", 0.0)
    monkeypatch.setattr(address.time, "sleep", lambda _: None)
    said: list[str] = []
    with pytest.raises(EnvironmentProblem, match=r"'nowhere.invalid' does not resolve on .*/etc/hosts"):
        address.resolve(Endpoint("nowhere.invalid", 5), said.append)
    assert all("waiting: the rendezvous host 'nowhere.invalid'" in text for text in said)


def test_a_port_in_use_is_named() -> None:
    with contextlib.closing(address.listen(Endpoint("127.0.0.1", 0), "127.0.0.1")) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=f"port {port} of 127.0.0.1 .* is in use .*ss -ltnp"):
            address.listen(Endpoint("127.0.0.1", port), "127.0.0.1")


def test_an_address_of_another_machine_is_told_with_our_own() -> None:
    with pytest.raises(EnvironmentProblem, match=r"far \(192.0.2.1\) is no address of .*127.0.0.1"):
        address.listen(Endpoint("far", 1), "192.0.2.1")


def test_nobody_listens() -> None:
    with contextlib.closing(address.listen(Endpoint("127.0.0.1", 0), "127.0.0.1")) as gone:
        at = Endpoint("127.0.0.1", gone.getsockname()[1])
    with pytest.raises(EnvironmentProblem, match=f"does not listen at {at} .*refused.*Gave up after 0 s"):
        address.connect(at, ["127.0.0.1"], 0.0, nobody_says)


def test_debian_s_own_name_is_a_trap() -> None:
    assert address.is_a_trap(Endpoint("node01"), "127.0.1.1")
    assert not address.is_a_trap(Endpoint("localhost"), "::1")
    assert not address.is_a_trap(Endpoint("127.0.0.2"), "127.0.0.2")
    assert not address.is_a_trap(Endpoint("node01"), "10.0.0.1")


# --- meeting ---


class Ring:
    """A hub, and as many links to it as a test asks for."""

    def __init__(self) -> None:
        self._listener = address.listen(Endpoint("127.0.0.1", 0), "127.0.0.1")
        self.at = Endpoint("127.0.0.1", self._listener.getsockname()[1])
        self.hub = Hub(self._listener, SAME)
        self.hub.start()
        self.links: list[Link] = []

    def join(self, node: int, identity: dict[str, str] = SAME) -> Link:
        link = Link(address.connect(self.at, ["127.0.0.1"], 5.0, nobody_says), node, identity)
        self.links.append(link)
        return link

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.hub.close()
        assert not self.hub.is_alive()


@pytest.fixture
def ring() -> Iterator[Ring]:
    with contextlib.closing(Ring()) as made:
        yield made


def hear(link: Link, key: str, node: int) -> relay.Json:
    while node not in link.heard.get(key, {}):
        link.listen(5.0)
    return link.heard[key][node]


def test_what_one_says_all_hear_also_who_comes_later(ring: Ring) -> None:
    first = ring.join(0)
    first.say("word", {"text": "a\nb"})
    assert hear(first, "word", 0) == {"text": "a\nb"}
    second = ring.join(1)
    assert hear(second, "word", 0) == {"text": "a\nb"}
    second.say("word", 2)
    assert hear(first, "word", 1) == hear(second, "word", 1) == 2


def test_who_leaves_is_lost_to_the_others_after_its_last_words(ring: Ring) -> None:
    first, second = ring.join(0), ring.join(1)
    second.say("word", 1)
    second.close()
    assert hear(first, relay.LOST, 1) == socket.gethostname()
    assert first.heard["word"] == {1: 1}


def test_the_hub_s_end_is_node_0_s(ring: Ring) -> None:
    far, near = socket.socketpair()
    with far:
        far.sendall(b'{"refused": null}\n')
        link = Link(near, 1, SAME)
    assert hear(link, relay.LOST, 0) is None
    link.close()


def test_another_recipe_is_refused(ring: Ring) -> None:
    ring.join(0)
    with pytest.raises(
        EnvironmentProblem, match=r"node 0 has recipe abc, and node 1 \(.*\) has xyz: start the"
    ):
        ring.join(1, {"recipe": "xyz"})


def test_a_node_rank_given_twice_is_refused(ring: Ring) -> None:
    ring.join(0)
    with pytest.raises(EnvironmentProblem, match="says that it is too: give every node a --node-rank"):
        ring.join(0)


def test_strangers_are_sent_away_and_harm_nobody(ring: Ring) -> None:
    with socket.create_connection(("127.0.0.1", ring.at.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(100) == b""
    with socket.create_connection(("127.0.0.1", ring.at.port)) as stranger:
        stranger.sendall(b"[1]\n")
        assert b"this is where the nodes of a distdl run meet" in stranger.recv(1000)
    ring.join(0).say("word", 1)
    assert hear(ring.links[0], "word", 0) == 1


def test_another_program_at_the_port_is_recognised() -> None:
    far, near = socket.socketpair()
    with far:
        far.sendall(b"220 mail.example ESMTP\r\n")
        with pytest.raises(EnvironmentProblem, match="another program has the port"):
            Link(near, 1, SAME)


def test_an_attempt_ends_when_all_have_said_how(ring: Ring) -> None:
    peers = [Peers(ring.join(n), n, 2) for n in range(2)]
    peers[0].round = peers[1].round = 1
    peers[0].say_end(End(1, code=75))
    hear(ring.links[1], "end", 0)
    assert peers[1].ends() is None
    assert not peers[1].failed
    peers[1].say_end(End(1, failure={"rank": 1}))
    for me, other in ((0, 1), (1, 1)):
        hear(ring.links[me], "end", other)
        assert peers[me].failed
        assert peers[me].ends() == [End(1, code=75), End(1, failure={"rank": 1})]


def test_a_node_lost_after_all_is_said_is_no_loss(ring: Ring) -> None:
    peers = [Peers(ring.join(n), n, 2) for n in range(2)]
    peers[0].round = peers[1].round = 1
    for each in peers:
        each.say_end(End(1, code=0))
    peers[1].leave()
    hear(ring.links[0], relay.LOST, 1)
    while (ends := peers[0].ends()) is None:  # its own word may come back later
        pass
    assert ends == [End(1, code=0)] * 2
    peers[0].round = 2
    with pytest.raises(NodeLost):
        peers[0].ends()
