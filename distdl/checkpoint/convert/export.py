"""A checkpoint's weights in files that others read: safetensors, torch, a folder for Hugging Face's hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from distdl.checkpoint.disk import aside, remove, sync_directory
from distdl.errors import CheckpointError, Incompatible
from distdl.pieces import Saved


def weights_of(saved: Saved, *, ema: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers by the model's names; with `ema`, their moving averages in the place of those
    that have one. Raises Incompatible where there is no average, CheckpointError where reading fails.
    """
    names = [n.removeprefix("model/") for n in saved.metas if n.startswith("model/")]
    averaged = {n.removeprefix("ema/") for n in saved.metas if n.startswith("ema/")}
    if ema and not averaged:
        raise Incompatible("--ema: the checkpoint has no averaged weights; train.ema_decay keeps them")
    return {n: saved.whole(f"{'ema' if ema and n in averaged else 'model'}/{n}") for n in names}


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A path to write to, which becomes `out` when the block has ended without an error, and only then.

    Raises CheckpointError where `out` exists: nothing that stands is written over.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists already: name another, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = aside(out, "tmp")
    try:
        yield temporary
        _make_durable(temporary)
        temporary.rename(out)
        sync_directory(out.parent)
    finally:
        if os.path.lexists(temporary):
            remove(temporary)


def _make_durable(path: Path) -> None:
    for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def write_safetensors(weights: Mapping[str, Tensor], out: Path, about: Mapping[str, str]) -> None:
    """One safetensors file; `about` goes into its metadata."""
    with appearing(out) as temporary:
        safetensors.torch.save_file(dict(weights), temporary, {"format": "pt", **about})


def write_torch(weights: Mapping[str, Tensor], out: Path) -> None:
    """What `torch.load(OUT, weights_only=True)` reads and `load_state_dict` takes."""
    with appearing(out) as temporary:
        torch.save(dict(weights), temporary)


def write_hub_folder(
    weights: Mapping[str, Tensor], out: Path, about: Mapping[str, str], card: str, recipe: Path | None
) -> None:
    """A folder with model.safetensors, the card as README.md and the run's recipe.yaml."""
    with appearing(out) as temporary:
        temporary.mkdir()
        safetensors.torch.save_file(dict(weights), temporary / "model.safetensors", {"format": "pt", **about})
        (temporary / "README.md").write_text(card)
        if recipe is not None:
            shutil.copyfile(recipe, temporary / "recipe.yaml")


def write_with(write: Callable[[Path], float], out: Path) -> float:
    """Let `write` (of `distdl.checkpoint.convert.graphs`) make the file; returns what it returns."""
    with appearing(out) as temporary:
        return write(temporary)
