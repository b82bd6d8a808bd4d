"""Which rank writes which of the tensors that every rank holds. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def share_out(sizes: Mapping[str, int], loads: Sequence[int]) -> list[list[str]]:
    """Share tensors (name -> bytes) among ranks so that they write about equally much.

    `loads`: by rank, the bytes that it writes in any case. Greedy: the largest first, each to the rank with
    least so far (Graham 1969, longest processing time first), so no rank gets more than the mean plus the
    largest tensor, unless it began with more. Depends on names, sizes and loads, not on the order of names.
    Returns one sorted list of names for each rank; some are empty if tensors are few.
    """
    shares: list[list[str]] = [[] for _ in loads]
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        load, rank = heap[0]
        shares[rank].append(name)
        heapq.heapreplace(heap, (load + sizes[name], rank))
    return [sorted(share) for share in shares]
