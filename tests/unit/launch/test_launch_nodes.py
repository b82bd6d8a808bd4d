"""Several nodes before anything is trained: what is typed, who meets whom, and what is said otherwise."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from distdl.errors import EnvironmentProblem, PlanError
from distdl.launch import address, relay
from distdl.launch import peers as peers_module
from distdl.launch.peers import Crew, End, Member, NodeLost, Opening, Peers, Round, TooFew
from distdl.launch.place import Endpoint, Nodes, Place
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


def test_how_many_nodes() -> None:
    assert (Nodes.parse("4"), str(Nodes.parse("4")), Nodes.parse("4").least) == (Nodes(4), "4", 4)
    assert (Nodes.parse("1:4"), str(Nodes.parse("1:4")), Nodes.parse("1:4").least) == (Nodes(4, 1), "1:4", 1)
    assert Nodes.parse("3:3") == Nodes(3)
    for text in ("", "0", "4:1", "0:2", "1:", ":2", "a", "1:2:3", "-1"):
        with pytest.raises(PlanError, match="expected how many machines"):
            Nodes.parse(text)


def test_srun_may_start_fewer_of_a_range() -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "5"}
    meeting = Endpoint("n1", 5)
    assert Place.find(Nodes(4, 1), None, None, step) == Place(1, 2, meeting, 1)
    assert Place.find(Nodes(4, 2), None, None, step) == Place(1, 2, meeting)
    assert Place.find(Nodes(2), None, None, step) == Place(1, 2, meeting)
    with pytest.raises(PlanError, match="--nodes 3:4, and srun started 2"):
        Place.find(Nodes(4, 3), None, None, step)
    with pytest.raises(EnvironmentProblem, match="3 nodes are asked for and 2 started"):
        Place.find(Nodes(3), None, None, step)


def test_a_place_says_what_is_missing() -> None:
    assert Place.of(Nodes(1), None, None) == Place()
    assert Place.of(Nodes(2), 1, "a:1") == Place(1, 2, Endpoint("a", 1))
    with pytest.raises(PlanError, match=r"no --node-rank and --rendezvous: .*--node-rank 0 to 2 "):
        Place.of(Nodes(3), None, None)
    with pytest.raises(PlanError, match="no --rendezvous: "):
        Place.of(Nodes(3), 0, None)
    with pytest.raises(PlanError, match="--node-rank 3 of 3 nodes: expected 0 to 2"):
        Place.of(Nodes(3), 3, "a:1")
    with pytest.raises(PlanError, match="numbered from 0"):
        Place.of(Nodes(1), 1, None)


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

    def __init__(self, come_back: bool = False) -> None:
        self._listener = address.listen(Endpoint("127.0.0.1", 0), "127.0.0.1")
        self.at = Endpoint("127.0.0.1", self._listener.getsockname()[1])
        self.hub = Hub(self._listener, SAME, come_back=come_back)
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


def test_a_member_that_talks_nonsense_is_lost_and_the_hub_goes_on(ring: Ring) -> None:
    first, second, third = ring.join(0), ring.join(1), ring.join(2)
    for link, nonsense in ((second, b"[1, 2]\n"), (third, b'{"key": "end"}\n')):
        link._lines.connection.sendall(nonsense)
    for node in (1, 2):
        assert hear(first, relay.LOST, node) == socket.gethostname()
    first.say("word", 1)
    assert hear(first, "word", 0) == 1


def test_another_program_at_the_port_is_recognised() -> None:
    far, near = socket.socketpair()
    with far:
        far.sendall(b"220 mail.example ESMTP\r\n")
        with pytest.raises(EnvironmentProblem, match="another program has the port"):
            Link(near, 1, SAME)


def both(number: int) -> Round:
    return Round(number, (Member(0, 1, 0), Member(1, 1, 0)), f"{number:04d}", 1, 3, 0)


def test_an_attempt_ends_when_all_have_said_how(ring: Ring) -> None:
    peers = [Peers(ring.join(n), n, Crew(2, 2)) for n in range(2)]
    peers[0].round = peers[1].round = both(1)
    peers[0].say_end(End(1, code=75))
    hear(ring.links[1], "end", 0)
    assert peers[1].ends() is None
    assert not peers[1].failed
    peers[1].say_end(End(1, failure={"rank": 1}))
    for me, other in ((0, 1), (1, 1)):
        hear(ring.links[me], "end", other)
        assert peers[me].failed
        assert peers[me].ends() == [End(1, code=75), End(1, failure={"rank": 1})]


def test_who_says_nothing_after_a_failure_is_given_up(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a cable that is cut: its connection stands, and nothing comes."""
    monkeypatch.setattr(peers_module, "ANSWER_S", 0.1)
    first, silent = (Peers(ring.join(node), node, Crew(2, 2)) for node in (0, 1))
    first.round = silent.round = both(1)
    first.say_end(End(1, failure={"rank": 0}))
    wait_until = time.monotonic() + 0.5
    while time.monotonic() < wait_until:  # it may still be starting its workers
        assert first.ends() is None
    silent.say_started()
    with pytest.raises(NodeLost) as lost:
        until(first, lambda peers: peers.ends())
    assert lost.value.node == 1
    with pytest.raises(NodeLost):  # should it be there after all, it ends
        until(silent, lambda peers: peers.ends())


def test_a_node_lost_after_all_is_said_is_no_loss(ring: Ring) -> None:
    peers = [Peers(ring.join(n), n, Crew(2, 2)) for n in range(2)]
    peers[0].round = peers[1].round = both(1)
    for each in peers:
        each.say_end(End(1, code=0))
    peers[1].leave()
    hear(ring.links[0], relay.LOST, 1)
    while (ends := peers[0].ends()) is None:  # its own word may come back later
        pass
    assert ends == [End(1, code=0)] * 2
    peers[0].round = both(2)
    with pytest.raises(NodeLost):
        peers[0].ends()


# --- an elastic crew ---


@pytest.fixture
def elastic() -> Iterator[Ring]:
    with contextlib.closing(Ring(come_back=True)) as made:
        yield made


class Agents:
    """Agents of a run of at most 3 nodes, each beginning its rounds in a thread of its own."""

    def __init__(self, ring: Ring, least: int = 1, timeout_s: float = 30.0) -> None:
        self._ring = ring
        self._crew = Crew(3, least, 0.0, timeout_s)
        self._pool = ThreadPoolExecutor(4)
        self.peers: dict[int, Peers] = {}

    def come(self, *nodes: int) -> None:
        for node in nodes:
            self.peers[node] = Peers(self._ring.join(node), node, self._crew)

    def begin(self, *nodes: int, left: int = 3) -> dict[int, Future[Round]]:
        opening = Opening(f"left {left}", 7, left, 10 * left)
        return {
            n: self._pool.submit(self.peers[n].begin, 10 + n, opening if n == 0 else None, lambda: None)
            for n in nodes
        }

    def begun(self, *nodes: int, left: int = 3) -> list[int]:
        rounds = [future.result(20) for future in self.begin(*nodes, left=left).values()]
        assert all(each == rounds[0] for each in rounds)
        assert (rounds[0].attempt, rounds[0].restarts_left, rounds[0].furthest) == (
            f"left {left}",
            left,
            10 * left,
        )
        return [member.node for member in rounds[0].members]


def until(peers: Peers, what: Callable[[Peers], Any]) -> Any:
    while not (found := what(peers)):
        peers.ends()
    return found


def test_a_lost_node_has_failed_and_the_next_round_is_without_it(elastic: Ring) -> None:
    agents = Agents(elastic)
    agents.come(0, 1, 2)
    assert agents.begun(0, 1, 2) == [0, 1, 2]
    agents.peers[2].leave()
    for node in (0, 1):
        until(agents.peers[node], lambda p: p.failed)
        assert agents.peers[node].ends() is None
    agents.peers[0].say_end(End(1))
    agents.peers[1].say_end(End(1))
    for node in (0, 1):
        ends = until(agents.peers[node], lambda p: p.ends())
        assert [end.failure and end.failure["node"] for end in ends] == [None, None, 2]
        assert "is lost" in ends[2].failure["cause"]
    assert agents.begun(0, 1, left=2) == [0, 1]


def test_who_comes_waits_for_the_next_round_and_knows_its_number(elastic: Ring) -> None:
    agents = Agents(elastic)
    agents.come(0, 2)
    assert agents.begun(0, 2) == [0, 2]
    agents.come(1)
    (waiting,) = agents.begin(1).values()
    assert until(agents.peers[0], lambda p: p.newcomers()) == [1]
    assert not agents.peers[2].growing
    agents.peers[0].tell_grow()
    for node in (0, 2):
        until(agents.peers[node], lambda p: p.growing)
        agents.peers[node].say_end(End(1, code=75))
    for node in (0, 2):
        assert until(agents.peers[node], lambda p: p.ends()) == [End(1, code=75)] * 2
    assert agents.begun(0, 2, left=1) == [0, 1, 2]
    assert [m.procs for m in waiting.result(20).members] == [10, 11, 12]
    assert waiting.result().number == 2
    assert not agents.peers[0].growing


def test_who_is_back_before_it_was_missed_is_lost_all_the_same(elastic: Ring) -> None:
    """The others read both words at once; its former life ended the round, and the next has it again."""
    agents = Agents(elastic)
    agents.come(0, 1)
    assert agents.begun(0, 1) == [0, 1]
    agents.peers[1].leave()
    while True:
        try:
            agents.come(1)
            break
        except EnvironmentProblem:  # the hub has not noticed yet
            continue
    (again,) = agents.begin(1).values()
    until(agents.peers[0], lambda p: p.newcomers())
    assert agents.peers[0].failed
    agents.peers[0].say_end(End(1))
    assert [bool(end.failure) for end in until(agents.peers[0], lambda p: p.ends())] == [False, True]
    assert agents.begun(0) == [0, 1]
    assert again.result(20).members == (Member(0, 10, 0), Member(1, 11, 1))


def test_too_few_are_left(elastic: Ring) -> None:
    agents = Agents(elastic, least=2, timeout_s=0.2)
    agents.come(0, 1)
    assert agents.begun(0, 1) == [0, 1]
    agents.peers[1].leave()
    agents.peers[0].say_end(End(1))
    until(agents.peers[0], lambda p: p.ends())
    with pytest.raises(TooFew, match="1 of at least 2 nodes"):
        agents.begun(0)


def test_node_0_cannot_be_lost(elastic: Ring) -> None:
    agents = Agents(elastic)
    agents.come(0, 1)
    assert agents.begun(0, 1) == [0, 1]
    agents.peers[0].leave()
    with pytest.raises(NodeLost):
        until(agents.peers[1], lambda p: p.ends())
