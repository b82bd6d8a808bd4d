"""Whole tensors from DeepSpeed's slices, and back: what makes a checkpoint of ZeRO fit every other engine.

DeepSpeed lays parameters end to end in flat buffers, one or more a parameter group, and gives the optimiser
this rank's slice of each. At stages 1 and 2 a slice is a run of the buffer, which may begin or end inside a
parameter. At stage 3 every parameter is cut into equally many pieces, the last padded, and a slice holds this
rank's pieces. The attributes of DeepSpeed's optimisers that are read here stand in `_NEEDED`; they were seen
in DeepSpeed 0.19.8.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distdl.engines.ema import weights_of
from distdl.engines.optim import (
    check_shapes,
    check_slots,
    known_slots,
    load_by_name,
    load_model,
    state_by_name,
)
from distdl.errors import EngineError, Incompatible

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

_AT_ONCE = 2**22
"""Elements of each rank that are gathered at once."""


@dataclass(frozen=True)
class Slice:
    """What the optimiser sees as one parameter: this rank's fp32 [n] of a flat buffer, and what is in it."""

    tensor: Tensor
    parameters: Mapping[str, nn.Parameter]


class State:
    """Stage 0: every rank has everything. The other stages replace what differs. All methods are collective.

    `weights` are what this rank holds of each parameter, by name, tied ones under each of theirs.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.weights = weights_of(model)
        self.shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        return state_by_name(self.model, self.optimizer)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise Incompatible, touching nothing, unless `load` can take these."""
        check_shapes(self.shapes, tensors)
        names = (n for n, _ in self.model.named_parameters())
        check_slots({n: self.shapes[n] for n in names}, tensors)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        load_by_name(self.model, self.optimizer, tensors)

    def load_model(self, tensors: Mapping[str, Tensor]) -> None:
        check_shapes(self.shapes, tensors)
        load_model(self.model, tensors)

    def whole(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from what the ranks hold, in the manner of `weights`."""
        return dict(held)

    def held(self, name: str, whole: Tensor) -> Tensor:
        """What this rank holds of a whole parameter, in the shape of ``weights[name]``."""
        return whole

    def weights_changed(self) -> None:
        """After somebody wrote into `weights`, for the forwards that follow. The optimiser keeps its own."""


class _Sliced(State, ABC):
    slices: list[Slice]

    @abstractmethod
    def gathered(self, part: Slice, value: Tensor) -> dict[str, Tensor]:
        """Whole tensors, on the CPU, from every rank's `value` [n], which is shaped as the slice is."""

    @abstractmethod
    def cut(self, part: Slice, wholes: Mapping[str, Tensor]) -> Tensor:
        """This rank's [n] of whole tensors; zero where one is not given, and in the padding."""

    def tensors(self) -> dict[str, Tensor]:
        return self.model_tensors() | self._slots()

    def model_tensors(self) -> dict[str, Tensor]:
        return {f"model/{name}": t for name, t in self.model.state_dict().items()}

    def _slots(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self.slices:
            for slot, value in self.optimizer.state.get(part.tensor, {}).items():
                if not isinstance(value, Tensor):
                    continue
                sliced = value.shape == part.tensor.shape and value.ndim > 0
                wholes = self.gathered(part, value) if sliced else dict.fromkeys(part.parameters, value)
                found |= {f"optim/{slot}/{name}": t for name, t in wholes.items()}
        return found

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        super().check(tensors)
        if "step" not in known_slots(self.optimizer):
            return
        for part in self.slices:
            steps = {float(tensors[f"optim/step/{name}"]) for name in self._fitting(part, tensors)}
            if len(steps) > 1:
                raise Incompatible(
                    f"the checkpoint's optimiser has seen some parameters in {min(steps):g} steps and others "
                    f"in {max(steps):g}, and DeepSpeed counts them together: go on with ddp or fsdp"
                )

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.check(tensors)
        self.load_model(tensors)
        for part in self.slices:
            before = self.optimizer.state.pop(part.tensor, {})
            state = self._state_of(part, tensors)
            for slot, value in state.items():
                kept = before.get(slot)
                # Into the same memory: DeepSpeed keeps views of it.
                if isinstance(kept, Tensor) and kept.shape == value.shape:
                    state[slot] = kept.copy_(value)
            if state:
                self.optimizer.state[part.tensor] = state

    def _state_of(self, part: Slice, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        names = self._fitting(part, tensors)
        for slot in sorted(known_slots(self.optimizer)) if names else ():
            given = {name: tensors[f"optim/{slot}/{name}"] for name in names}
            # A parameter may be without a dimension, too: shapes do not tell its step from its state.
            whole = slot != "step" and all(tuple(t.shape) == self.shapes[n] for n, t in given.items())
            state[slot] = self.cut(part, given) if whole else given[names[0]].clone()
        return state

    def _fitting(self, part: Slice, tensors: Mapping[str, Tensor]) -> list[str]:
        """The parameters of which the checkpoint has the state of this kind of optimiser, no more, no less.

        The others begin it afresh, as under every engine.
        """
        found: dict[str, set[str]] = {name: set() for name in part.parameters}
        for key in tensors:
            kind, _, rest = key.partition("/")
            slot, _, name = rest.partition("/")
            if kind == "optim" and name in found:
                found[name].add(slot)
        wanted = known_slots(self.optimizer)
        return [name for name, slots in found.items() if slots == wanted]


class Flattened(_Sliced):
    """Stages 1 and 2: whole weights on every rank, the optimiser's fp32 copy and state in runs."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, zero: Any) -> None:
        super().__init__(model, optimizer)
        self._zero = zero
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
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

    def load_model(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_model(tensors)
        self._zero.refresh_fp32_params()

    def gathered(self, part: Slice, value: Tensor) -> dict[str, Tensor]:
        flat = _gather(value).flatten()
        return {
            name: flat[self._begin[name] : self._begin[name] + p.numel()].view(p.shape).clone()
            for name, p in part.parameters.items()
        }

    def cut(self, part: Slice, wholes: Mapping[str, Tensor]) -> Tensor:
        mine = torch.zeros_like(part.tensor)
        first = self._rank * mine.numel()
        for name, whole in wholes.items():
            begin = self._begin[name]
            lo, hi = max(begin, first), min(begin + whole.numel(), first + mine.numel())
            if lo < hi:
                mine[lo - first : hi - first] = whole.reshape(-1)[lo - begin : hi - begin]
        return mine


class Partitioned(_Sliced):
    """Stage 3: weights, too, are cut; `weights` are this rank's flat pieces."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        zero: Any,
        shapes: dict[str, tuple[int, ...]],
    ) -> None:
        self.model, self.optimizer, self.shapes = model, optimizer, shapes
        self._zero = zero
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self.weights = {name: _piece(p) for name, p in weights_of(model).items()}
        _share(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat)
        names = {id(p): name for name, p in model.named_parameters()}
        self.slices = [
            Slice(flat, {names[id(p)]: p for p in group})
            for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        ]

    def model_tensors(self) -> dict[str, Tensor]:
        wholes = self.whole(self.weights)
        return {f"model/{n}": wholes.get(n, t) for n, t in self.model.state_dict().items()}

    @torch.no_grad()
    def load_model(self, tensors: Mapping[str, Tensor]) -> None:
        check_shapes(self.shapes, tensors)
        for name, piece in self.weights.items():
            piece.copy_(self.held(name, tensors[f"model/{name}"]))
        for name, buffer in self.model.state_dict().items():
            if name not in self.weights:
                buffer.copy_(tensors[f"model/{name}"])
        self._zero.refresh_fp32_params()
        self.weights_changed()

    def whole(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._joined(name, _gather(piece)) for name, piece in held.items()}

    def held(self, name: str, whole: Tensor) -> Tensor:
        piece = torch.zeros_like(self.weights[name], dtype=whole.dtype)
        mine = whole.reshape(-1)[self._rank * piece.numel() : (self._rank + 1) * piece.numel()]
        piece[: mine.numel()] = mine
        return piece

    def weights_changed(self) -> None:
        # What earlier forwards left gathered is of the former weights. DeepSpeed gathers all again when it
        # needs it, but for the small ones, which it expects to find.
        self._zero.empty_partition_cache()
        kept = self._zero.persistent_parameters
        if kept:
            kept[0].all_gather(kept)

    def gathered(self, part: Slice, value: Tensor) -> dict[str, Tensor]:
        every = _gather(value)
        found = {}
        for name, p in part.parameters.items():
            begin, numel = self._place(p)
            found[name] = self._joined(name, every[:, begin : begin + numel])
        return found

    def cut(self, part: Slice, wholes: Mapping[str, Tensor]) -> Tensor:
        mine = torch.zeros_like(part.tensor)
        for name, whole in wholes.items():
            begin, numel = self._place(part.parameters[name])
            mine[begin : begin + numel] = self.held(name, whole)
        return mine

    def _place(self, p: nn.Parameter) -> tuple[int, int]:
        _, begin, numel = self._zero.grad_position[self._zero.get_param_id(p)]
        return begin, numel

    def _joined(self, name: str, pieces: Tensor) -> Tensor:
        shape = torch.Size(self.shapes[name])
        return pieces.reshape(-1)[: shape.numel()].view(shape).clone()


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


def _piece(p: Any) -> Tensor:
    piece: Tensor = p.ds_tensor
    return piece


def _gather(value: Tensor) -> Tensor:
    """Every rank's [n], in rank order: [ranks, n], on the CPU: the GPU may have no room for it."""
    mine = value.detach().contiguous()
    every = torch.empty((dist.get_world_size(), mine.numel()), dtype=mine.dtype)
    for begin in range(0, mine.numel(), _AT_ONCE):
        some = mine[begin : begin + _AT_ONCE]
        parts = [torch.empty_like(some) for _ in range(len(every))]
        dist.all_gather(parts, some)
        for rank, part in enumerate(parts):
            every[rank, begin : begin + _AT_ONCE] = part
    return every


def _expect(right: bool, missing: object = "another order of parameters") -> None:
    if not right:
        from importlib.metadata import version

        raise EngineError(
            f"DeepSpeed {version('deepspeed')} keeps its shards in a way that distdl does not know "
            f"({missing}): distdl was made for 0.19.8. Install that, or choose hardware.engine=fsdp"
        )
