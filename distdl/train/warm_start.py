"""`init.from`: a run that has no checkpoint of its own begins with the weights of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distdl.checkpoint.convert.locate import find_checkpoint, recipe_of
from distdl.checkpoint.convert.names import Paired, pair_up
from distdl.checkpoint.convert.sources import is_safetensors, read_safetensors
from distdl.checkpoint.folders import Place, is_url, local_path, shown
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import verify
from distdl.comm import World, together
from distdl.data import Feed
from distdl.data.catalogue import locate
from distdl.data.description import named
from distdl.data.index import TOKENIZER_FILE
from distdl.errors import CheckpointError, DistdlError, Incompatible
from distdl.pieces import InMemory, Renamed, Saved
from distdl.recipe import load_recipe
from distdl.recipe.schema import Init


@dataclass
class WarmStart:
    """The weights that `init` names; called with the model before it is handed to an engine."""

    init: Init
    path: Place
    paired: Paired = field(default_factory=lambda: Paired({}))

    def __call__(self, model: nn.Module) -> None:
        """Local. Copy the weights into `model`, one tensor at a time; all is checked before the first.

        Raises Incompatible where they do not fit as `init` asks, CheckpointError where reading fails.
        """
        source, state = open_weights(self.path), model.state_dict()
        try:
            self.paired = pair_up(
                source.metas, state, self.init.map, self.init.ignore, strict=self.init.strict
            )
        except Incompatible as error:
            raise Incompatible(f"init.from = {self.init.from_!r} ({shown(self.path)}): {error}") from error
        if not self.paired.names:
            raise Incompatible(
                f"init.from = {self.init.from_!r}: no tensor of {shown(self.path)} is in the model"
            )
        with torch.no_grad():
            for name, own in self.paired.names.items():
                source.read_into(own, 0, state[name])

    def lines(self) -> list[str]:
        """What a person is told: where the weights are from, how many, and which not."""
        return [f"weights from {shown(self.path)}: {len(self.paired.names)} tensors", *self.paired.lines()]

    def facts(self) -> dict[str, Any]:
        """The same for events.jsonl."""
        kinds = {k: list(getattr(self.paired, k)) for k in ("missing", "unexpected", "ignored")}
        return {"path": shown(self.path), "tensors": len(self.paired.names), **kinds}


def warm_start(init: Init, world: World, fresh: Callable[[], bool]) -> WarmStart | None:
    """Collective. What `init` names, found and verified by rank 0; None where it names nothing, or where the
    run has a checkpoint to go on from (`fresh`, asked on rank 0, is False).

    Raises CheckpointError on all ranks together.
    """
    if init.from_ is None:
        return None
    named = init.from_
    path = world.from_main(together(world, lambda: _find(named) if world.is_main and fresh() else None))
    return WarmStart(init, path) if path is not None else None


def _find(named: str) -> str:
    if not is_url(named) and local_path(named).is_file():
        return named
    path = find_checkpoint(named)
    verify(path)
    return str(path)


def other_tokens(start: WarmStart, feed: Feed) -> str | None:
    """Local. What a person is told where an embedding is among the weights and their run had another
    tokenizer than the data of `feed`: tensors are matched by name and shape, and a token would have another
    word's vector. None where it had the same, or where that cannot be seen.
    """
    recipe, ours = recipe_of(start.path), feed.parts[0].folder / TOKENIZER_FILE
    try:
        if recipe is None or not ours.is_file() or not any("embed" in n for n in start.paired.names):
            return None
        theirs = locate(*next(iter(named(load_recipe(recipe).data)))) / TOKENIZER_FILE
        if theirs.read_bytes() == ours.read_bytes():
            return None
    except (DistdlError, OSError):
        return None
    return (
        f"warning: the weights are of tokens of {theirs}, and these data have those of {ours}, so that a "
        f"token begins with another word's vector: prepare the data with --tokenizer {theirs}, or leave the "
        "embedding out (init.ignore)"
    )


def open_weights(path: Place) -> Saved:
    """The model's tensors by their plain names, from a checkpoint or a safetensors file. CheckpointError."""
    if not is_url(path) and (file := local_path(path)).is_file():
        if not is_safetensors(file):
            raise CheckpointError(
                f"{file} is no safetensors file; `distdl ckpt import` makes a checkpoint of what torch, "
                "DeepSpeed, Accelerate or Lightning wrote"
            )
        return InMemory(read_safetensors(file))
    saved = open_checkpoint(path)
    mine = {n.removeprefix("model/"): n for n in saved.metas if n.startswith("model/")}
    return Renamed(saved, mine)
