"""Between whole tensors and what a rank holds of them: `Piece`s, which are read from a `Saved` in place."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from distdl.errors import EngineError
from distdl.pieces import Piece, Saved


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, in the same memory; a tensor that is not sharded itself."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def shard_of(part: Tensor, like: Tensor) -> Tensor:
    """This rank's `part` as a shard of a whole that is cut as `like` is. No communication."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def piece_of(tensor: Tensor) -> Piece | None:
    """What this rank holds of `tensor`, in the same memory; None where its shard is empty. No communication.

    Raises EngineError where a shard is not one run of the whole.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), shape)
    cuts = [(axis, p) for axis, p in enumerate(tensor.placements) if not isinstance(p, Replicate)]
    if not cuts:
        return Piece(local(tensor), shape)
    (axis, placement), *more = cuts
    if more or type(placement) is not Shard or placement.dim != 0:
        raise EngineError(
            f"a tensor of shape {shape} is laid out as {tensor.placements}, and what a rank holds of it is "
            "not one run of its elements: shard along dimension 0, over one dimension of the device mesh"
        )
    # Rows are cut as torch.chunk cuts: equal pieces but for the last, so that the last ranks may have none.
    rows = -(-shape[0] // tensor.device_mesh.size(axis))
    first = min(rows * tensor.device_mesh.get_local_rank(axis), shape[0])
    data = local(tensor).view(-1)
    return Piece(data, shape, first * math.prod(shape[1:])) if data.numel() else None


def pieces_of(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """`piece_of` each, by its name; without those of which this rank holds nothing."""
    found = {name: piece_of(tensor) for name, tensor in tensors.items()}
    return {name: piece for name, piece in found.items() if piece is not None}


def fill(pieces: Mapping[str, Piece], saved: Saved) -> None:
    """Overwrite each piece in place, with what `saved` has of its name. Local.

    A few are read at the same time. Shapes have been compared. Raises CheckpointError where something cannot
    be read.
    """

    @torch.no_grad()  # of this thread alone
    def read(name: str) -> None:
        saved.read_into(name, pieces[name].begin or 0, pieces[name].data)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "distdl-load") as pool:
        for _ in pool.map(read, pieces):
            pass


def squared_norm(parts: list[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of this rank's `parts`: float64, no dimension, where they are (or `device`)."""
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(parts)).double().square().sum()
