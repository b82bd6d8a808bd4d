"""`train.reduction: exact`: gradients summed along one tree over the microbatches, during the last backward.

The sum has the same bits at any world size. Torch's DDP is not used: its sums depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from distdl.comm import World
from distdl.comm.exchange import Exchange, route_of
from distdl.engines.base import Pass
from distdl.engines.sharded import Shards
from distdl.engines.slabs import Bucket, Slab, make_buckets


class ExactReducer:
    """See `Reducer`. A parameter without a gradient is left out where no microbatch of any rank gave it one:
    `hardware.unused_parameters` is not needed.
    """

    def __init__(self, model: nn.Module, world: World, exchange: Exchange, shards: Shards | None) -> None:
        self.forward = model
        self._world = world
        self._exchange = exchange
        self._shards = shards
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._buckets = make_buckets(self._parameters, world.size, shards.owner if shards else None)
        self._this: Pass | None = None
        self._complete: set[Bucket] = set()
        self._sums: list[Slab] = []
        self._waits: list[Callable[[], None]] = []
        for bucket in self._buckets:
            for i, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket, i))
        equalise(model, world)

    @contextmanager
    def passing(self, this: Pass) -> Iterator[None]:
        """Around the forward and backward of one pass."""
        count = this.microbatches
        self._this = this
        if not this.weight:
            # This rank has no microbatch of its own to wait for; the repeat's gradients are thrown away.
            self._start_all()
            self._show(None)
            yield
            self._show(None)
            return
        for bucket in self._buckets:
            bucket.begin_leaf(this.groups[0].number, count)
        yield
        if this.last:
            self._start_all()  # those with a parameter that this microbatch did not use
        else:
            for bucket in self._buckets:
                bucket.fold(count)

    def reduce(self) -> Tensor:
        """Collective. Wait for the sums; `grad` of each parameter that had a gradient on any rank is its
        sum, and None for the others (and, sharded, for those of other ranks). Returns the global norm.
        """
        for wait in self._waits:
            wait()
        self._show(self._sums)
        norm = self._norm()
        for bucket, total in zip(self._buckets, self._sums, strict=True):
            for parameter, used in zip(bucket.parameters, bucket.used(total), strict=True):
                if not used:
                    parameter.grad = None
        return norm

    def publish(self) -> None:
        if self._shards is not None:
            self._shards.publish(list(zip(self._buckets, self._sums, strict=True)))

    def clear(self) -> None:
        for bucket, total in zip(self._buckets, self._sums, strict=True):
            bucket.reset(total)
        self._sums, self._waits, self._complete = [], [], set()

    def _arrived(self, bucket: Bucket, index: int, _parameter: Tensor) -> None:
        """Called by autograd when a gradient has been added."""
        if self._this is None or not self._this.weight:
            return
        if bucket.note(index) and self._this.last:
            self._complete.add(bucket)
            for waiting in self._buckets[len(self._sums) :]:
                if waiting not in self._complete:
                    break
                self._start(waiting)

    def _start_all(self) -> None:
        for bucket in self._buckets[len(self._sums) :]:
            self._start(bucket)

    def _start(self, bucket: Bucket) -> None:
        """Begin the exchange of a bucket. All ranks begin them in the order of `_buckets`."""
        assert self._this is not None
        route = route_of(self._this.microbatches, self._world.size)
        bucket.fold(route.count)
        total = bucket.close()
        held = [slab.flat for _, slab in bucket.stack]
        if self._shards is None:
            wait = self._exchange.start_sum(route, held, total.flat)
        else:
            to_owners = partial(self._exchange.sum_to_owners, route, held, bucket.cuts, total.flat)
            wait = self._exchange.start(to_owners)
        self._sums.append(total)
        self._waits.append(wait)

    def _show(self, slabs: list[Slab] | None) -> None:
        for i, bucket in enumerate(self._buckets):
            bucket.show(slabs[i] if slabs else None)

    def _norm(self) -> Tensor:
        """The norms of whole parameters, in float64, combined in the model's order on every rank."""
        if self._shards is None:
            norms = _norms(self._parameters)
        else:
            self._shards.drop_others()
            norms = self._shards.gather_norms(_norms(self._shards.owned))
        total: Tensor = torch.linalg.vector_norm(norms)
        return total


def _norms(parameters: list[Parameter]) -> Tensor:
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    return torch.stack([n.double() for n in norms]) if norms else torch.empty(0, dtype=torch.float64)


@torch.no_grad()
def equalise(model: nn.Module, world: World) -> None:
    """Every rank begins with rank 0's bits: two kinds of CPU may round an initial value differently."""
    if world.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dense = tensor.contiguous()
            dist.broadcast(dense, 0)
            tensor.copy_(dense)
