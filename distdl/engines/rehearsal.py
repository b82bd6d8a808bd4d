"""What an unknown optimiser keeps, found by letting a copy of it take one step on a small parameter."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distdl.errors import RecipeError

_LARGEST = 256
"""An optimiser may treat large parameters otherwise; this is large, and costs little."""


@dataclass(frozen=True)
class Kept:
    """After one step: the parameter's `state`, and what is new or has changed in its `group`."""

    state: dict[str, Any]
    group: dict[str, Any]


def rehearse(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Kept:
    """What one step keeps for a parameter like this one, each dimension at most 256. Changes nothing.

    Raises RecipeError for an optimiser whose state could not be stored by parameter and restored.
    """
    name = type(optimizer).__qualname__
    # Copied by hand: an optimiser's own idea of a copy leaves attributes out, and takes the weights along.
    copy = object.__new__(type(optimizer))
    vars(copy).update(vars(optimizer))
    tiny = _like(parameter)
    mine = {**group, "params": [tiny]}
    copy.state, copy.param_groups = defaultdict(dict), [mine]
    copy._optimizer_step_pre_hooks = OrderedDict()
    copy._optimizer_step_post_hooks = OrderedDict()
    before = _numbers(vars(copy))
    try:
        with torch.random.fork_rng(devices=[]):
            type(copy).step(copy)
    except Exception as error:
        raise RecipeError(
            f"optim.name: one step of {name} failed with {type(error).__name__}: {error}. Expected an "
            "optimiser whose step() takes no argument and updates each parameter by its gradient"
        ) from error
    lost = sorted(k for k, v in _numbers(vars(copy)).items() if before.get(k) != v)
    foreign = [k for k, v in copy.state[tiny].items() if not isinstance(v, Tensor | int | float | None)]
    foreign += ["state of something else than a parameter"] * (len(copy.state) > 1)
    if lost or foreign:
        raise RecipeError(
            f"optim.name: {name} keeps {', '.join(lost + foreign)}, which no checkpoint could hold: "
            "expected tensors and numbers in the state of each parameter"
        )
    changed = {k: v for k, v in _numbers(mine).items() if k != "lr" and (k not in group or group[k] != v)}
    return Kept(dict(copy.state[tiny]), changed)


def _like(parameter: Tensor) -> nn.Parameter:
    device = "cpu" if parameter.device.type == "meta" else parameter.device
    shape = [min(n, _LARGEST) for n in parameter.shape]
    tiny = nn.Parameter(torch.ones(shape, dtype=parameter.dtype, device=device))
    tiny.grad = torch.ones_like(tiny)
    return tiny


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if isinstance(v, int | float)}
