"""PyTorch DistributedDataParallel: the model on every rank, gradients summed during the last backward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distdl.comm import World
from distdl.engines.base import Applied
from distdl.engines.batchnorm import RunningStatistics
from distdl.engines.buffers import UnkeyedBuffers
from distdl.engines.optim import build_optimizer, check_model, load_by_name, load_model, state_by_name
from distdl.engines.sum_hook import Reduction, sum_gradients
from distdl.errors import EngineError

if TYPE_CHECKING:
    from distdl.plan import Plan
    from distdl.recipe.schema import AdamW, Hardware, Sgd


# RunningStatistics keeps the buffers equal. Newer torch calls the same switch by another name.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


class DdpEngine:
    """See `Engine`. With one rank there is no wrapper and no communication."""

    module: nn.Module

    def __init__(
        self, plan: Plan, optim: Sgd | AdamW, world: World, device: torch.device, hardware: Hardware
    ) -> None:
        self.device = device
        self._world = world
        self._optim = optim
        self._bf16 = plan.precision == "bf16"
        self._channels_last = hardware.channels_last
        self._unused = hardware.unused_parameters
        self._reduction = Reduction()

    def setup(self, model: nn.Module) -> None:
        model.to(self.device)
        wanted = self._channels_last
        self.channels_last = bool(wanted) if wanted != "auto" else _has_2d_convolutions(model)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module = model.train()
        _refuse_sync_batchnorm(model)
        self._buffers = UnkeyedBuffers(model)
        self._statistics = RunningStatistics(model)
        self._wrapped = self._wrap(model)
        self._optimizer = build_optimizer(model, self._optim)
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = torch.channels_last if self.channels_last else torch.contiguous_format
        return {
            name: t.to(
                self.device,
                non_blocking=True,
                memory_format=images if t.ndim == 4 else torch.preserve_format,
            )
            for name, t in batch.items()
        }

    def microstep(
        self, loss_sum: Callable[[nn.Module], Tensor], count: int, total: int, *, weight: int, last: bool
    ) -> Tensor:
        self._buffers.note()
        reduces = last or self._world.size == 1
        with nullcontext() if reduces else self._wrapped.no_sync():  # type: ignore[operator]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
                value = loss_sum(self._wrapped)
            (value * (weight / total)).backward()
        self._statistics.microbatch_done(count, weight)
        self._buffers.check(self._world.size)
        return value.detach()

    def apply(self, lr: float, counts: list[int]) -> Applied:
        self._refuse_missing_gradients()
        # After the reduction every rank holds the same gradients, so all of them decide alike. It costs a
        # GPU one synchronisation a step, which reading the norm for the log would cost as well.
        grads = [p.grad for p in self._parameters if p.grad is not None]
        total_norm = nn.utils.get_total_norm(grads)
        norm = float(total_norm)
        if not math.isfinite(norm):
            self._statistics.discard()
            self._optimizer.zero_grad(set_to_none=True)
            return Applied(False, norm)
        # Under way while the optimiser runs: nothing in a training step reads the running statistics.
        finish_statistics = self._statistics.start_update(self._world, counts)
        if self._optim.clip_norm is not None and norm + 1e-6 > self._optim.clip_norm:
            nn.utils.clip_grads_with_norm_(self._parameters, self._optim.clip_norm, total_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        finish_statistics()
        return Applied(True, norm)

    def tensors(self) -> dict[str, Tensor]:
        return state_by_name(self.module, self._optimizer)

    def load_model(self, tensors: Mapping[str, Tensor]) -> None:
        check_model(self.module, tensors)
        load_model(self.module, tensors)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        load_by_name(self.module, self._optimizer, tensors)

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
            find_unused_parameters=self._unused,
            **_NO_BUFFER_SYNC,
        )
        wrapped.register_comm_hook(self._reduction, sum_gradients)
        return wrapped


def _refuse_sync_batchnorm(model: nn.Module) -> None:
    found = [name for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    if found:
        raise EngineError(
            f"the model has SyncBatchNorm ({', '.join(found[:4])}), which mixes the ranks' microbatches and "
            "would tie the result to their number: use BatchNorm; distdl combines its statistics itself"
        )


def _has_2d_convolutions(model: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.modules())
