"""Neighbouring microbatches as one forward and backward, each treated as if it had a pass of its own.

BatchNorm normalises each by itself (engines/batchnorm.py). Dropout draws each one's mask from its own
stream, the same mask that it would have drawn alone, so that neither joining nor the number of ranks
changes it. Whatever else couples samples or draws random numbers cannot be treated so: `unfusable` names
what is known, `Rehearsal` finds the rest by trial.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from distdl.engines.base import Group, Pass
from distdl.engines.batchnorm import normalise_by_group, rehearsing
from distdl.errors import EngineError

T = TypeVar("T")

_DROPOUTS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Dropout: functional.dropout,
    nn.Dropout1d: functional.dropout1d,
    nn.Dropout2d: functional.dropout2d,
    nn.Dropout3d: functional.dropout3d,
    nn.AlphaDropout: functional.alpha_dropout,
    nn.FeatureAlphaDropout: functional.feature_alpha_dropout,
}
_BY_FORWARD: dict[Any, Callable[..., Tensor]] = {kind.forward: f for kind, f in _DROPOUTS.items()}
"""By method, so that a subclass with a forward of its own is left alone."""


@contextmanager
def groups_of(model: nn.Module, this: Pass) -> Iterator[None]:
    """Around the forward and backward of a pass, in every engine's `running`; local, does not block.

        with groups_of(self.module, this):
            value = loss_sum(...)
            ...backward()

    `model` is the user's, whose BatchNorm and dropout modules treat each group by itself while the block
    runs. With one group it does nothing at all. Dimension 0 of what such a module is given must hold the
    groups' rows one after another, or a fixed multiple of them; EngineError otherwise.
    """
    if len(this.groups) == 1:
        yield
        return
    streams = _Streams(this.groups)
    changed = []
    for module in model.modules():
        forward = _forward_by_group(module, this.groups, streams)
        # An instance's own forward is someone else's change to it: left alone.
        if forward is not None and "forward" not in module.__dict__:
            module.__dict__["forward"] = forward
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _forward_by_group(
    module: nn.Module, groups: tuple[Group, ...], streams: _Streams
) -> Callable[[Tensor], Tensor] | None:
    plain = type(module).forward
    if isinstance(module, _BatchNorm) and plain is _BatchNorm.forward:
        norm = module

        def normalise(x: Tensor) -> Tensor:
            if not (norm.training or (norm.running_mean is None and norm.running_var is None)):
                normal: Tensor = _BatchNorm.forward(norm, x)
                return normal
            return normalise_by_group(norm, x, _rows(x, groups, norm))

        return normalise
    drop = _BY_FORWARD.get(plain)
    if drop is None:
        return None
    dropout: Any = module

    def forward(x: Tensor) -> Tensor:
        if not dropout.training or dropout.p == 0:
            return x
        return _drop(x, _rows(x, groups, dropout), groups, streams, lambda part: drop(part, dropout.p, True))

    return forward


def _drop(
    x: Tensor,
    rows: list[int],
    groups: tuple[Group, ...],
    streams: _Streams,
    drop: Callable[[Tensor], Tensor],
) -> Tensor:
    """`drop` on each group's rows of `x`, from its own stream. Where `x` is a batch of sequences [N, T, ...]
    padded to the common length, on the group's own length: a mask is drawn for as many elements as alone.
    """
    # Backward through a recomputation would draw again, from streams that have moved on.
    if torch._C._current_graph_task_id() != -1:
        raise EngineError(
            "the model recomputes a part with dropout during backward, which microbatches run as one "
            "cannot repeat: set hardware.fuse=1"
        )
    padded = max((g.extent or 0 for g in groups), default=0)

    def one(part: Tensor, group: Group) -> Tensor:
        # Dropout on a GPU maps random numbers to elements by alignment and layout: those of a tensor alone.
        part = part if part.device.type == "cpu" else part.clone()
        own = group.extent
        if own is None or own == padded or x.ndim < 3 or x.shape[1] != padded:
            return drop(part)
        return torch.cat([drop(part[:, :own].clone()), part[:, own:]], 1)

    with streams.on(x.device) as turns:
        # One split and one cat: their backward is one cat and one split, not a full-size sum for each group.
        return _cat_like(x, [one(part, turns(i)) for i, part in enumerate(x.split(rows))])


def _cat_like(x: Tensor, parts: list[Tensor]) -> Tensor:
    """`parts` one after another, in the layout of `x`: a later mask is drawn in the order of memory."""
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda d: -strides[d])
    whole = torch.cat([part.permute(order) for part in parts], order.index(0))
    return whole.permute([order.index(d) for d in range(x.ndim)])


def _rows(x: Tensor, groups: tuple[Group, ...], module: nn.Module) -> list[int]:
    """How many of `x`'s rows belong to each group."""
    total = sum(g.rows for g in groups)
    times, rest = divmod(x.shape[0] if x.ndim else 0, total)
    if rest or not times:
        raise EngineError(
            f"{type(module).__name__} was given {tuple(x.shape)} for {len(groups)} microbatches of together "
            f"{total} rows: dimension 0 does not say whose is what. Set hardware.fuse=1"
        )
    return [g.rows * times for g in groups]


class _Streams:
    """The state of each group's random stream, on each device where something was drawn."""

    def __init__(self, groups: tuple[Group, ...]) -> None:
        self._groups = groups
        self._states: dict[torch.device, list[Tensor | None]] = {}

    @contextmanager
    def on(self, device: torch.device) -> Iterator[Callable[[int], Group]]:
        """Gives a function that puts the device's default generator into group i's stream. Afterwards the
        generator stands where it stood. States are in CPU memory: no GPU is waited for.
        """
        generator = _generator(device)
        states = self._states.setdefault(device, [None] * len(self._groups))
        before = generator.get_state()
        current: int | None = None

        def leave() -> None:
            if current is not None:
                states[current] = generator.get_state()

        def turn(i: int) -> Group:
            nonlocal current
            leave()
            state, current = states[i], i
            if state is None:
                generator.manual_seed(self._groups[i].key)
            else:
                generator.set_state(state)
            return self._groups[i]

        try:
            yield turn
            leave()
        finally:
            generator.set_state(before)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        found: torch.Generator = torch.cuda.default_generators[index]
        return found
    return torch.default_generator


def unfusable(model: nn.Module) -> str | None:
    """Why the microbatches of this model cannot be run as one, where a module is known for it."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1:
            return (
                f"{name} ({kind}) has dropout between its layers, inside one kernel: stack single layers "
                "with nn.Dropout between them"
            )
        if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
            return f"{name} ({kind}) has dropout on its attention, inside one function"
        if isinstance(module, nn.RReLU):
            return f"{name} ({kind}) draws random slopes for the whole batch"
    return None


def has_batchnorm(model: nn.Module) -> bool:
    """True where padding would enter statistics: such microbatches are joined only if they are alike."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())


class Rehearsal:
    """Forwards that leave no trace: no gradient, no statistics; buffers and random streams are put back."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around the forwards. They may raise."""
        # The objects as well: a forward that raises leaves others in their place.
        buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in self._model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        streams = self._streams()
        try:
            with torch.no_grad(), rehearsing():
                yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    setattr(module, name, buffer.copy_(value))
            random.setstate(streams[0])
            np.random.set_state(streams[1])
            for generator, state in zip(self._generators(), streams[2:], strict=True):
                generator.set_state(state)

    def watch(self, forward: Callable[[], T]) -> tuple[T, str | None]:
        """What `forward` returns, and what it did that groups cannot have done for them."""
        before, buffers = self._streams(), self._others()
        value = forward()
        names = [n for n, b in self._others().items() if n not in buffers or not _same(b, buffers[n])]
        if names:
            return value, f"the model changes buffers in its forward: {', '.join(names[:8])}"
        if not all(map(_same, self._streams(), before)):
            return value, "the model draws random numbers outside of torch's dropout modules"
        return value, None

    def _generators(self) -> list[torch.Generator]:
        cuda = [_generator(self._device)] if self._device.type == "cuda" else []
        return [torch.default_generator, *cuda]

    def _streams(self) -> list[Any]:
        states = [generator.get_state() for generator in self._generators()]
        return [random.getstate(), np.random.get_state(), *states]

    def _others(self) -> dict[str, Tensor]:
        """Copies of the buffers that are not BatchNorm's."""
        return {
            f"{prefix}.{name}".lstrip("."): buffer.detach().clone()
            for prefix, module in self._model.named_modules()
            if not isinstance(module, _BatchNorm)
            for name, buffer in module.named_buffers(recurse=False)
        }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)
