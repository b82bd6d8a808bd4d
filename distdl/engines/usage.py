"""Which parameters got a gradient in a step, on any rank."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distdl.comm import World
from distdl.errors import EngineError


class GradientUse:
    """For an engine that fills the gradients of unused parameters with zeros, so that all ranks reduce alike.

    A parameter that no rank used must be left alone by the optimiser: a zero would decay it.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        self._names = [n for n, p in model.named_parameters() if p.requires_grad]
        self._used: set[str] = set()
        self._watched: set[Tensor] = set()
        model.register_forward_pre_hook(self._watch)

    def unused(self) -> list[str]:
        """Collective, once a step: the parameters that no rank used in it, in the model's order."""
        counts = self._world.sum_ints([int(name in self._used) for name in self._names])
        self._used = set()
        return [name for name, count in zip(self._names, counts, strict=True) if not count]

    def _watch(self, model: nn.Module, _inputs: Any) -> None:
        # Here and not at the start: what autograd sees exists only once it was gathered.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter not in self._watched:
                self._watched.add(parameter)
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._used.add(name))


def missing_gradients(unused: list[str]) -> EngineError:
    return EngineError(
        f"some parameters got no gradient in this step: {', '.join(unused[:8])}. Freeze them "
        "(requires_grad=False), use them in the loss, or set hardware.unused_parameters=true"
    )
