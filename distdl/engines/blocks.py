"""The parts that a model is built from: what is sharded, and what is recomputed, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

RECURRENT = nn.RNNBase
"""Runs all of its layers in one call, with all of its weights."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_UNCALLED = (nn.ModuleList, nn.ModuleDict)  # these only hold: what they hold is called
_LISTS = (*_UNCALLED, nn.Sequential)
_LEAST = 2**16


def blocks(model: nn.Module, *, layers: bool = True) -> list[nn.Module]:
    """The parts of `model`, none inside another, in the order in which it holds them.

    A part is an element of a list, or a child that holds no list. Of a Sequential, the elements; of one that
    is an element itself (a stage of a few layers), the whole; of one whose elements are single layers, those
    layers, or the whole where `layers` is false. Each is called as a whole: what is below is never split.
    """
    found: list[nn.Module] = []
    for part in _parts(model, layers):
        if not any(part is other for other in found):
            found.append(part)
    return found


def _parts(module: nn.Module, layers: bool) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential) and not layers and not any(map(_composite, module)):
        yield module
        return
    for child in module.children():
        holds_lists = any(isinstance(m, _LISTS) for m in child.modules())
        if isinstance(child, _UNCALLED) or (holds_lists and not isinstance(module, _LISTS)):
            yield from _parts(child, layers)
        else:
            yield child


def _composite(module: nn.Module) -> bool:
    return next(module.children(), None) is not None or isinstance(module, RECURRENT)


def sharded_units(model: nn.Module, *, layers: bool = True, least: int = _LEAST) -> list[nn.Module]:
    """The blocks that are gathered and freed each by itself: those of at least `least` elements that share no
    parameter with the rest of the model. All else stays with the root, so a tied weight is in one group.
    """
    parts = blocks(model, layers=layers)
    part_of = {module: i for i, part in enumerate(parts) for module in part.modules()}
    users: dict[nn.Parameter, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, set()).add(part_of.get(module, -1))
    return [
        part
        for i, part in enumerate(parts)
        if sum(p.numel() for p in part.parameters()) >= least
        and all(users[p] == {i} for p in part.parameters())
    ]


def recomputable(model: nn.Module) -> list[nn.Module]:
    """The blocks that are worth recomputing: of several layers, or recurrent. A model that has none is one
    block itself.
    """
    return [b for b in blocks(model, layers=False) if _composite(b)] or [model]


def casts_whole(unit: nn.Module) -> bool:
    """Whether autocast would cast every parameter of `unit` for every use: linear and convolution layers."""
    kinds = (nn.Linear, *_CONVOLUTIONS)
    return all(isinstance(m, kinds) for m in unit.modules() if has_parameters(m))


def has_parameters(module: nn.Module) -> bool:
    """Whether it has some of its own, beside those of its children."""
    return next(module.parameters(recurse=False), None) is not None
