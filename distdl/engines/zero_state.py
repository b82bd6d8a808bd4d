"""What a stage of ZeRO has of a run's state, in the terms of every other engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
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
from distdl.engines.shards import fill, pieces_of
from distdl.errors import Incompatible
from distdl.pieces import Piece, Saved


@dataclass(frozen=True)
class Slice:
    """What the optimiser sees as one parameter: this rank's fp32 [n] of a flat buffer, and what is in it."""

    tensor: Tensor
    parameters: Mapping[str, nn.Parameter]


class State:
    """Stage 0: every rank has everything. The other stages replace what differs. All ranks call the methods
    in one order; those that load may communicate.

    `weights` are what this rank holds of each parameter, by name, tied ones under each of theirs. `shapes`
    are those of the whole model's tensors.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.weights = weights_of(model)
        self.shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}

    def held(self) -> dict[str, Piece]:
        """``model/<name>`` and ``optim/<slot>/<name>``. Local."""
        return pieces_of(state_by_name(self.model, self.optimizer))

    def pieces(self, values: Mapping[str, Tensor]) -> dict[str, Piece]:
        """Which parts of whole parameters tensors in the manner of `weights` are, by name. Local."""
        return pieces_of(values)

    def check(self, saved: Saved) -> None:
        """Raise Incompatible, touching nothing, unless `load` can take this."""
        check_shapes(self.shapes, saved.metas)
        names = (n for n, _ in self.model.named_parameters())
        check_slots({n: self.shapes[n] for n in names}, saved.metas)

    def load(self, saved: Saved) -> None:
        load_by_name(self.model, self.optimizer, saved)

    def load_model(self, saved: Saved) -> None:
        check_shapes(self.shapes, saved.metas)
        load_model(self.model, saved)

    def weights_changed(self) -> None:
        """After somebody wrote into `weights`, for the forwards that follow. The optimiser keeps its own."""


class Sliced(State, ABC):
    """The other stages: the optimiser updates `slices` of flat buffers. `zero` is DeepSpeed's optimiser."""

    slices: list[Slice]
    zero: Any

    @abstractmethod
    def parts(self, part: Slice, value: Tensor) -> dict[str, Piece]:
        """By parameter, which part of its whole stands in `value` [n], which is shaped as the slice is."""

    def held(self) -> dict[str, Piece]:
        found = self.model_pieces()
        for part in self.slices:
            for slot, value in self.optimizer.state.get(part.tensor, {}).items():
                if not isinstance(value, Tensor):
                    continue
                sliced = value.shape == part.tensor.shape and value.ndim > 0
                every = dict.fromkeys(part.parameters, value)
                pieces = self.parts(part, value) if sliced else pieces_of(every)
                found |= {f"optim/{slot}/{name}": piece for name, piece in pieces.items()}
        return found

    def model_pieces(self) -> dict[str, Piece]:
        """``model/<name>``, of parameters and buffers."""
        weights = self.pieces(self.weights)
        buffers = {n: t for n, t in self.model.state_dict().items() if n not in self.weights}
        return {f"model/{name}": piece for name, piece in (weights | pieces_of(buffers)).items()}

    def check(self, saved: Saved) -> None:
        super().check(saved)
        if "step" not in known_slots(self.optimizer):
            return
        known = self._known(saved)
        for part in self.slices:
            names = [name for name in part.parameters if name in known]
            steps = {float(saved.whole(f"optim/step/{name}")) for name in names}
            if len(steps) > 1:
                raise Incompatible(
                    f"the checkpoint's optimiser has seen some parameters in {min(steps):g} steps and others "
                    f"in {max(steps):g}, and DeepSpeed counts them together: go on with ddp or fsdp"
                )

    def load(self, saved: Saved) -> None:
        self.check(saved)
        self.load_model(saved)
        known = self._known(saved)
        for part in self.slices:
            names = [name for name in part.parameters if name in known]
            before = self.optimizer.state.pop(part.tensor, {})
            state = {
                slot: self._read(part, slot, names, saved, before.pop(slot, None))
                for slot in (sorted(known_slots(self.optimizer)) if names else ())
            }
            if state:
                self.optimizer.state[part.tensor] = state

    def load_model(self, saved: Saved) -> None:
        check_shapes(self.shapes, saved.metas)
        fill(self.model_pieces(), saved)
        self.zero.refresh_fp32_params()
        self.weights_changed()

    def _read(self, part: Slice, slot: str, names: list[str], saved: Saved, kept: object) -> Tensor:
        """A slice's slot: into the memory that was `kept`, where it fits, since DeepSpeed has views of it."""
        keys = {name: f"optim/{slot}/{name}" for name in names}
        first = saved.metas[keys[names[0]]]
        # A parameter may be without a dimension, too: shapes do not tell its step from its state.
        sliced = slot != "step" and all(saved.metas[key].shape == self.shapes[n] for n, key in keys.items())
        shape = tuple(part.tensor.shape) if sliced else first.shape
        if isinstance(kept, Tensor) and tuple(kept.shape) == shape:
            value = kept
        else:
            value = torch.empty_like(part.tensor) if sliced else torch.empty(shape, dtype=first.dtype)
        # Zero in the padding, and for parameters that begin afresh.
        pieces = self.parts(part, value.zero_()) if sliced else {names[0]: Piece(value, shape)}
        fill({keys[name]: piece for name, piece in pieces.items() if name in keys}, saved)
        return value

    def _known(self, saved: Saved) -> set[str]:
        """The parameters of which the checkpoint has the state of this kind of optimiser, no more, no less.

        The others begin it afresh, as under every engine.
        """
        found: dict[str, set[str]] = {}
        for key in saved.metas:
            kind, _, rest = key.partition("/")
            slot, _, name = rest.partition("/")
            if kind == "optim":
                found.setdefault(name, set()).add(slot)
        wanted = known_slots(self.optimizer)
        return {name for name, slots in found.items() if slots == wanted}
