"""Which ranks share a node, and which rank keeps whose copy. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Nodes:
    """The nodes in the order of their first ranks, as a ring: each keeps copies for the one before it.

    `ids`: by rank, what names its node.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        members: dict[str, list[int]] = {}
        for rank, node in enumerate(ids):
            members.setdefault(node, []).append(rank)
        self.members = list(members.values())
        """By node, its ranks, ascending."""
        self._node = {rank: node for node, ranks in enumerate(self.members) for rank in ranks}

    @property
    def count(self) -> int:
        """How many nodes."""
        return len(self.members)

    def of(self, rank: int) -> int:
        """The node of a rank."""
        return self._node[rank]

    def leads(self, rank: int) -> bool:
        """Whether `rank` is the lowest of its node: what is done once a node is done by it."""
        return self.members[self.of(rank)][0] == rank

    def keeper(self, rank: int) -> int | None:
        """The rank, on the next node, that keeps the copy of `rank`; None on a single node."""
        if self.count == 1:
            return None
        node = self.of(rank)
        there = self.members[(node + 1) % self.count]
        return there[self.members[node].index(rank) % len(there)]

    def kept_by(self, rank: int) -> list[int]:
        """The ranks whose copies `rank` keeps, beside its own."""
        return [other for other in self._node if self.keeper(other) == rank]

    def kept_on(self, node: int) -> set[int]:
        """The ranks whose files belong in the memory of a node."""
        return {*self.members[node], *self.members[(node - 1) % self.count]}


@dataclass(frozen=True)
class Move:
    """One file, from the memory of one rank's node into that of another's."""

    file: str
    source: int
    target: int


def moves(files: Sequence[str], holders: Mapping[str, Sequence[int]], nodes: Nodes) -> list[Move]:
    """What has to be sent so that every node has every file; each file has a node among its `holders`.

    Sources and targets take turns, so that no node sends, and no rank of a node receives, all of it.
    """
    found = []
    for i, file in enumerate(files):
        for node in range(nodes.count):
            if node not in holders[file]:
                there, here = nodes.members[holders[file][node % len(holders[file])]], nodes.members[node]
                found.append(Move(file, there[i % len(there)], here[i % len(here)]))
    return found
