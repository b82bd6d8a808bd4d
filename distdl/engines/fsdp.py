"""PyTorch FSDP2: parameters, gradients and optimiser state in shards, gathered a block at a time.

Gradients are summed over the ranks, in fp32, in every backward; exactly, by `ShardedTree`. Where forward and
backward run in bf16 or fp16, blocks of linear and convolution layers are gathered in it: that is what
autocast would make of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from distdl.comm import World
from distdl.comm.exchange import Exchange
from distdl.engines.base import Applied, Forward, Pass, forward_of
from distdl.engines.batchnorm import RunningStatistics, refuse_sync_batchnorm
from distdl.engines.blocks import RECURRENT, casts_whole, recomputable, sharded_units
from distdl.engines.buffers import UnkeyedBuffers
from distdl.engines.compiled import compile_forward
from distdl.engines.ema import WeightAverage, averaged, weights_of
from distdl.engines.exact import ExactReducer, equalise
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
from distdl.engines.sharded import assign
from distdl.engines.sharded_tree import ShardedTree
from distdl.engines.shards import local, pieces_of, squared_norm
from distdl.engines.usage import GradientUse, missing_gradients
from distdl.errors import EngineError
from distdl.pieces import Piece, Saved

if TYPE_CHECKING:
    from distdl.plan import Plan
    from distdl.recipe import Recipe


class FsdpEngine:
    """See `Engine`. With one rank nothing is sharded, and there is no communication.

    On the CPU `hardware.offload` changes nothing: the shards lie there already.
    """

    module: nn.Module

    def __init__(self, plan: Plan, recipe: Recipe, world: World, device: torch.device) -> None:
        self.device = device
        self._plan = plan
        self._recipe = recipe
        self._world = world
        self._precision = Precision(plan.precision, device)
        self._layout = Layout(device, recipe.hardware.channels_last)
        self._replicas = 1

    def setup(self, model: nn.Module) -> None:
        refuse_sync_batchnorm(model)
        freeze(model, self._recipe.optim.freeze)
        self.module = model.train()
        exact = self._recipe.train.reduction == "exact"
        if self._world.size == 1 and not exact:
            self._layout.take(model)
        else:
            # FSDP takes contiguous parameters only; images may be channels_last. And so it is with one rank
            # where that is to have the same bits.
            self._layout.decide(model)
        hardware = self._recipe.hardware
        units = self._units(model)
        if hardware.compile:
            compile_forward(units or [model], self.device)
        if hardware.gradient_checkpointing:
            recompute_blocks(model)
        if self._world.size > 1:
            self._shard(model, units)
        self._reducer = self._exact_reducer(model) if exact else None
        self._buffers = UnkeyedBuffers(model)
        self._statistics = RunningStatistics(model, compiled=hardware.compile)
        fills = hardware.unused_parameters and self._world.size > 1
        self._use = GradientUse(model, self._world) if fills else None
        self._optimizer = build_optimizer(model, self._recipe.optim)
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._average = WeightAverage(self._recipe.train.ema_decay, weights_of(model))

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._layout.place(batch)

    @contextmanager
    def running(self, this: Pass, total: int) -> Iterator[Forward]:
        def backward(loss_sum: Tensor) -> None:
            (loss_sum * (this.weight * self._precision.scale / total)).backward()

        self._buffers.note()
        with (
            self._reducer.passing(this) if self._reducer is not None else nullcontext(),
            groups_of(self.module, this),
            forward_of(self.module, self._precision.autocast(), backward) as forward,
        ):
            yield forward
        self._statistics.pass_done(this)
        self._buffers.check(self._world.size)

    def apply(self, lr: float, counts: list[int]) -> Applied:
        scale = self._precision.scale
        norm = self._norm() / scale
        grads = [local(p.grad) for p in self._parameters.values() if p.grad is not None]
        rescaled = self._precision.note(norm)
        if not math.isfinite(norm):
            self._statistics.discard()
            self._clear()
            return Applied(False, norm, rescaled)
        finish_statistics = self._statistics.start_update(self._world, counts)
        factor = clip_factor(norm, self._recipe.optim.clip_norm) / scale
        if factor != 1.0:
            torch._foreach_mul_(grads, factor)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._clear()
        self._average.update()
        finish_statistics()
        return Applied(True, norm)

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        self.module.eval()
        try:
            with self._average.in_place():
                try:
                    yield self.module
                finally:
                    self._reshard()
        finally:
            self.module.train()

    def held(self) -> dict[str, Piece]:
        self._reshard()
        state = pieces_of(state_by_name(self.module, self._optimizer)) | self._average.held()
        return self._without_replicas(state) | self._precision.held()

    def load_model(self, saved: Saved) -> None:
        self._reshard()
        chosen = averaged(saved) if self._recipe.train.ema_decay is not None else saved
        check_model(self.module, chosen.metas)
        load_model(self.module, chosen)

    def load(self, saved: Saved) -> None:
        self._reshard()
        self._average.check(saved.metas)
        self._precision.check(saved)
        load_by_name(self.module, self._optimizer, saved)
        self._precision.load(saved)
        self._average.load(saved)

    def _without_replicas(self, held: dict[str, Piece]) -> dict[str, Piece]:
        """With several replicas of the shards, the runs that it falls to this rank's to list: by size, as
        those who hold the same shards work out alike.
        """
        runs = [name for name, piece in held.items() if piece.begin is not None]
        replicas = assign([held[name].data.numel() for name in runs], self._replicas)
        mine = self._world.rank // (self._world.size // self._replicas)
        others = {name for name, replica in zip(runs, replicas, strict=True) if replica != mine}
        return {name: piece for name, piece in held.items() if name not in others}

    def _reshard(self) -> None:
        # The root keeps what it gathered until a backward, which an evaluation does not have.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _settle_missing_gradients(self) -> None:
        if self._use is not None:
            for name in self._use.unused():
                self._parameters[name].grad = None
        elif self._world.size > 1:
            # The same on every rank: they have just reduced the gradients of the same parameters.
            unused = [name for name, p in self._parameters.items() if p.grad is None]
            if unused:
                raise missing_gradients(unused)

    def _exact_reducer(self, model: nn.Module) -> ExactReducer | ShardedTree:
        if self._world.size == 1:
            return ExactReducer(model, self._world, Exchange(self._world, self.device), None)
        return ShardedTree(model, self._world)

    def _norm(self) -> float:
        """Collective. The global norm of the gradients, with the loss scale; waits for the device."""
        if self._world.size > 1:
            self._settle_missing_gradients()
        if self._reducer is not None:
            return float(self._reducer.reduce())
        grads = [local(p.grad) for p in self._parameters.values() if p.grad is not None]
        return math.sqrt(self._over_ranks(squared_norm(grads, self.device)))

    def _clear(self) -> None:
        if self._reducer is not None:
            self._reducer.clear()
        else:
            self._optimizer.zero_grad(set_to_none=True)

    def _over_ranks(self, squares: Tensor) -> float:
        """Collective. The sum over all shards; the same bits on every rank. Waits for the device."""
        if self._world.size == 1:
            return float(squares)
        dist.all_reduce(squares)
        return float(squares) / self._replicas

    def _units(self, model: nn.Module) -> list[nn.Module]:
        """What is gathered by itself, beside the root, which has the rest. The same at any world size."""
        hardware = self._recipe.hardware
        # One that a rank skips would leave the others waiting in its collective.
        if hardware.unused_parameters:
            return []
        # None inside a block that is recomputed: its hooks expect a first forward.
        recomputes = hardware.gradient_checkpointing
        if recomputes and recomputable(model)[0] is model:
            return []
        return [unit for unit in sharded_units(model, layers=not recomputes) if unit is not model]

    def _shard(self, model: nn.Module, units: Sequence[nn.Module]) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
        if self._recipe.train.reduction == "exact":
            equalise(model, self._world)
        mesh, offload = self._mesh(), self._offload()
        for module in units:
            module.register_forward_hook(_own_memory)
            fully_shard(module, mesh=mesh, mp_policy=self._policy(module), offload_policy=offload)
        fully_shard(model, mesh=mesh, offload_policy=offload)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                _sum_gradients(module, fills=self._recipe.hardware.unused_parameters)
        if self.device.type == "cuda" and any(isinstance(m, RECURRENT) for m in model.modules()):
            # A gathered weight has memory of its own: cuDNN copies those of a layer together at each call.
            warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous")

    def _mesh(self) -> DeviceMesh:
        nodes, size = self._plan.nodes, self._world.size
        if not self._recipe.hardware.hybrid_shard or nodes == 1:
            return init_device_mesh(self.device.type, (size,), mesh_dim_names=("shard",))
        if size % nodes:
            raise EngineError(
                f"hardware.hybrid_shard needs equally many processes on each node; {size} processes on "
                f"{nodes} nodes were given: use {size // nodes * nodes}, or hardware.hybrid_shard=false"
            )
        self._replicas = nodes
        return init_device_mesh(
            self.device.type, (nodes, size // nodes), mesh_dim_names=("replicate", "shard")
        )

    def _offload(self) -> OffloadPolicy:
        wanted = self._recipe.hardware.offload == "parameters" and self.device.type == "cuda"
        return CPUOffloadPolicy() if wanted else OffloadPolicy()

    def _policy(self, unit: nn.Module) -> MixedPrecisionPolicy:
        # In exact mode autocast casts, as it does with one rank.
        gathers = casts_whole(unit) and self._recipe.train.reduction == "fast"
        dtype = self._precision.dtype if gathers else None
        # Inputs are cast by autocast, where it casts them, and nowhere else.
        return MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _own_memory(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """A forward hook: what a unit returns, in memory of its own."""
    # FSDP's hook on a view is lost, in silence, where the view is changed in place. What a recurrent layer
    # with batch_first returns is one.
    if type(output) is tuple:
        return tuple(_own_memory(_module, None, part) for part in output)
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def _sum_gradients(module: FSDPModule, *, fills: bool) -> None:
    """Sum, where FSDP by itself would average. `fills`: zeros for parameters without a gradient."""
    # Newer torch calls it by another name, and must be told not to fold the factor into the collective,
    # which gloo cannot do.
    if hasattr(module, "set_gradient_divide_factor"):
        module.set_gradient_divide_factor(1.0)
    else:
        module.set_reduce_scatter_divide_factor(1.0)
    if hasattr(module, "set_force_sum_reduction_for_comms"):
        module.set_force_sum_reduction_for_comms(True)
    if fills and not hasattr(module, "set_reduce_scatter_unused_params"):
        raise EngineError(
            "hardware.unused_parameters with hardware.engine=fsdp needs a newer torch than "
            f"{torch.__version__} (FSDPModule.set_reduce_scatter_unused_params): use hardware.engine=ddp"
        )
    if fills:
        module.set_reduce_scatter_unused_params(True, recurse=False)
