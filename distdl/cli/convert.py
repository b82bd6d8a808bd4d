"""What `distdl ckpt export`, `import` and `average` do. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distdl.checkpoint.convert.build import average as mean_of
from distdl.checkpoint.convert.build import import_source, write_checkpoint
from distdl.checkpoint.convert.card import render_card
from distdl.checkpoint.convert.export import (
    weights_of,
    write_hub_folder,
    write_safetensors,
    write_torch,
    write_with,
)
from distdl.checkpoint.convert.locate import find_checkpoint, recipe_of
from distdl.checkpoint.convert.sources import open_source
from distdl.checkpoint.folders import shown
from distdl.checkpoint.manifest import Facts
from distdl.checkpoint.open import Checkpoint, open_checkpoint
from distdl.checkpoint.read import verify
from distdl.errors import CheckpointError
from distdl.recipe import load_recipe, mathematics, recipe_hash
from distdl.train.state import TrainState

SUFFIXES = {
    "safetensors": ".safetensors",
    "torch": ".pt",
    "onnx": ".onnx",
    "torch_export": ".pt2",
    "hf_dataset_card": "",
}
"""What can be exported to, and how its file's name ends; a folder's has none."""


def export(text: str, to: str, out: Path | None, ema: bool, recipe: Path | None) -> dict[str, Any]:
    """Export the verified checkpoint that `text` means; what is to be told about it."""
    saved = _verified(text)
    said = saved.manifest
    weights = weights_of(saved, ema=ema)
    out = out or Path(
        f"step-{said.step:08d}{SUFFIXES[to]}" if SUFFIXES[to] else f"model-step-{said.step:08d}"
    )
    facts: dict[str, Any] = {
        "checkpoint": shown(saved.path), "to": to, "out": str(out), "tensors": len(weights), "ema": ema
    }  # fmt: skip
    about = {"distdl.step": str(said.step), "distdl.recipe_hash": said.recipe_hash}
    if to == "safetensors":
        write_safetensors(weights, out, about)
    elif to == "torch":
        write_torch(weights, out)
    elif to == "hf_dataset_card":
        write_hub_folder(weights, out, about, render_card(said, ema=ema), recipe or recipe_of(saved.path))
    else:
        facts["largest_difference"] = _export_graph(saved, weights, to, out, recipe)
    return facts


def _export_graph(
    saved: Checkpoint, weights: dict[str, Tensor], to: str, out: Path, recipe: Path | None
) -> float:
    from distdl.checkpoint.convert import graphs
    from distdl.train.example import model_with_examples

    file = recipe or recipe_of(saved.path)
    if file is None:
        raise CheckpointError(
            f"{shown(saved.path)} is not in a run directory, whose recipe.yaml says which model it is: "
            "give --recipe RECIPE"
        )
    model, (small, large) = model_with_examples(file)
    _fill(model, weights)
    make = graphs.to_onnx if to == "onnx" else graphs.to_program
    return write_with(make(model, small, large), out)


def _fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights are not those of the recipe's model: {error}") from error


def import_(
    path: Path, recipe_file: Path, out: str, renamings: dict[str, str], ignore: Sequence[str], trust: bool
) -> dict[str, Any]:
    """Write a checkpoint at step 0 of what another library left behind; what is to be told about it."""
    from distdl.train.example import fresh_model

    recipe = load_recipe(recipe_file)
    source = open_source(path, trust_pickle=trust)
    model, info = fresh_model(recipe)
    found = import_source(source, model, renamings, ignore)
    facts = Facts(
        step=0,
        recipe_hash=recipe_hash(recipe),
        mathematics=mathematics(recipe),
        data_fingerprint=info.fingerprint,
        train_state=TrainState().as_dict(),
        engine="import",
    )
    place = write_checkpoint(out, found.tensors, facts)
    slots = sum(name.startswith("optim/") for name in found.tensors)
    return {
        "checkpoint": shown(place),
        "kind": source.kind,
        "weights": len(found.paired.names),
        "slots": slots,
        "ignored": list(found.paired.ignored),
        "notes": found.notes,
    }


def average(texts: Sequence[str], out: str) -> dict[str, Any]:
    """Write the mean of several checkpoints; what is to be told about it."""
    if len(texts) < 2:
        raise CheckpointError(f"average: {len(texts)} checkpoint given; expected at least two")
    several = [_verified(text) for text in texts]
    said = several[-1].manifest
    facts = Facts(
        step=said.step,
        recipe_hash=said.recipe_hash,
        mathematics=said.mathematics,
        data_fingerprint=said.data_fingerprint,
        train_state=said.train_state,
        engine="average",
    )
    place = write_checkpoint(out, mean_of(several), facts)
    return {"checkpoint": shown(place), "of": [shown(one.path) for one in several]}


def _verified(text: str) -> Checkpoint:
    place = find_checkpoint(text)
    verify(place)
    return open_checkpoint(place)
