"""Where DeepSpeed keeps what it shards: the stages of ZeRO.

DeepSpeed lays parameters end to end in flat buffers, one or more a parameter group, and gives the optimiser
this rank's slice of each. At stages 1 and 2 a slice is a run of the buffer, which may begin or end inside a
parameter. At stage 3 every parameter is cut into equally many pieces, the last padded, and a slice holds this
rank's pieces. The attributes of DeepSpeed's optimisers that are read here stand in `_NEEDED`; they were seen
in DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distdl.engines.ema import weights_of
from distdl.engines.zero_state import Slice, Sliced, State
from distdl.errors import EngineError
from distdl.pieces import Piece

_FLAT = (
    "bit16_groups_flat",
    "parallel_partitioned_bit16_groups",
    "single_partition_of_fp32_groups",
    "_link_all_hp_params",
    "refresh_fp32_params",
)
_NEEDED = {
    1: _FLAT,
    2: _FLAT,
    3: (
        "fp32_partitioned_groups_flat",
        "fp16_partitioned_groups_flat",
        "fp16_groups",
        "grad_position",
        "get_param_id",
        "persistent_parameters",
        "refresh_fp32_params",
    ),
}


class Flattened(Sliced):
    """Stages 1 and 2: whole weights on every rank, the optimiser's fp32 copy and state in runs."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, zero: Any) -> None:
        super().__init__(model, optimizer)
        self.zero = zero
        self._rank = dist.get_rank()
        _share(
            zero.single_partition_of_fp32_groups,
            [parts[self._rank] for parts in zero.parallel_partitioned_bit16_groups],
        )
        zero._link_all_hp_params()  # its views of the former copies would keep them alive
        self._begin: dict[str, int] = {}
        self.slices = []
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for flat, group in zip(zero.bit16_groups_flat, optimizer.param_groups, strict=True):
            # Parameters are views of the flat buffer, in an order that is DeepSpeed's own.
            end = flat.data_ptr() + flat.numel() * flat.element_size()
            inside = {n: p for n, p in trainable.items() if flat.data_ptr() <= p.data_ptr() < end}
            for name, p in inside.items():
                self._begin[name] = (p.data_ptr() - flat.data_ptr()) // flat.element_size()
            self.slices.append(Slice(group["params"][0], inside))
        _expect(self._begin.keys() == trainable.keys())

    def parts(self, part: Slice, value: Tensor) -> dict[str, Piece]:
        first = self._rank * value.numel()
        found = {}
        for name, p in part.parameters.items():
            begin = self._begin[name]
            lo, hi = max(begin, first), min(begin + p.numel(), first + value.numel())
            if lo < hi:
                found[name] = Piece(value[lo - first : hi - first], self.shapes[name], lo - begin)
        return found


class Partitioned(Sliced):
    """Stage 3: weights, too, are cut; `weights` are this rank's flat pieces."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        zero: Any,
        shapes: dict[str, tuple[int, ...]],
    ) -> None:
        self.model, self.optimizer, self.shapes = model, optimizer, shapes
        self.zero = zero
        self._rank = dist.get_rank()
        self.weights = {name: _shard(p) for name, p in weights_of(model).items()}
        _share(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat)
        names = {id(p): name for name, p in model.named_parameters()}
        self.slices = [
            Slice(flat, {names[id(p)]: p for p in group})
            for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        ]

    def pieces(self, values: Mapping[str, Tensor]) -> dict[str, Piece]:
        found = {name: self._piece(name, value) for name, value in values.items()}
        return {name: piece for name, piece in found.items() if piece is not None}

    def parts(self, part: Slice, value: Tensor) -> dict[str, Piece]:
        found = {}
        for name, p in part.parameters.items():
            _, begin, numel = self.zero.grad_position[self.zero.get_param_id(p)]
            found[name] = value[begin : begin + numel]
        return self.pieces(found)

    def _piece(self, name: str, padded: Tensor) -> Piece | None:
        """What this rank's [n] has of a parameter: the last ranks' end in padding, or are nothing else."""
        shape = self.shapes[name]
        begin = self._rank * padded.numel()
        numel = min(padded.numel(), math.prod(shape) - begin)
        return Piece(padded.detach()[:numel], shape, begin) if numel > 0 else None

    def weights_changed(self) -> None:
        # What earlier forwards left gathered is of the former weights. DeepSpeed gathers all again when it
        # needs it, but for the small ones, which it expects to find.
        self.zero.empty_partition_cache()
        kept = self.zero.persistent_parameters
        if kept:
            kept[0].all_gather(kept)


def state_for(
    stage: int, model: nn.Module, optimizer: torch.optim.Optimizer, engine: Any, before: State
) -> State:
    """The state of DeepSpeed's `engine`; `before` is that of the model as it was given to it.

    Raises EngineError where this version of DeepSpeed keeps its shards in another way.
    """
    if stage == 0:
        return State(model, optimizer)
    missing = [name for name in _NEEDED[stage] if not hasattr(engine.optimizer, name)]
    _expect(not missing, missing)
    if stage == 3:
        return Partitioned(model, optimizer, engine.optimizer, before.shapes)
    return Flattened(model, optimizer, engine.optimizer)


def _share(masters: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Let the optimiser write into the weights themselves where both lie on one device.

    DeepSpeed updates a copy in fp32 and copies it into the weights, which are often bf16; here both are fp32.
    """
    for master, weight in zip(masters, weights, strict=True):
        if master.device == weight.device and master.dtype == weight.dtype and master.shape == weight.shape:
            master.data = weight.data


def _shard(p: Any) -> Tensor:
    shard: Tensor = p.ds_tensor
    return shard


def _expect(right: bool, missing: object = "another order of parameters") -> None:
    if not right:
        from importlib.metadata import version

        raise EngineError(
            f"DeepSpeed {version('deepspeed')} keeps its shards in a way that distdl does not know "
            f"({missing}): distdl was made for 0.19.8. Install that, or choose hardware.engine=fsdp"
        )
