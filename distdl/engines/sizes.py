"""What a model is made of, for the prediction of memory: counted; its activations measured in one step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distdl.engines.blocks import sharded_units
from distdl.memory import ModelSizes


def model_sizes(model: nn.Module, loss: Callable[[nn.Module], Tensor] | None = None) -> ModelSizes:
    """Count `model`; with `loss` of one microbatch, run it forward and add up what is kept for backward."""
    parameters = list(model.parameters())
    units = [sum(p.numel() for p in unit.parameters()) for unit in sharded_units(model)]
    return ModelSizes(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        largest=max((p.numel() for p in parameters), default=0),
        units=tuple(units),
        buffers=sum(b.numel() for b in model.buffers()),
        activations=saved_bytes(model, loss) if loss is not None else 0,
    )


def saved_bytes(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, parameters and shared storage counted once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        value = loss(model)
        total = sum(kept.values())
        del value
    return total
