"""Optimiser state of another library, by the model's parameter names, where it can be told which is whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distdl.checkpoint.convert.names import rename

_FACTORED = ("row_var", "col_var")
"""Slots of Adafactor, which do not have their parameter's shape."""

Shapes = Mapping[str, tuple[int, ...]]


class Unknown(Exception):
    """Why the state was left out."""


def slots_by_name(
    optimizers: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    shapes: Shapes,
    renamings: Mapping[str, str],
) -> tuple[dict[str, Tensor], list[str]]:
    """``optim/<slot>/<parameter>`` of the one optimiser of a source, and notes on what was left out.

    `names` are the pairs of weights (the model's name -> the source's) and `shapes` are of the model's
    parameters, in their order. Numbered state belongs to parameters in that order if there is as much of it,
    all in one group, and the shapes agree; otherwise none of it is taken.
    """
    if not optimizers:
        return {}, []
    if len(optimizers) > 1:
        return {}, [f"optimiser state left out: there are {len(optimizers)} optimisers, expected one"]
    try:
        by_name = _named(optimizers[0], [name for name in shapes if name in names], renamings)
        return _checked(by_name, shapes), []
    except Unknown as why:
        return {}, [f"optimiser state left out: {why}"]


def _named(
    optimizer: Mapping[str, Any], order: Sequence[str], renamings: Mapping[str, str]
) -> dict[str, Mapping[str, Any]]:
    state: Mapping[Any, Mapping[str, Any]] = optimizer["state"]
    if all(isinstance(key, str) for key in state):
        return {rename(key, renamings): slots for key, slots in state.items()}
    groups = optimizer.get("param_groups") or []
    numbers = [number for group in groups for number in group["params"]]
    told = [name for group in groups for name in group.get("param_names", ())]
    if told:
        order = [rename(name, renamings) for name in told]
    elif len(groups) != 1:
        raise Unknown(f"its parameters are numbered over {len(groups)} groups, which do not say their names")
    if len(numbers) != len(order):
        raise Unknown(f"it is of {len(numbers)} parameters, the model has {len(order)}")
    name_of = dict(zip(numbers, order, strict=True))
    return {name_of[number]: slots for number, slots in state.items()}


def _checked(by_name: Mapping[str, Mapping[str, Any]], shapes: Shapes) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, slots in by_name.items():
        if name not in shapes:
            raise Unknown(f"the model has no parameter {name!r}")
        for slot, value in slots.items():
            if not isinstance(value, Tensor | int | float):
                continue  # None: a momentum before its first step
            tensor = torch.as_tensor(value).detach()
            if tensor.is_floating_point() or slot == "step":
                tensor = tensor.float()
            if tensor.ndim and slot not in _FACTORED and tuple(tensor.shape) != shapes[name]:
                raise Unknown(f"{slot} of {name} is {list(tensor.shape)}, the parameter {list(shapes[name])}")
            result[f"optim/{slot}/{name}"] = tensor
    return result
