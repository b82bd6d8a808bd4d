"""Between whole tensors and the shards of them that a rank holds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, in the same memory; a tensor that is not sharded itself."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Collective for a sharded tensor: the whole of it, on the CPU. Any other comes back as it is."""
    return tensor.full_tensor().detach().cpu() if isinstance(tensor, DTensor) else tensor


def shard_of(part: Tensor, like: Tensor) -> Tensor:
    """This rank's `part` as a shard of a whole that is cut as `like` is. No communication."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def cut(value: Tensor, like: Tensor) -> Tensor:
    """The shard of the whole tensor `value` that this rank holds of `like`, a view. No communication.

    Where `like` is not sharded, or has another shape, `value` itself.
    """
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    part = value
    for axis, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            # Cut as FSDP does: equal pieces but for the last, so that small tensors may have none left.
            pieces = part.chunk(like.device_mesh.size(axis), placement.dim)
            mine = like.device_mesh.get_local_rank(axis)
            part = pieces[mine] if mine < len(pieces) else part.narrow(placement.dim, 0, 0)
    return shard_of(part.to(like.device), like)


def squared_norm(parts: list[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of this rank's `parts`: float64, no dimension, where they are (or `device`)."""
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(parts)).double().square().sum()
