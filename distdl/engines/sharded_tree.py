"""`train.reduction: exact` under FSDP: shards of the gradients, summed along one tree over the microbatches.

FSDP reduces after every backward and adds what comes of it to `grad`. In the place of its reduce-scatter
every rank sends each other rank that one's shard of its microbatch's gradient, which moves as much, and keeps
the shards in the tree until they meet their neighbours. What FSDP adds is the whole sum after the last
backward, and before that -0.0, the one number that changes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distdl.comm import World
from distdl.comm.tree import Node, parent, split
from distdl.engines.base import Pass
from distdl.plan import share


class ShardedTree:
    """The reducer of one rank's FSDP modules: see `Reducer`. All ranks make equally many passes a step."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._passes = 0
        self.count = 0
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(_TreeScatter(self))  # type: ignore[arg-type]

    @property
    def last(self) -> bool:
        """Whether the pass that is under way is the last of the step, on all ranks."""
        return self._passes * self._world.size >= self.count

    def numbers(self) -> Iterator[tuple[int, int]]:
        """(rank, its microbatch) of the pass that is under way; a rank that repeats one is left out."""
        for rank in range(self._world.size):
            lo, hi = share(self.count, rank, self._world.size)
            if lo + self._passes <= hi:
                yield rank, lo + self._passes - 1

    @contextmanager
    def passing(self, this: Pass) -> Iterator[None]:
        """Around the forward and backward of one pass."""
        self.count = this.microbatches
        self._passes += 1
        yield

    def reduce(self) -> Tensor:
        """Collective; blocks. The global norm: of whole parameters, in float64, in the model's order."""
        norms = []
        for parameter in self._parameters:
            assert isinstance(parameter.grad, DTensor)
            (norm,) = torch._foreach_norm([parameter.grad.full_tensor()])
            norms.append(norm.double())
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total

    def clear(self) -> None:
        """The end of a step, updated or not."""
        self._passes = 0
        for parameter in self._parameters:
            parameter.grad = None


class _TreeScatter:
    """What FSDP calls for one of its modules. It has what torch's abstract `ReduceScatter` has, which is not
    to be imported from a public place.
    """

    def __init__(self, tree: ShardedTree) -> None:
        self._tree = tree
        self._sums: dict[Node, Tensor] = {}

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """`input_tensor`: this rank's gradient, a shard for each rank end to end; `output`: a shard."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        shards = received.view(group.size(), -1)
        for rank, number in self._tree.numbers():
            self._add((number, number + 1), shards[rank])
        if self._tree.last:
            output_tensor.copy_(self._sums.pop((0, self._tree.count)))
            assert not self._sums
        else:
            output_tensor.fill_(-0.0)

    def _add(self, node: Node, value: Tensor) -> None:
        """Keep the sum below `node`, or go on upwards where its neighbour is there already."""
        while (above := parent(node, self._tree.count)) is not None:
            middle = split(*above)
            left, right = (above[0], middle), (middle, above[1])
            beside = self._sums.pop(right if node == left else left, None)
            if beside is None:
                break
            value = value.add_(beside) if node == left else beside.add_(value)
            node = above
        self._sums[node] = value
