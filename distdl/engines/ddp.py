"""PyTorch DistributedDataParallel: the model on every rank, gradients summed during the last backward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distdl.comm import World
from distdl.engines.base import Applied, Pass
from distdl.engines.batchnorm import RunningStatistics, refuse_sync_batchnorm
from distdl.engines.buffers import UnkeyedBuffers
from distdl.engines.ema import WeightAverage, averaged, weights_of
from distdl.engines.layout import Layout
from distdl.engines.optim import (
    build_optimizer,
    check_model,
    clip_factor,
    freeze,
    load_by_name,
    load_model,
    state_by_name,
)
from distdl.engines.precision import Precision
from distdl.engines.sum_hook import Reduction, sum_gradients
from distdl.errors import EngineError

if TYPE_CHECKING:
    from distdl.plan import Plan
    from distdl.recipe import Recipe


# RunningStatistics keeps the buffers equal. Newer torch calls the same switch by another name.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


class DdpEngine:
    """See `Engine`. With one rank there is no wrapper and no communication."""

    module: nn.Module

    def __init__(self, plan: Plan, recipe: Recipe, world: World, device: torch.device) -> None:
        self.device = device
        self._plan = plan
        self._recipe = recipe
        self._world = world
        self._precision = Precision(plan.precision, device)
        self._layout = Layout(device, recipe.hardware.channels_last)
        self._reduction = Reduction()

    def setup(self, model: nn.Module) -> None:
        refuse_sync_batchnorm(model)
        freeze(model, self._recipe.optim.freeze)
        self._layout.take(model)
        self.module = model.train()
        self._buffers = UnkeyedBuffers(model)
        self._statistics = RunningStatistics(model)
        self._wrapped = self._wrap(model)
        self._optimizer = build_optimizer(model, self._recipe.optim)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._average = WeightAverage(self._recipe.train.ema_decay, weights_of(model))

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._layout.place(batch)

    def microstep(self, loss_sum: Callable[[nn.Module], Tensor], this: Pass, total: int) -> Tensor:
        self._buffers.note()
        reduces = this.last or self._world.size == 1
        with nullcontext() if reduces else self._wrapped.no_sync():  # type: ignore[operator]
            with self._precision.autocast():
                value = loss_sum(self._wrapped)
            (value * (this.weight * self._precision.scale / total)).backward()
        self._statistics.pass_done(this)
        self._buffers.check(self._world.size)
        return value.detach()

    def apply(self, lr: float, counts: list[int]) -> Applied:
        self._refuse_missing_gradients()
        # After the reduction every rank holds the same gradients, so all of them decide alike. It costs a
        # GPU one synchronisation a step, which reading the norm for the log would cost as well.
        grads = [p.grad for p in self._parameters if p.grad is not None]
        scale = self._precision.scale
        total_norm = nn.utils.get_total_norm(grads) / scale
        norm = float(total_norm)
        rescaled = self._precision.note(norm)
        if not math.isfinite(norm):
            self._statistics.discard()
            self._optimizer.zero_grad(set_to_none=True)
            return Applied(False, norm, rescaled)
        # Under way while the optimiser runs: nothing in a training step reads the running statistics.
        finish_statistics = self._statistics.start_update(self._world, counts)
        factor = clip_factor(norm, self._recipe.optim.clip_norm) / scale
        if factor != 1.0:
            torch._foreach_mul_(grads, factor)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._average.update()
        finish_statistics()
        return Applied(True, norm)

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        self.module.eval()
        try:
            with self._average.in_place():
                yield self.module
        finally:
            self.module.train()

    def tensors(self) -> dict[str, Tensor]:
        averages = {f"ema/{name}": t for name, t in self._average.averages.items()}
        return state_by_name(self.module, self._optimizer) | averages | self._precision.tensors()

    def load_model(self, tensors: Mapping[str, Tensor]) -> None:
        chosen = averaged(tensors) if self._recipe.train.ema_decay is not None else tensors
        check_model(self.module, chosen)
        load_model(self.module, chosen)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        load_by_name(self.module, self._optimizer, tensors)
        self._precision.load(tensors)
        self._average.load(tensors)

    def _refuse_missing_gradients(self) -> None:
        # DDP waits for the bucket of an unused parameter for ever, silently: this rank's gradients would be
        # its own alone.
        if self._world.size > 1 and not self._reduction.complete:
            unused = [n for n, p in self.module.named_parameters() if p.requires_grad and p.grad is None]
            raise EngineError(
                f"some parameters got no gradient in this step: {', '.join(unused[:8])}. Freeze them "
                "(requires_grad=False), use them in the loss, or set hardware.unused_parameters=true"
            )
        self._reduction.complete = False

    def _wrap(self, model: nn.Module) -> nn.Module:
        if self._world.size == 1:
            return model
        wrapped = DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=self._recipe.hardware.unused_parameters,
            **_NO_BUFFER_SYNC,
        )
        wrapped.register_comm_hook(self._reduction, sum_gradients)
        return wrapped
