"""`Engine`: how a step's microbatches become one update. One file an engine; nothing outside asks which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Applied:
    """What `Engine.apply` did. `grad_norm` is the global norm before clipping; not finite: no update."""

    updated: bool
    grad_norm: float


class Engine(Protocol):
    """All ranks call every method in the same order. `setup` comes first."""

    module: nn.Module
    """The user's model, unwrapped: evaluate with this."""

    device: torch.device

    def setup(self, model: nn.Module) -> None:
        """Take the model to the device and build the optimiser. Blocks until all ranks have."""

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch on this engine's device, images in its memory layout."""

    def microstep(
        self, loss_sum: Callable[[nn.Module], Tensor], count: int, total: int, *, weight: int, last: bool
    ) -> Tensor:
        """Forward and backward of one microbatch; returns its detached loss sum (scalar, on the device).

        Adds the gradient of ``loss_sum / total`` times `weight`. `count` is this microbatch's own count,
        `total` that of the whole step over all ranks; `last` marks this rank's last microbatch of the step.
        """

    def apply(self, lr: float, counts: list[int]) -> Applied:
        """Reduce, check that all is finite, clip, update with learning rate `lr`.

        `counts` says how many real microbatches each rank ran. All ranks update or none does.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The state by name: ``model/<name>`` and ``optim/<slot>/<name>``. Views: copy before a step."""

    def load_model(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the ``model/`` tensors alone, to evaluate with. Raises Incompatible and touches nothing."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a state that any engine's `tensors` returned, or raise Incompatible and touch nothing."""
