"""State that a task hands on from each window of text to the next, lane by lane.

Microbatch m of every step holds the same lanes (order `lanes`), so what it carries is kept under its number:
which rank computes it does not matter. Each rank keeps the state of its own microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from distdl.errors import Incompatible, RecipeError
from distdl.pieces import Meta, Piece, Saved
from distdl.plan import share
from distdl.tasks import Batch, Carrying, Task

if TYPE_CHECKING:
    from distdl.plan import Plan

State = dict[str, Tensor]


class Carry:
    """What this rank's microbatches carry: by number, by name, [batch.micro, ...], fp32, without a graph.

    An epoch begins with zeros. A step without a finite gradient, which updates nothing, advances the state
    all the same: its window has been read.
    """

    def __init__(self, task: Carrying, model: nn.Module, plan: Plan, rank: int, device: torch.device) -> None:
        self._task = task
        self._shapes = task.state_shapes(model)
        self._plan = plan
        self._device = device
        self._mine = range(*share(plan.microbatches, rank, plan.world_size))
        self._states = {number: self._zeros() for number in self._mine}

    def loss(self, step: int, number: int, weight: int, batch: Batch) -> Callable[[nn.Module], Tensor]:
        """The loss of microbatch `number` as a function of the model, which takes the state on, unless the
        microbatch is a repeat without weight.
        """
        fresh = self._at_begin(step) or not weight
        state = self._zeros() if fresh else self._states[number]

        def loss_sum(model: nn.Module) -> Tensor:
            value, after = self._task.loss_and_state(model, batch, state)
            if weight:
                self._states[number] = self._checked(after)
            return value

        return loss_sum

    def held(self) -> dict[str, Piece]:
        """``carry/<name>`` [batch.global, ...]: the lanes of this rank's microbatches. Local; copies."""
        begin = self._mine.start * self._plan.micro_batch
        return {
            f"carry/{name}": Piece(
                torch.cat([self._states[number][name].reshape(-1) for number in self._mine]),
                self._whole(name),
                begin * math.prod(shape),
            )
            for name, shape in self._shapes.items()
        }

    def check(self, metas: Mapping[str, Meta], step: int) -> None:
        """Raises Incompatible where a checkpoint in mid-epoch has not the state of these lanes."""
        differing = [
            f"carry/{name} is {metas[f'carry/{name}'].shape if f'carry/{name}' in metas else 'missing'}, "
            f"expected {self._whole(name)}"
            for name in self._shapes
            if f"carry/{name}" not in metas or metas[f"carry/{name}"].shape != self._whole(name)
        ]
        if differing and not self._at_begin(step):
            raise Incompatible(
                f"the checkpoint has not the state of these lanes: {'; '.join(differing[:8])}. batch.global, "
                "data.order and the model may change only where an epoch begins: undo the change, or go on "
                f"from a step that is a multiple of {self._plan.steps_per_epoch}"
            )

    def load(self, saved: Saved, step: int) -> None:
        """Read what this rank's microbatches carry; at the begin of an epoch there is nothing to. Local."""
        if self._at_begin(step):
            return
        size = self._plan.micro_batch
        for number in self._mine:
            for name, shape in self._shapes.items():
                target = self._states[number][name]
                saved.read_into(f"carry/{name}", number * size * math.prod(shape), target)

    def _at_begin(self, step: int) -> bool:
        return step % self._plan.steps_per_epoch == 0

    def _zeros(self) -> State:
        size = self._plan.micro_batch
        return {name: torch.zeros(size, *shape, device=self._device) for name, shape in self._shapes.items()}

    def _whole(self, name: str) -> tuple[int, ...]:
        return (self._plan.global_batch, *self._shapes[name])

    def _checked(self, after: Mapping[str, Tensor]) -> State:
        found = {name: tuple(t.shape[1:]) for name, t in after.items()}
        if found != self._shapes:
            raise RecipeError(f"the task's loss_and_state returned {found}, its state_shapes {self._shapes}")
        # Autocast may have made them short; what is saved has one dtype, whatever the precision.
        return {name: t.detach().float() for name, t in after.items()}


def carry_of(task: Task, model: nn.Module, plan: Plan, rank: int, device: torch.device) -> Carry | None:
    """What `task` carries over the lanes of `plan`; None for a task that carries nothing and in other orders,
    where no sample goes on from another.
    """
    if plan.order != "lanes" or not hasattr(task, "loss_and_state"):
        return None
    return Carry(cast(Carrying, task), model, plan, rank, device)
