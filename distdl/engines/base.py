"""`Engine`: how a step's microbatches become one update. One file an engine; nothing outside asks which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from distdl.pieces import Piece, Saved


@dataclass(frozen=True)
class Applied:
    """What `Engine.apply` did. `grad_norm` is the global norm before clipping; not finite: no update.

    `rescaled`: it was not finite because the loss scale of fp16 was too large, and that has been lowered.
    """

    updated: bool
    grad_norm: float
    rescaled: bool = False


@dataclass(frozen=True)
class Group:
    """One microbatch inside a pass: its number in the step, its count, its rows (dimension 0 of its tensors).

    `key` seeds whatever the model draws for it. `extent` is the size of its own dimension 1, where the
    microbatches of a pass were padded to a common one; None where they were alike.
    """

    number: int
    count: int
    rows: int
    key: int
    extent: int | None = None


@dataclass(frozen=True)
class Pass:
    """One forward and backward: one microbatch, or neighbours that are run as one.

    `weight` 0 is a repeat that only takes part in the communication. `last`: this rank's last of the step.
    `microbatches`: how many the step has, over all ranks.
    """

    groups: tuple[Group, ...]
    weight: int
    last: bool
    microbatches: int = 1


class Forward:
    """A pass that is under way: `module` computes its loss, `backward` takes that, once."""

    def __init__(self, module: nn.Module, autocast: ExitStack, backward: Callable[[Tensor], None]) -> None:
        self.module = module
        self._autocast = autocast
        self._backward = backward

    def backward(self, loss_sum: Tensor) -> None:
        """Add the gradient of the pass. `loss_sum` (scalar) has been computed by `module`."""
        self._autocast.close()  # what is not to go on in the backward
        self._backward(loss_sum)


@contextmanager
def forward_of(
    module: nn.Module, autocast: AbstractContextManager[None], backward: Callable[[Tensor], None]
) -> Iterator[Forward]:
    """What an engine's `running` yields: inside `autocast` until `Forward.backward` is called."""
    with ExitStack() as inside:
        inside.enter_context(autocast)
        yield Forward(module, inside, backward)


class Engine(Protocol):
    """All ranks call every method in the same order. `setup` comes first."""

    module: nn.Module
    """The user's model, unwrapped; evaluate inside `evaluating` alone."""

    device: torch.device

    def setup(self, model: nn.Module) -> None:
        """Take the model to the device and build the optimiser. Blocks until all ranks have.

        Raises EngineError for a model that this engine cannot train, RecipeError for unsuitable keys.
        """

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch on this engine's device, images in its memory layout."""

    def running(self, this: Pass, total: int) -> AbstractContextManager[Forward]:
        """Around forward and backward of one pass, which both have to happen inside.

        `Forward.backward` adds the gradient of ``weight * loss_sum / total``, where `total` is the count of
        the whole step over all ranks. The random streams have been seeded for a pass of one microbatch.
        """

    def apply(self, lr: float, counts: list[int]) -> Applied:
        """Reduce, check that all is finite, clip, update with learning rate `lr`.

        `counts` says how many real microbatches each rank ran. All ranks update or none does.
        """

    def evaluating(self) -> AbstractContextManager[nn.Module]:
        """Collective. The model in evaluation mode, with averaged weights where the recipe keeps them; in
        training mode again afterwards. With an engine that `gathers`, ranks must call it equally often.
        """

    def held(self) -> dict[str, Piece]:
        """What this rank holds of the state, by name: ``model/<name>``, ``optim/<slot>/<name>``,
        ``ema/<name>``, ``scaler/<name>``. Local, no communication. Views: copy before a step.
        """

    def load_model(self, saved: Saved) -> None:
        """Collective. Take the weights alone, to evaluate with: ``ema/`` where the recipe keeps an average
        and there is one, else ``model/``. Raises as `load` does.
        """

    def load(self, saved: Saved) -> None:
        """Collective. Take a state that any engine held, at any world size. A rank reads what it holds, one
        tensor or run at a time, straight into its own.

        Raises Incompatible on every rank where `saved.metas` do not fit, and has touched nothing. What cannot
        be read raises CheckpointError on the ranks that read it, and the state is then undefined: other ranks
        may be waiting, so call it inside `alone`.
        """


def microstep(engine: Engine, loss_sum: Callable[[nn.Module], Tensor], this: Pass, total: int) -> Tensor:
    """Forward and backward of one pass; returns its detached loss sum (scalar, on the device)."""
    with engine.running(this, total) as forward:
        value = loss_sum(forward.module)
        forward.backward(value)
    return value.detach()
