"""Which rank writes which tensor, where every rank holds them all. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Mapping


def share_out(sizes: Mapping[str, int], world_size: int) -> list[list[str]]:
    """Share tensors (name -> bytes) among ranks so that they write about equally much.

    Greedy: the largest first, each to the rank with least so far (Graham 1969, longest processing time
    first), so no rank gets more than the mean plus the largest tensor. Depends on names and sizes alone, not
    on their order. Returns one sorted list of names for each rank; some are empty if tensors are few.
    """
    shares: list[list[str]] = [[] for _ in range(world_size)]
    load = [(0, rank) for rank in range(world_size)]
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        held, rank = load[0]
        shares[rank].append(name)
        heapq.heapreplace(load, (held + sizes[name], rank))
    return [sorted(share) for share in shares]
