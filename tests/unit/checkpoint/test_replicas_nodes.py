"""Who keeps whose copy, and what has to be sent where: for any ranks on any nodes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distdl.checkpoint.replicas.nodes import Nodes, moves

IDS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=12)


@given(IDS)
def test_every_copy_is_on_the_next_node(ids: list[str]) -> None:
    nodes = Nodes(ids)
    assert [ids[ranks[0]] for ranks in nodes.members] == list(dict.fromkeys(ids))
    for rank, _ in enumerate(ids):
        keeper = nodes.keeper(rank)
        assert (keeper is None) == (nodes.count == 1)
        if keeper is not None:
            assert nodes.of(keeper) == (nodes.of(rank) + 1) % nodes.count
            assert rank in nodes.kept_by(keeper)
    kept = sorted(other for rank, _ in enumerate(ids) for other in nodes.kept_by(rank))
    assert kept == ([] if nodes.count == 1 else list(range(len(ids))))


@given(IDS, st.data())
def test_one_lost_node_loses_no_file(ids: list[str], data: st.DataObject) -> None:
    nodes = Nodes(ids)
    lost = data.draw(st.integers(0, nodes.count - 1))
    there = set().union(*(nodes.kept_on(node) for node in range(nodes.count) if node != lost))
    assert there == (set() if nodes.count == 1 else set(range(len(ids))))


@given(IDS, st.integers(1, 9), st.data())
def test_after_the_moves_every_node_has_every_file(ids: list[str], count: int, data: st.DataObject) -> None:
    nodes = Nodes(ids)
    somewhere = st.lists(st.integers(0, nodes.count - 1), min_size=1, unique=True)
    holders = {f"file-{i}": data.draw(somewhere) for i in range(count)}
    has = {(file, node) for file, on in holders.items() for node in on}
    for move in moves(list(holders), holders, nodes):
        assert (move.file, nodes.of(move.source)) in has, "sent by a node that has it from the start"
        assert (move.file, nodes.of(move.target)) not in has, "not sent twice"
        has.add((move.file, nodes.of(move.target)))
    assert has == {(file, node) for file in holders for node in range(nodes.count)}
