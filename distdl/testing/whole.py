"""The whole state from what the ranks hold: for tests and benchmarks: a rank may have no room for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distdl.comm import World
from distdl.pieces import Piece


def gather_whole(held: Mapping[str, Piece], world: World) -> dict[str, Tensor]:
    """Collective; blocks. Every tensor of the state, on the CPU, in memory of its own, on every rank.

    What every rank holds comes from the rank itself, so that ranks which differ can be told apart. Raises
    AssertionError on every rank where the runs of a tensor do not make it up, or the ranks disagree on it.
    """
    runs = {name: piece for name, piece in held.items() if piece.begin is not None}
    told = world.gather([[name, *_facts(piece)] for name, piece in held.items()])
    listed: dict[str, list[list[Any]]] = {}
    for facts in told:
        for name, *rest in facts:
            listed.setdefault(name, []).append(rest)
    whole = {}
    for name, each in listed.items():
        _check(name, each, world.size)
        dtype, shape, *_ = each[0]
        whole[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        if name in held and name not in runs:
            whole[name].copy_(held[name].data)
    for rank, facts in enumerate(told):
        mine = runs if rank == world.rank else {}
        _spread(rank, [f for f in facts if f[3] is not None], mine, whole, world)
    return whole


def _facts(piece: Piece) -> list[Any]:
    return [str(piece.data.dtype).removeprefix("torch."), list(piece.shape), piece.begin, piece.data.numel()]


def _check(name: str, each: list[list[Any]], ranks: int) -> None:
    dtypes_and_shapes = [[dtype, shape] for dtype, shape, _, _ in each]
    assert all(found == dtypes_and_shapes[0] for found in dtypes_and_shapes), f"{name}: {dtypes_and_shapes}"
    if any(begin is None for _, _, begin, _ in each):
        assert [begin for _, _, begin, _ in each] == [None] * ranks, f"{name}: whole on some ranks only"
        return
    end = 0
    for begin, numel in sorted((begin, numel) for _, _, begin, numel in each):
        assert begin == end, f"{name}: one run ends at {end}, the next begins at {begin}"
        assert numel > 0, f"{name}: an empty run at {begin}"
        end = begin + numel
    size = torch.Size(each[0][1]).numel()
    assert end == size, f"{name}: the runs end at {end} of {size} elements"


def _spread(
    rank: int, facts: list[Any], mine: Mapping[str, Piece], whole: Mapping[str, Tensor], world: World
) -> None:
    """All runs of one rank, in one broadcast of bytes: any dtype, and small ones cost little."""
    sizes = [numel * whole[name].element_size() for name, _, _, _, numel in facts]
    sent = torch.empty(sum(sizes), dtype=torch.uint8)
    parts = sent.split(sizes)
    for (name, *_), part in zip(facts, parts, strict=True):
        if name in mine:
            assert mine[name].data.ndim == 1, f"{name}: a run of shape {tuple(mine[name].data.shape)}"
            part.copy_(mine[name].data.cpu().view(torch.uint8))
    if world.size > 1 and len(sent):
        dist.broadcast(sent, rank)
    for (name, _, _, begin, _), part in zip(facts, parts, strict=True):
        flat, first = whole[name].view(-1).view(torch.uint8), begin * whole[name].element_size()
        flat[first : first + len(part)] = part
