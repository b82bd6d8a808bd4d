"""Optimisers from the recipe, and their state by parameter name."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distdl.errors import Incompatible, RecipeError, nearest

if TYPE_CHECKING:
    from distdl.recipe.named import AdamW, Sgd

_SLOTS: dict[type[torch.optim.Optimizer], set[str]] = {
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


def build_optimizer(model: nn.Module, optim: Sgd | AdamW) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters. Norms and biases (one dimension or none) are not decayed
    unless `optim.decay_norms_and_biases` says so. The learning rate is set at every step.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1 or optim.decay_norms_and_biases]
    plain = [p for p in trainable if not (p.ndim > 1 or optim.decay_norms_and_biases)]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, optim.weight_decay), (plain, 0.0))
        if group
    ]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude from training the parameters whose name matches one of `patterns` (as in file names).

    Raises RecipeError for a pattern that matches none, and where nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise RecipeError(
                f"optim.freeze: {pattern!r} matches no parameter{nearest(pattern, names) or '.'} "
                f"The model has {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
            )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError("the model has no parameter to train: all are frozen, or there is none")


def clip_factor(norm: float, clip_norm: float | None) -> float:
    """What the gradient is multiplied by so that its norm is at most `clip_norm`; 1.0 where it is already."""
    if clip_norm is None or norm + 1e-6 <= clip_norm:
        return 1.0
    return clip_norm / (norm + 1e-6)


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``model/<name>`` for parameters and buffers, ``optim/<slot>/<name>`` for optimiser state. No copies."""
    tensors = {f"model/{name}": t for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optim/{slot}/{name}"] = value
    return tensors


def load_by_name(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of `state_by_name`; or raises Incompatible, naming what differs, and touches nothing.

    State of another kind of optimiser is left out: a run that was allowed to change its own begins it afresh.
    """
    check_model(model, tensors)
    parameters = dict(model.named_parameters())
    slots = [k.split("/", 2)[1:] for k in tensors if k.startswith("optim/")]
    unknown = sorted({name for _, name in slots} - set(parameters))
    if unknown:
        raise Incompatible(
            f"the checkpoint has optimiser state for parameters the model lacks: {unknown[:8]}"
        )
    shapes = [
        f"{slot} of {name}: {tuple(tensors[f'optim/{slot}/{name}'].shape)} for a parameter of "
        f"{tuple(parameters[name].shape)}"
        for slot, name in slots
        if slot != "step" and tensors[f"optim/{slot}/{name}"].shape != parameters[name].shape
    ]
    if shapes:
        raise Incompatible(f"the checkpoint's optimiser state has other shapes: {'; '.join(shapes[:8])}")
    load_model(model, tensors)
    optimizer.state.clear()
    for slot, name in slots:
        if slot not in _SLOTS[type(optimizer)]:
            continue
        value, parameter = tensors[f"optim/{slot}/{name}"], parameters[name]
        if slot == "step":
            optimizer.state[parameter][slot] = value.clone()  # step counters stay on the CPU
        else:
            optimizer.state[parameter][slot] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def check_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise Incompatible unless the checkpoint's model tensors are exactly those of `model`."""
    have = {k.removeprefix("model/"): tuple(t.shape) for k, t in tensors.items() if k.startswith("model/")}
    want = {k: tuple(t.shape) for k, t in model.state_dict().items()}
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    shapes = [f"{k}: {have[k]} in the checkpoint, {want[k]} in the model" for k in want.keys() & have.keys()
              if have[k] != want[k]]  # fmt: skip
    if missing or extra or shapes:
        raise Incompatible(
            "the checkpoint does not fit the model"
            + (f"; missing from the checkpoint: {', '.join(missing[:8])}" if missing else "")
            + (f"; unknown to the model: {', '.join(extra[:8])}" if extra else "")
            + (f"; other shapes: {'; '.join(sorted(shapes)[:8])}" if shapes else "")
        )


@torch.no_grad()
def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``model/<name>`` tensors into the model's parameters and buffers, each in its own layout."""
    for name, target in model.state_dict().items():
        target.copy_(tensors[f"model/{name}"])
