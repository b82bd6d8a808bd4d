"""One fixed binary tree over the microbatches 0..M-1, along which sums keep their bits at any world size.

Floating-point addition commutes but does not associate: a sum has the same bits wherever it is computed if
every node of one tree adds the same two children. A rank adds the nodes inside its run; ranks exchange those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Node = tuple[int, int]
"""[a, b): the microbatches below a node. The root is (0, M), the leaf of microbatch i is (i, i + 1)."""


def split(a: int, b: int) -> int:
    """Where the node over [a, b) divides: at a plus the largest power of two below b - a (b - a >= 2)."""
    return a + (1 << (b - a - 1).bit_length() - 1)


def parent(node: Node, count: int) -> Node | None:
    """The node above `node` in the tree over `count` microbatches; None above the root."""
    above, (a, b) = None, (0, count)
    while (a, b) != node:
        above, middle = (a, b), split(a, b)
        a, b = (a, middle) if node[1] <= middle else (middle, b)
    return above


def maximal_subtrees(lo: int, hi: int, count: int) -> tuple[Node, ...]:
    """The largest nodes of the tree over `count` that lie inside the run [lo, hi), from left to right."""

    def inside(a: int, b: int) -> tuple[Node, ...]:
        if hi <= a or b <= lo:
            return ()
        if lo <= a and b <= hi:
            return ((a, b),)
        return inside(a, split(a, b)) + inside(split(a, b), b)

    return inside(0, count)


def tree_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of equally shaped tensors, one a microbatch in their order, added along the tree."""

    def fold(a: int, b: int) -> torch.Tensor:
        if b - a == 1:
            return parts[a]
        middle = split(a, b)
        return fold(a, middle) + fold(middle, b)

    return fold(0, len(parts))


def fold_in_place(parts: Mapping[Node, torch.Tensor], root: Node) -> torch.Tensor:
    """The sum below `root` of nodes that cover it, each once. Sums are left in the tensors of left children:
    what is returned is one of `parts`.
    """
    if root in parts:
        return parts[root]
    middle = split(*root)
    return fold_in_place(parts, (root[0], middle)).add_(fold_in_place(parts, (middle, root[1])))
