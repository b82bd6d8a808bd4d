"""New checkpoints from what there is: an import from elsewhere, the average of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distdl.checkpoint.convert.locate import place_of_new
from distdl.checkpoint.convert.names import Paired, pair_up
from distdl.checkpoint.convert.optimizers import slots_by_name
from distdl.checkpoint.convert.sources import Source
from distdl.checkpoint.folders import Place, shown
from distdl.checkpoint.manifest import Facts
from distdl.checkpoint.retention import Keep
from distdl.checkpoint.store import store_at
from distdl.checkpoint.write import Saver
from distdl.comm import World
from distdl.errors import CheckpointError, Incompatible
from distdl.pieces import Meta, Piece, Saved

_ALL = Keep(last=1 << 40)


@dataclass(frozen=True)
class Imported:
    """A state by distdl's names, how its weights were found, and what a person has to know."""

    tensors: dict[str, Tensor]
    paired: Paired
    notes: list[str]


def import_source(
    source: Source, model: nn.Module, renamings: Mapping[str, str], ignore: Iterable[str]
) -> Imported:
    """The state of `model` with the weights of `source`, in the model's own dtypes, and its optimiser state
    where it is known which tensor is whose. Ignored tensors are as the model has them.

    Raises Incompatible where the weights are not those of the model, naming every difference.
    """
    state = model.state_dict()
    paired = pair_up(source.weights, state, renamings, ignore)
    tensors = {}
    for name, own in state.items():
        found = source.weights[paired.names[name]] if name in paired.names else own
        tensors[f"model/{name}"] = found.detach().to(own.dtype).contiguous()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    slots, notes = slots_by_name(source.optimizers, paired.names, shapes, renamings)
    return Imported(tensors | slots, paired, [*source.notes, *notes, *paired.lines()])


def average(checkpoints: Sequence[Saved]) -> dict[str, Tensor]:
    """The mean of the weights of several checkpoints (``model/``, and ``ema/`` where all have it).

    Summed in fp64, one tensor at a time; what is no float is that of the last. Optimiser state is left out:
    a mean of it is of no use. Raises Incompatible where the weights are not alike.
    """
    metas = [_weights(one.metas) for one in checkpoints]
    averaged = [set(m) for m in metas if any(n.startswith("ema/") for n in m)]
    names = [n for n in metas[-1] if n.startswith("model/") or len(averaged) == len(metas)]
    for number, other in enumerate(metas[:-1], start=1):
        _require_alike(number, other, {n: metas[-1][n] for n in names})
    return {name: _mean(checkpoints, name) for name in names}


def _weights(metas: Mapping[str, Meta]) -> dict[str, Meta]:
    return {n: m for n, m in metas.items() if n.startswith(("model/", "ema/"))}


def _require_alike(number: int, metas: Mapping[str, Meta], wanted: Mapping[str, Meta]) -> None:
    models = {n for n in metas if n.startswith("model/")}
    wrong = sorted(n for n in models | set(wanted) if metas.get(n) != wanted.get(n))
    if wrong:
        described = "; ".join(f"{n}: {_said(metas.get(n))}, {_said(wanted.get(n))}" for n in wrong[:8])
        raise Incompatible(f"checkpoint {number} and the last one hold other tensors: {described}")


def _said(meta: Meta | None) -> str:
    return "absent" if meta is None else f"{str(meta.dtype).removeprefix('torch.')} {list(meta.shape)}"


def _mean(checkpoints: Sequence[Saved], name: str) -> Tensor:
    last = checkpoints[-1].metas[name].dtype
    if not last.is_floating_point:
        return checkpoints[-1].whole(name).clone()
    total = torch.zeros(checkpoints[-1].metas[name].shape, dtype=torch.float64)
    for one in checkpoints:
        total += one.whole(name)
    return (total / len(checkpoints)).to(last)


def write_checkpoint(out: str, tensors: Mapping[str, Tensor], facts: Facts) -> Place:
    """A new checkpoint at OUT (`place_of_new`), by this process alone; nothing else there is touched.

    Raises CheckpointError where there is one of this step already, or writing fails.
    """
    folder, place = place_of_new(out, facts.step)
    store = store_at(folder)
    if store.stands(facts.step):
        raise CheckpointError(f"{shown(place)} exists already: name another --out, or move it away")
    saver = Saver(store, World(), _ALL)
    try:
        saver.save({n: Piece(t, tuple(t.shape)) for n, t in tensors.items()}, facts)
    finally:
        saver.close()
    return place
