"""What the checkpoint tests share: a way to save one step in one process, and to read it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from distdl.checkpoint.folders import Place
from distdl.checkpoint.manifest import Facts
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.retention import Keep
from distdl.checkpoint.store import store_at
from distdl.checkpoint.write import Saver
from distdl.comm.world import World
from distdl.pieces import Piece

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


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Pieces of tensors that every rank holds."""
    return {name: Piece(t.detach(), tuple(t.shape)) for name, t in tensors.items()}


def some_tensors(step: int) -> dict[str, Tensor]:
    return {"model/w": torch.full((5, 3), float(step)), "model/b": torch.tensor(step)}


def save_at(
    place: Place,
    step: int,
    tensors: Mapping[str, Tensor] | None = None,
    keep: int = 9,
    recipe_hash: str = "abc",
    asynchronous: bool = False,
) -> Place:
    """One save of one rank, committed."""
    saver = Saver(store_at(place), World(), Keep(keep), asynchronous=asynchronous)
    held = whole(some_tensors(step) if tensors is None else tensors)
    made = saver.save(held, facts(step, recipe_hash))
    place = made or saver.settle() or ""
    saver.close()
    return place


def read_all(place: Place) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    saved = open_checkpoint(place)
    return {name: saved.whole(name) for name in saved.metas}
