"""One fixed binary tree over the microbatches 0..M-1, along which sums keep their bits at any world size."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def split(a: int, b: int) -> int:
    """Where the node over [a, b) divides: at a plus the largest power of two below b - a (b - a >= 2)."""
    return a + (1 << (b - a - 1).bit_length() - 1)


def tree_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of equally shaped tensors, one a microbatch in their order, added along the tree."""

    def fold(a: int, b: int) -> torch.Tensor:
        if b - a == 1:
            return parts[a]
        middle = split(a, b)
        return fold(a, middle) + fold(middle, b)

    return fold(0, len(parts))
