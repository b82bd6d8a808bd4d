"""The model on every rank, gradients summed during the last backward: by torch's DDP, or exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from distdl.comm import World
from distdl.comm.exchange import Exchange
from distdl.engines.base import Applied, Forward, Pass, forward_of
from distdl.engines.batchnorm import RunningStatistics, refuse_sync_batchnorm
from distdl.engines.blocks import recomputable
from distdl.engines.buffers import UnkeyedBuffers
from distdl.engines.compiled import compile_forward
from distdl.engines.ema import WeightAverage, averaged, weights_of
from distdl.engines.exact import ExactReducer
from distdl.engines.fast import FastReducer
from distdl.engines.groups import groups_of
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
from distdl.engines.recompute import recompute_blocks
from distdl.engines.sharded import Shards
from distdl.engines.shards import pieces_of
from distdl.pieces import Piece, Saved

if TYPE_CHECKING:
    from distdl.plan import Plan
    from distdl.recipe import Recipe


class Reducer(Protocol):
    """Makes one sum of the gradients of a step's microbatches. All ranks call all methods in one order."""

    @property
    def forward(self) -> nn.Module:
        """What computes the loss: the model, or a wrapper of it."""

    def passing(self, this: Pass) -> AbstractContextManager[None]:
        """Around the forward and backward of one pass. The last one's backward starts the reduction."""

    def reduce(self) -> Tensor:
        """Collective; blocks. Afterwards each parameter's `grad` is its sum over all microbatches, or None
        where this rank is not to update it. Returns the global norm of them all (no dimension).
        """

    def publish(self) -> None:
        """Collective, after an update: every rank gets the parameters that others updated."""

    def clear(self) -> None:
        """The end of a step, updated or not: forget the gradients."""


class DdpEngine:
    """See `Engine`. With one rank there is no communication."""

    module: nn.Module

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        world: World,
        device: torch.device,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        """`wrap`: what wraps the model in DistributedDataParallel, where that is another library."""
        self._wrap = wrap
        self.device = device
        self._plan = plan
        self._recipe = recipe
        self._world = world
        self._precision = Precision(plan.precision, device)
        self._layout = Layout(device, recipe.hardware.channels_last)

    def setup(self, model: nn.Module) -> None:
        refuse_sync_batchnorm(model)
        freeze(model, self._recipe.optim.freeze)
        self._layout.take(model)
        self.module = model.train()
        hardware = self._recipe.hardware
        if hardware.compile:
            compile_forward(recomputable(model) if hardware.gradient_checkpointing else [model], self.device)
        if hardware.gradient_checkpointing:
            recompute_blocks(model)
        self._buffers = UnkeyedBuffers(model)
        self._statistics = RunningStatistics(model, compiled=hardware.compile)
        self._shards, self._reducer = self._share_out(model)
        # The bits of a fused update depend on what is updated together: not where those are promised.
        plain = self._shards is None and self._recipe.train.reduction == "fast"
        self._optimizer = build_optimizer(
            model, self._recipe.optim, fused=plain and self.device.type == "cuda"
        )
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._average = WeightAverage(self._recipe.train.ema_decay, weights_of(model))

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._layout.place(batch)

    @contextmanager
    def running(self, this: Pass, total: int) -> Iterator[Forward]:
        def backward(loss_sum: Tensor) -> None:
            (loss_sum * (this.weight * self._precision.scale / total)).backward()

        self._buffers.note()
        with (
            self._reducer.passing(this),
            groups_of(self.module, this),
            forward_of(self._reducer.forward, self._precision.autocast(), backward) as forward,
        ):
            yield forward
        self._statistics.pass_done(this)
        self._buffers.check(self._world.size)

    def apply(self, lr: float, counts: list[int]) -> Applied:
        # After the reduction every rank knows the same norm, so all of them decide alike. It costs a GPU one
        # synchronisation a step, which reading the norm for the log would cost as well.
        scale = self._precision.scale
        norm = float(self._reducer.reduce() / scale)
        rescaled = self._precision.note(norm)
        if not math.isfinite(norm):
            self._statistics.discard()
            self._reducer.clear()
            return Applied(False, norm, rescaled)
        # Under way while the optimiser runs: nothing in a training step reads the running statistics.
        finish_statistics = self._statistics.start_update(self._world, counts)
        factor = clip_factor(norm, self._recipe.optim.clip_norm) / scale
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if factor != 1.0 and grads:
            torch._foreach_mul_(grads, factor)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._reducer.publish()
        self._reducer.clear()
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

    def held(self) -> dict[str, Piece]:
        state = state_by_name(self.module, self._optimizer)
        held = pieces_of(state) if self._shards is None else self._shards.pieces_of(state)
        return held | self._average.held() | self._precision.held()

    def load_model(self, saved: Saved) -> None:
        chosen = averaged(saved) if self._recipe.train.ema_decay is not None else saved
        check_model(self.module, chosen.metas)
        load_model(self.module, chosen)

    def load(self, saved: Saved) -> None:
        self._average.check(saved.metas)
        self._precision.check(saved)
        kept = None if self._shards is None else self._shards.names
        load_by_name(self.module, self._optimizer, saved, kept)
        self._precision.load(saved)
        self._average.load(saved)

    def _share_out(self, model: nn.Module) -> tuple[Shards | None, Reducer]:
        hardware, world = self._recipe.hardware, self._world
        exchange = Exchange(world, self.device)
        sharded = hardware.shard_optimizer and world.size > 1
        shards = Shards(model, world, exchange) if sharded else None
        if self._recipe.train.reduction == "exact":
            return shards, ExactReducer(model, world, exchange, shards)
        return shards, FastReducer(model, world, self.device, shards, hardware.unused_parameters, self._wrap)
