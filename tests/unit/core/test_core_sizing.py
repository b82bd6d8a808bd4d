"""What is measured for the prediction of memory follows the recipe."""

from __future__ import annotations

from typing import Any

import torch
from core_support import plan_for, recipe_with
from torch import Tensor, nn

from distdl.engines.sizes import saved_bytes
from distdl.memory import FP32, Memory
from distdl.train.sizing import measured_memory, recomputed_bytes


def measured(**changes: dict[str, Any]) -> Memory:
    return measured_memory(recipe_with(**changes), plan_for(**changes))


def test_frozen_weights_and_short_arithmetic_take_less() -> None:
    plain = measured()
    frozen = measured(optim={"freeze": ["*.weight"]})
    assert frozen.weights == plain.weights
    assert frozen.gradients < plain.gradients == plain.weights - buffers()
    short = measured(train={"precision": "bf16"})
    assert (short.weights, short.gradients) == (plain.weights, plain.gradients)
    assert short.activations < plain.activations


def buffers() -> int:
    from distdl.models.cnn5 import Cnn5

    return FP32 * sum(b.numel() for b in Cnn5(width=4, in_channels=1, num_outputs=10).buffers())


class Block(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(8, 8), nn.Tanh())])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def test_recomputed_blocks_keep_their_inputs_and_the_largest_once() -> None:
    """Rows of 8 floats: 5 of them are one kept tensor. A block of n layers keeps its input and n outputs."""
    model = nn.Sequential(Block(1), Block(4), Block(2))
    kept = 5 * 8 * FP32
    inputs = torch.randn(5, 8)

    def loss(m: nn.Module) -> Tensor:
        result: Tensor = m(inputs)
        return result.sum()

    assert saved_bytes(model, loss) == 8 * kept
    assert recomputed_bytes(model, loss) == (3 + 5) * kept
    assert all(not block._forward_pre_hooks for block in model)


def test_gradient_checkpointing_is_measured() -> None:
    assert measured(hardware={"gradient_checkpointing": True}).activations != measured().activations
