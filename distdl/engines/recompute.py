"""Gradient checkpointing: activations inside a block are not kept, but computed again in backward.

Chen et al., Training Deep Nets with Sublinear Memory Cost (2016).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distdl.engines.blocks import recomputable


def recompute_blocks(model: nn.Module) -> list[nn.Module]:
    """Recompute each block of `model` in backward, in place; returns the blocks. No communication.

    Names of parameters stay as they are. Call it before the model is wrapped or sharded, so that the hooks of
    those run once a pass. The random streams are put back for the recomputation, so results are the same.
    """
    found = recomputable(model)
    for block in found:
        # On the instance: `__call__` and the hooks of the block stay outside, and so run once.
        block.forward = _recomputed(block)
    return found


def _recomputed(block: nn.Module) -> Any:
    forward = block.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
