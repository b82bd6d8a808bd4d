"""Optimisers from the recipe, and their state by parameter name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distdl.engines.optimisers import Lamb, Lion
from distdl.engines.rehearsal import rehearse
from distdl.engines.shards import fill, pieces_of
from distdl.errors import Incompatible, RecipeError, nearest
from distdl.imports import import_attribute
from distdl.pieces import Meta, Renamed, Saved

if TYPE_CHECKING:
    from distdl.recipe.optimisers import AnyOptimiser

_BUILT_IN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
    "lion": Lion,
    "lamb": Lamb,
}

_SLOTS: dict[type[torch.optim.Optimizer], tuple[set[str], ...]] = {
    torch.optim.SGD: ({"momentum_buffer"},),
    torch.optim.AdamW: ({"step", "exp_avg", "exp_avg_sq"},),
    torch.optim.Adafactor: ({"step", "row_var", "col_var"}, {"step", "variance"}),
    Lion: ({"exp_avg"},),
    Lamb: ({"step", "exp_avg", "exp_avg_sq"},),
}
"""What a parameter has after a step; of Adafactor, a matrix or a vector. Others are rehearsed."""

_FLAT = {"row_var": -1, "col_var": -2}
"""Slots that have the parameter's shape but for this dimension, of which they have 1."""

_WHOLE = {slot for each in _SLOTS.values() for slots in each for slot in slots} - {"step", *_FLAT}
"""Slots that have the parameter's shape."""

_NUMBER, _GROUP = "number.", "group."
"""Slots that hold a Python number: of the parameter's state, or of its group's options."""

_OWN_KEYS = ("lr", "clip_norm", "freeze", "decay_norms_and_biases", "elementwise", "weight_decay")


def build_optimizer(model: nn.Module, optim: AnyOptimiser, *, fused: bool = False) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters. Norms and biases (one dimension or none) are not decayed
    unless `optim.decay_norms_and_biases` says so. The learning rate is set at every step.

    `fused` asks for torch's fused kernels, where there are: their bits depend on how parameters are sharded.
    Raises RecipeError for a class of a user's own that cannot be imported, made or saved.
    """
    given = optim.options()
    keys = {k: _tupled(v) for k, v in given.items() if k not in _OWN_KEYS}
    if fused and optim.name in ("sgd", "adamw"):
        keys["fused"] = True
    groups = _groups(model, optim, given.get("weight_decay"))
    if optim.name in _BUILT_IN:
        return _BUILT_IN[optim.name](groups, lr=optim.lr, **keys)
    return _imported(optim.name, groups, optim.lr, keys)


def _groups(model: nn.Module, optim: AnyOptimiser, decay: float | None) -> list[dict[str, Any]]:
    """Parameter groups: what is decayed (and scaled by LAMB), and the rest; or one, without a decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if decay is None:
        return [{"params": trainable}]
    decayed = [p for p in trainable if p.ndim > 1 or optim.decay_norms_and_biases]
    plain = [p for p in trainable if not (p.ndim > 1 or optim.decay_norms_and_biases)]
    adapt = [{"adapt": True}, {"adapt": False}] if optim.name == "lamb" else [{}, {}]
    groups = [{"params": decayed, "weight_decay": decay, **adapt[0]}]
    groups += [{"params": plain, "weight_decay": 0.0, **adapt[1]}]
    return [group for group in groups if group["params"]]


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _imported(
    path: str, groups: list[dict[str, Any]], lr: float, keys: dict[str, Any]
) -> torch.optim.Optimizer:
    kind = import_attribute(path, "optim.name")
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise RecipeError(f"optim.name = {path!r} is {kind!r}: expected a subclass of torch.optim.Optimizer")
    try:
        optimizer = kind(groups, lr=lr, **keys)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"optim.name = {path!r}: making it with lr and {sorted(keys)} of the recipe failed: {error}"
        ) from error
    for group in optimizer.param_groups:
        for _, alike in groupby(sorted(group["params"], key=_shape), _shape):
            rehearse(optimizer, group, next(alike))
    return optimizer


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.shape)


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
    """``model/<name>`` for parameters and buffers, ``optim/<slot>/<name>`` for optimiser state. No copies.

    Numbers that an optimiser of a user's own keeps become tensors without a dimension, in slots
    ``number.<key>`` (of a parameter's state) and ``group.<key>`` (of its group).
    """
    tensors = {f"model/{name}": t for name, t in model.state_dict().items()}
    of_groups = {p: slots for g in optimizer.param_groups for slots in [_group_slots(optimizer, g)]
                 for p in g["params"]}  # fmt: skip
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            slots = _as_slots(state) | of_groups[parameter]
            tensors |= {f"optim/{slot}/{name}": value for slot, value in slots.items()}
    return tensors


def _group_slots(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Tensor]:
    if type(optimizer) in _SLOTS or not group["params"]:
        return {}
    keys = rehearse(optimizer, group, group["params"][0]).group
    return {f"{_GROUP}{k}": _as_tensor(group[k]) for k in keys if k in group}


def _as_slots(state: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    return tensors | {f"{_NUMBER}{k}": _as_tensor(v) for k, v in state.items() if isinstance(v, int | float)}


def _as_tensor(number: float) -> Tensor:
    """bool, int64 or float64, of no dimension: nothing is rounded."""
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)


def load_by_name(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Saved,
    kept: Collection[str] | None = None,
) -> None:
    """The reverse of `state_by_name`; or raises Incompatible, naming what differs, and touches nothing.

    Local: reads what this rank holds of each tensor. `kept`: the parameters whose optimiser state this rank
    keeps, where not of all. State of another kind of optimiser is left out: a run that was allowed to change
    its own begins it afresh.
    """
    check_model(model, saved.metas)
    slots = check_slots({name: tuple(p.shape) for name, p in model.named_parameters()}, saved.metas)
    load_model(model, saved)
    optimizer.state.clear()
    found: dict[str, dict[str, str]] = {}
    for slot, name in slots:
        if kept is None or name in kept:
            found.setdefault(name, {})[slot] = f"optim/{slot}/{name}"
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if names[parameter] in found:
                _take(optimizer, group, parameter, Renamed(saved, found[names[parameter]]))


def _take(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, found: Saved) -> None:
    """Give one parameter its state, by slot, where it is that of this kind of optimiser."""
    like: dict[str, Any] = {}
    if type(optimizer) in _SLOTS:
        if set(found.metas) not in _SLOTS[type(optimizer)]:
            return
    else:
        kept = rehearse(optimizer, group, parameter)
        like = kept.state
        wanted = set(_as_slots(like)) | {f"{_GROUP}{k}" for k in kept.group}
        if not wanted <= set(found.metas):
            return
        group |= {k[len(_GROUP) :]: found.whole(k).item() for k in found.metas if k.startswith(_GROUP)}
    state = optimizer.state[parameter]
    state.update({k: v for k, v in like.items() if v is None})
    for slot in found.metas:
        if slot.startswith(_NUMBER):
            state[slot[len(_NUMBER) :]] = found.whole(slot).item()
        elif not slot.startswith(_GROUP):
            state[slot] = _placed(slot, found, group, parameter, like.get(slot))


def _placed(slot: str, found: Saved, group: dict[str, Any], parameter: Tensor, like: Any) -> Tensor:
    """A slot where the optimiser wants it; of the parameter's shape, in its memory format and shards."""
    meta = found.metas[slot]
    if slot != "step" and meta.shape == tuple(parameter.shape):
        target = torch.empty_like(parameter, dtype=meta.dtype)
        fill(pieces_of({slot: target}), found)
        return target
    value = found.whole(slot)
    if isinstance(like, Tensor):
        return value.to(like.device, copy=True)
    # Step counters stay on the CPU, where to read one costs nothing, but for kernels that read them.
    on_cpu = slot == "step" and not (group.get("fused") or group.get("capturable"))
    return value.to("cpu" if on_cpu else parameter.device, copy=True)


def known_slots(optimizer: torch.optim.Optimizer) -> set[str]:
    """The names of the tensors that this kind of optimiser keeps for a parameter."""
    if type(optimizer) in _SLOTS:
        return set().union(*_SLOTS[type(optimizer)])
    each = (rehearse(optimizer, g, p) for g in optimizer.param_groups for p in g["params"][:1])
    return {k for kept in each for k, v in kept.state.items() if isinstance(v, Tensor)}


def check_slots(shapes: Mapping[str, tuple[int, ...]], metas: Mapping[str, Meta]) -> list[list[str]]:
    """``[slot, name]`` of each optimiser tensor of a checkpoint. `shapes` are the model's parameters.

    Raises Incompatible where one is of a parameter that the model lacks, or of another shape than it must
    have; what is not known here may have any.
    """
    slots = [k.split("/", 2)[1:] for k in metas if k.startswith("optim/")]
    unknown = sorted({name for _, name in slots} - shapes.keys())
    if unknown:
        raise Incompatible(
            f"the checkpoint has optimiser state for parameters the model lacks: {unknown[:8]}"
        )
    differing = [
        f"{slot} of {name}: {metas[f'optim/{slot}/{name}'].shape} for a parameter of {shapes[name]}"
        for slot, name in slots
        if not _fits(slot, metas[f"optim/{slot}/{name}"].shape, shapes[name])
    ]
    if differing:
        raise Incompatible(f"the checkpoint's optimiser state has other shapes: {'; '.join(differing[:8])}")
    return slots


def _fits(slot: str, shape: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    if slot in _FLAT:
        wanted = list(parameter)
        if len(wanted) > 1:
            wanted[_FLAT[slot]] = 1
        return len(wanted) > 1 and shape == tuple(wanted)
    return slot not in _WHOLE or shape == parameter


def check_model(model: nn.Module, metas: Mapping[str, Meta]) -> None:
    """Raise Incompatible unless the checkpoint's model tensors are exactly those of `model`."""
    check_shapes({k: tuple(t.shape) for k, t in model.state_dict().items()}, metas)


def check_shapes(want: Mapping[str, tuple[int, ...]], metas: Mapping[str, Meta]) -> None:
    """`check_model` for a model whose state has the shapes `want`, by name."""
    have = {k.removeprefix("model/"): meta.shape for k, meta in metas.items() if k.startswith("model/")}
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


def load_model(model: nn.Module, saved: Saved) -> None:
    """Read ``model/<name>`` into the model's parameters and buffers, each in its own layout. Local."""
    fill(pieces_of({f"model/{name}": t for name, t in model.state_dict().items()}), saved)
