"""Where a run stands: the newest checkpoint that verifies, checked against the recipe before use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from distdl.checkpoint.manifest import Manifest
from distdl.checkpoint.read import find_latest, load_tensors, read_manifest
from distdl.comm import World, together
from distdl.engines import Engine
from distdl.errors import Incompatible
from distdl.recipe import differences
from distdl.train.arithmetic import what_differs
from distdl.train.state import TrainState


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must share with the run that goes on from it."""

    recipe_hash: str
    mathematics: dict[str, Any]
    data_fingerprint: str
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    """Not refused where it differs: `distdl.train.arithmetic`."""


@dataclass(frozen=True)
class Resumed:
    """The state to go on from, where it came from (None: a fresh start), and what was passed over."""

    state: TrainState
    path: Path | None
    damaged: list[tuple[str, str]]
    changed: tuple[str, ...] = ()
    arithmetic: tuple[str, ...] = ()
    """In what way the processor, its libraries or threads are others than those it was saved with."""


def resume(
    checkpoints: Path, world: World, engine: Engine, identity: Identity, *, allow_changed: bool
) -> Resumed:
    """Collective. Find, check and load the newest valid checkpoint; everything is validated before the
    model is touched.

    Raises CheckpointError where there are checkpoints and none is valid, Incompatible for one of another
    recipe, other data or another model, on all ranks together.
    """
    found = together(world, lambda: _find(checkpoints) if world.is_main else None)
    told = world.from_main(found)
    damaged = [(name, reason) for name, reason in told["damaged"]]
    if told["name"] is None:
        return Resumed(TrainState(), None, damaged)
    path = checkpoints / told["name"]

    def read() -> tuple[Manifest, list[str], dict[str, Tensor]]:
        manifest = read_manifest(path)
        changed = what_changed(manifest, identity)
        if changed and not allow_changed:
            listed = "\n  ".join(changed)
            raise Incompatible(
                f"{path} belongs to another recipe; what differs (checkpoint -> now):\n  {listed}\n"
                "Choose another run.dir, undo the change, or continue with --allow-changed"
            )
        return manifest, changed, load_tensors(path, manifest)

    manifest, changed, tensors = together(world, read)
    # An engine may communicate here. What it refuses, it refuses on every rank by itself.
    engine.load(tensors)
    arithmetic = what_differs(manifest.versions, identity.arithmetic)
    return Resumed(TrainState(**manifest.train_state), path, damaged, tuple(changed), tuple(arithmetic))


def what_changed(manifest: Manifest, identity: Identity) -> list[str]:
    """Every key of the mathematics, and the data, in which the checkpoint differs from the run."""
    changed = differences(manifest.mathematics, identity.mathematics)
    if manifest.data_fingerprint != identity.data_fingerprint:
        changed.append(f"the data themselves: {manifest.data_fingerprint} -> {identity.data_fingerprint}")
    return changed


def _find(checkpoints: Path) -> dict[str, Any]:
    found = find_latest(checkpoints)
    return {
        "name": found.path.name if found.path else None,
        "damaged": [(path.name, reason) for path, reason in found.damaged],
    }
