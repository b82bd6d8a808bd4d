"""What the checkpoint tests share: a way to save one step in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distdl.checkpoint.manifest import Facts
from distdl.checkpoint.write import save
from distdl.comm.world import World

SaveStep = Callable[..., Path]


def facts(step: int, recipe_hash: str = "abc") -> Facts:
    return Facts(
        step=step,
        recipe_hash=recipe_hash,
        mathematics={"seed": 7, "optim": {"lr": 0.1}},
        data_fingerprint="f00d",
        train_state={"step": step, "best": float("-inf")},
        engine="ddp",
    )


@pytest.fixture
def save_step(tmp_path: Path) -> SaveStep:
    """save_step(step, tensors=None, keep=9, recipe_hash="abc") -> the checkpoint's path, under tmp_path."""

    def run(
        step: int,
        tensors: dict[str, torch.Tensor] | None = None,
        keep: int = 9,
        recipe_hash: str = "abc",
    ) -> Path:
        if tensors is None:
            tensors = {"model/w": torch.full((5, 3), float(step)), "model/b": torch.tensor(step)}
        return save(tmp_path, tensors, facts(step, recipe_hash), World(), keep)

    return run
