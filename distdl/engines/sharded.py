"""`hardware.shard_optimizer`: each rank keeps the optimiser's state of some whole parameters (ZeRO stage 1;
Rajbhandari et al., 2020), updates those, and all exchange the results.

Whole parameters, so that an optimiser that updates each by itself does what it does unsharded, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from distdl.comm import World
from distdl.comm.exchange import Exchange
from distdl.engines.shards import pieces_of
from distdl.engines.slabs import Bucket, Slab
from distdl.pieces import Piece


def assign(sizes: Sequence[int], ranks: int) -> list[int]:
    """A rank for each parameter: the largest first, each to the rank that has least (the lowest of several).

    The fullest rank then has at most 4/3 of what the best assignment would give it (Graham, 1969).
    """
    load = [0] * ranks
    found = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        found[i] = load.index(min(load))
        load[found[i]] += sizes[i]
    return found


class Shards:
    """Which rank updates which of the trainable parameters of `model`. Needs two ranks or more."""

    def __init__(self, model: nn.Module, world: World, exchange: Exchange) -> None:
        self._world = world
        self._exchange = exchange
        self._names = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        ranks = assign([p.numel() for _, p in self._names], world.size)
        self.owner: dict[Parameter, int] = {p: r for (_, p), r in zip(self._names, ranks, strict=True)}
        self.owned = [p for p, rank in self.owner.items() if rank == world.rank]
        self.names = {name for name, p in self._names if self.owner[p] == world.rank}

    def drop_others(self) -> None:
        """Take away the gradients of parameters that other ranks update: an optimiser passes those by, and
        keeps no state for them.
        """
        for parameter, rank in self.owner.items():
            if rank != self._world.rank:
                parameter.grad = None

    def gather_norms(self, mine: Tensor) -> Tensor:
        """Collective; blocks. One number for each parameter in the model's order, from its owner's `mine`."""
        found = mine.new_zeros(len(self.owner), device=self._names[0][1].device)
        if mine.numel():
            found[[i for i, r in enumerate(self.owner.values()) if r == self._world.rank]] = mine
        dist.all_reduce(found)  # exact: all terms but one are zero
        return found

    @torch.no_grad()
    def publish(self, slabs: Sequence[tuple[Bucket, Slab]]) -> None:
        """Collective; blocks. Every parameter takes its owner's value; the slabs are overwritten."""
        waits = []
        for bucket, slab in slabs:
            for parameter, view in zip(bucket.parameters, slab.views, strict=True):
                if self.owner[parameter] == self._world.rank:
                    view.copy_(parameter)
            gather = self._exchange.gather_segments
            waits.append(self._exchange.start(partial(gather, slab.flat, bucket.cuts)))
        for (bucket, slab), wait in zip(slabs, waits, strict=True):
            wait()
            for parameter, view in zip(bucket.parameters, slab.views, strict=True):
                if self.owner[parameter] != self._world.rank:
                    parameter.copy_(view)

    def pieces_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
        """A state as this rank holds it: what the optimiser keeps of a parameter, no other rank has.

        Pieces are in row-major order: what is in channels_last is copied.
        """
        return {
            name: Piece(p.data.reshape(-1), p.shape, 0) if name.startswith("optim/") else p
            for name, p in pieces_of(tensors).items()
        }
