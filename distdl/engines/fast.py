"""`train.reduction: fast`: gradients summed by torch's DistributedDataParallel, during the last backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distdl.comm import World
from distdl.comm.together import alone
from distdl.engines.base import Pass
from distdl.engines.sharded import Shards
from distdl.engines.slabs import make_buckets
from distdl.engines.sum_hook import Reduction, sum_gradients
from distdl.errors import EngineError

# RunningStatistics keeps the buffers equal. Newer torch calls the same switch by another name.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


class FastReducer:
    """See `Reducer`. With one rank there is no wrapper and no communication."""

    def __init__(
        self,
        model: nn.Module,
        world: World,
        device: torch.device,
        shards: Shards | None,
        unused_parameters: bool,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        """`wrap`: makes the DistributedDataParallel (the model itself for one rank) in the place of ours."""
        self._model = model
        self._world = world
        self._reduction = Reduction()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._shards = shards
        self._buckets = make_buckets(self._parameters, world.size, shards.owner) if shards else []
        self.forward = wrap(model) if wrap else self._wrap(device, unused_parameters)
        if isinstance(self.forward, DistributedDataParallel):
            self.forward.register_comm_hook(self._reduction, sum_gradients)

    @contextmanager
    def passing(self, this: Pass) -> Iterator[None]:
        reduces = this.last or self._world.size == 1
        with nullcontext() if reduces else self.forward.no_sync():  # type: ignore[operator]
            yield

    def reduce(self) -> Tensor:
        with alone():  # a rank that has all of its gradients waits for this one's
            self._refuse_missing_gradients()
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._shards is not None:
            self._shards.drop_others()
        return norm

    def publish(self) -> None:
        if self._shards is not None:
            slabs = [(bucket, bucket.take()) for bucket in self._buckets]
            self._shards.publish(slabs)
            for bucket, slab in slabs:
                bucket.reset(slab)

    def clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _refuse_missing_gradients(self) -> None:
        # DDP waits for the bucket of an unused parameter for ever, silently: this rank's gradients would be
        # its own alone.
        if self._world.size > 1 and not self._reduction.complete:
            unused = [n for n, p in self._model.named_parameters() if p.requires_grad and p.grad is None]
            raise EngineError(
                f"some parameters got no gradient in this step: {', '.join(unused[:8])}. Freeze them "
                "(requires_grad=False), use them in the loss, or set hardware.unused_parameters=true"
            )
        self._reduction.complete = False

    def _wrap(self, device: torch.device, unused_parameters: bool) -> nn.Module:
        if self._world.size == 1:
            return self._model
        return DistributedDataParallel(
            self._model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=unused_parameters,
            **_NO_BUFFER_SYNC,
        )
