"""DeepSpeed ZeRO, stages 0 to 3 (Rajbhandari et al., 2020), with torch's optimisers.

What ZeRO shards, distdl decides (the engine's name), and everything else too: DeepSpeed runs in fp32 over
our autocast, sums where it would average, and is told where a step ends. So the mathematics are DDP's. A
parameter that no microbatch used has a gradient of zero here: the optimiser still decays it, and moves it by
its momentum.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distdl.comm import World
from distdl.engines.base import Applied, Forward, Pass, forward_of
from distdl.engines.batchnorm import RunningStatistics, refuse_sync_batchnorm
from distdl.engines.blocks import recomputable
from distdl.engines.buffers import UnkeyedBuffers
from distdl.engines.compiled import compile_forward
from distdl.engines.ema import WeightAverage, averaged
from distdl.engines.groups import groups_of
from distdl.engines.layout import Layout
from distdl.engines.optim import build_optimizer, clip_factor, freeze
from distdl.engines.precision import Precision
from distdl.engines.recompute import recompute_blocks
from distdl.engines.zero_library import load_deepspeed, start
from distdl.engines.zero_stages import state_for
from distdl.engines.zero_state import State
from distdl.errors import EngineError
from distdl.pieces import Piece, Saved
from distdl.zero_config import GROUP, deepspeed_config

if TYPE_CHECKING:
    from distdl.plan import Plan
    from distdl.recipe import Recipe


class ZeroEngine:
    """See `Engine`. The stage is the last letter of the plan's engine."""

    module: nn.Module

    def __init__(self, plan: Plan, recipe: Recipe, world: World, device: torch.device) -> None:
        self.device = device
        self._plan = plan
        self._recipe = recipe
        self._world = world
        self._stage = int(plan.engine.removeprefix("zero"))
        self._precision = Precision(plan.precision, device)
        self._layout = Layout(device, recipe.hardware.channels_last)
        self._library = load_deepspeed(plan.engine, device)

    def setup(self, model: nn.Module) -> None:
        refuse_sync_batchnorm(model)
        freeze(model, self._recipe.optim.freeze)
        _refuse_other_types(model)
        self._layout.take(model)
        self.module = model.train()
        hardware = self._recipe.hardware
        if hardware.compile:
            compile_forward(recomputable(model) if hardware.gradient_checkpointing else [model], self.device)
        if hardware.gradient_checkpointing:
            recompute_blocks(model)
        self._buffers = UnkeyedBuffers(model)
        self._statistics = RunningStatistics(model, compiled=hardware.compile)
        self._optimizer = build_optimizer(model, self._recipe.optim)
        if self._stage:
            _split_groups(self._optimizer)
        self._cast_inside(model)
        before = State(model, self._optimizer)
        _make_contiguous(model)
        config = deepspeed_config(self._plan, self._recipe)
        self._engine = start(self._library, model, self._optimizer, config, self.device)
        if not self._stage:
            self._layout.take(model)
        self._state = state_for(self._stage, model, self._optimizer, self._engine, before)
        self._average = WeightAverage(
            self._recipe.train.ema_decay, self._state.weights, self._state.shapes, self._state.pieces
        )
        touched = self._recipe.hardware.unused_parameters and self._stage == 1
        trainable = [p for p in model.parameters() if p.requires_grad]
        self._touched = trainable if touched else []
        sends = self._stage and self._world.size > 1
        self._order = _Order(trainable if sends else [], ordered=self._stage > 1)

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._layout.place(batch)

    @contextmanager
    def running(self, this: Pass, total: int) -> Iterator[Forward]:
        scale = 1.0 if self._stage else self._precision.scale

        def backward(loss_sum: Tensor) -> None:
            # DeepSpeed averages over the ranks.
            loss = loss_sum * (this.weight * self._world.size * scale / total)
            if self._touched:
                loss = _Touch.apply(loss, *self._touched)
            self._engine.backward(loss, scale_wrt_gas=False)

        self._buffers.note()
        self._engine.set_gradient_accumulation_boundary(this.last)
        if self._stage:
            # DeepSpeed multiplies by it here, and takes it out of the norm and the gradients when it steps.
            self._engine.optimizer.override_loss_scale(self._precision.scale)
        with (
            groups_of(self.module, this),
            forward_of(self._engine, self._precision.autocast(), backward) as forward,
        ):
            yield forward
        self._statistics.pass_done(this)
        self._buffers.check(self._world.size)

    def apply(self, lr: float, counts: list[int]) -> Applied:
        self._order.check(self._world)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = self._step_sharded() if self._stage else self._step_replicated()
        rescaled = self._precision.note(norm)
        if not math.isfinite(norm):
            self._statistics.discard()
            return Applied(False, norm, rescaled)
        self._average.update()
        self._statistics.update(self._world, counts)
        return Applied(True, norm)

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        self.module.eval()
        try:
            with self._averages_in_place():
                yield self.module
        finally:
            self.module.train()

    def held(self) -> dict[str, Piece]:
        return self._state.held() | self._average.held() | self._precision.held()

    def load_model(self, saved: Saved) -> None:
        self._state.load_model(averaged(saved) if self._recipe.train.ema_decay is not None else saved)

    def load(self, saved: Saved) -> None:
        self._average.check(saved.metas)
        self._precision.check(saved)
        self._state.load(saved)
        self._precision.load(saved)
        self._average.load(saved)

    def _step_sharded(self) -> float:
        """DeepSpeed unscales, finds the norm, skips what is not finite, clips, updates and gathers."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def _step_replicated(self) -> float:
        """Stage 0: the gradients lie summed on every rank. DeepSpeed would update without a look at them."""
        scale = self._precision.scale
        grads = [p.grad for p in self.module.parameters() if p.requires_grad and p.grad is not None]
        norm = float(nn.utils.get_total_norm(grads) / scale)
        if math.isfinite(norm):
            factor = clip_factor(norm, self._recipe.optim.clip_norm) / scale
            if factor != 1.0:
                torch._foreach_mul_(grads, factor)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def _averages_in_place(self) -> Iterator[None]:
        if not self._average.averages:
            yield
            return
        with self._average.in_place():
            self._state.weights_changed()
            yield
        # Collective at stage 3: not while one rank's error unwinds.
        self._state.weights_changed()

    def _cast_inside(self, model: nn.Module) -> None:
        """DeepSpeed's forward turns an autocast around it off (on CUDA): turn it on again inside.

        Replaced on the instance, so that the model stays the module that DeepSpeed hooks and names.
        """
        if self._precision.dtype is None:
            return
        forward = model.forward

        def cast(*args: Any, **kwargs: Any) -> Any:
            with self._precision.autocast():
                return forward(*args, **kwargs)

        model.forward = cast


class _Order:
    """Which gradients came in a step, and in which order.

    DeepSpeed sends them in buckets without names, from stage 2 on as they come: where a rank's model took
    another way, one parameter's gradient would be added to another's, and nobody would know.
    """

    def __init__(self, parameters: list[nn.Parameter], ordered: bool) -> None:
        self._ordered = ordered
        self._seen = array("I")
        self._watching = bool(parameters)
        for i, p in enumerate(parameters):
            p.register_post_accumulate_grad_hook(lambda _, i=i: self._seen.append(i))

    def check(self, world: World) -> None:
        """Collective. Raises EngineError on all ranks where they differ; the weights are as they were."""
        if not self._watching:
            return
        seen = self._seen if self._ordered else array("I", sorted(set(self._seen)))
        mine = zlib.crc32(seen.tobytes()) & 0xFFFFFF
        del self._seen[:]
        total, squares = world.sum_ints([mine, mine * mine])
        if total * total != world.size * squares:  # equal on every rank (Cauchy and Schwarz) or not
            raise EngineError(
                "the ranks' models used other parameters, or in another order, in this step, and ZeRO "
                "would mix their gradients: use every parameter in every microbatch, or train with "
                "hardware.engine=ddp or zero1 and hardware.unused_parameters=true"
            )


class _Touch(torch.autograd.Function):
    """The loss as it is, with a gradient of zero for every parameter.

    Stage 1 sends the gradients that there are: ranks must have those of the same parameters.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (grads[0], *(torch.zeros_like(p) for p in ctx.saved_tensors))


def _refuse_other_types(model: nn.Module) -> None:
    other = {name: p.dtype for name, p in model.named_parameters() if p.dtype != torch.float32}
    if other:
        name, dtype = next(iter(other.items()))
        raise EngineError(
            f"{len(other)} parameters are not float32, among them {name} ({dtype}). ZeRO keeps weights in "
            "float32: convert the model (model.float()) and set train.precision, or use hardware.engine=ddp"
        )


def _split_groups(optimizer: torch.optim.Optimizer) -> None:
    """DeepSpeed updates a group at a time, from one flat gradient: small groups need little room."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        size = GROUP
        for p in group["params"]:
            if size >= GROUP:
                groups.append({**group, "params": []})
                size = 0
            groups[-1]["params"].append(p)
            size += p.numel()
    optimizer.param_groups[:] = groups


def _make_contiguous(model: nn.Module) -> None:
    """Weights in channels_last would stop DeepSpeed, whose flat buffers keep no layout. That of the images
    suffices for channels_last convolutions; stage 0 restores the weights'.
    """
    for p in model.parameters():
        p.data = p.data.contiguous(memory_format=torch.contiguous_format)
