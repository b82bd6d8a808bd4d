"""Where a run stands: the newest checkpoint that verifies, checked against the recipe before use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from distdl.checkpoint.find import find_and_verify
from distdl.checkpoint.folders import Place, name_of, shown
from distdl.checkpoint.manifest import Manifest
from distdl.checkpoint.open import Checkpoint, open_checkpoint
from distdl.checkpoint.store import Store
from distdl.comm import World, together
from distdl.engines import Engine
from distdl.errors import CheckpointError, Incompatible
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
    path: Place | None
    damaged: list[tuple[str, str]]
    changed: tuple[str, ...] = ()
    arithmetic: tuple[str, ...] = ()
    """In what way the processor, its libraries or threads are others than those it was saved with."""


def resume(store: Store, world: World, engine: Engine, identity: Identity, *, allow_changed: bool) -> Resumed:
    """Collective. Find, check and load the newest valid checkpoint; everything is validated before the
    model is touched.

    Raises CheckpointError where there are checkpoints and none is valid, Incompatible for one of another
    recipe, other data or another model, on all ranks together.
    """
    found = find_and_verify(store, world)
    damaged = [(name_of(path), reason) for path, reason in found.damaged]
    path = found.path
    if path is None:
        return Resumed(TrainState(), None, damaged)

    def check() -> tuple[Checkpoint, list[str], TrainState]:
        saved = open_checkpoint(path)
        changed = what_changed(saved.manifest, identity)
        if changed and not allow_changed:
            listed = "\n  ".join(changed)
            raise Incompatible(
                f"{shown(path)} belongs to another recipe; what differs (checkpoint -> now):\n  {listed}\n"
                "Choose another run.dir, undo the change, or continue with --allow-changed"
            )
        return saved, changed, _state(saved.manifest)

    saved, changed, state = together(world, check)
    with reading_alone():
        engine.load(saved)
    arithmetic = what_differs(saved.manifest.versions, identity.arithmetic)
    return Resumed(state, path, damaged, tuple(changed), tuple(arithmetic))


@contextmanager
def reading_alone() -> Iterator[None]:
    """Local. Around an engine's load, which may communicate: what this rank cannot read crashes it.

    Incompatible stays what it is: an engine refuses on every rank by itself.
    """
    try:
        yield
    except Incompatible:
        raise
    except CheckpointError as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _state(manifest: Manifest) -> TrainState:
    try:
        return TrainState(**manifest.train_state)
    except TypeError as error:
        raise Incompatible(f"train_state of step {manifest.step} is of another distdl: {error}") from error


def what_changed(manifest: Manifest, identity: Identity) -> list[str]:
    """Every key of the mathematics, and the data, in which the checkpoint differs from the run."""
    changed = differences(manifest.mathematics, identity.mathematics)
    if manifest.data_fingerprint != identity.data_fingerprint:
        changed.append(f"the data themselves: {manifest.data_fingerprint} -> {identity.data_fingerprint}")
    return changed
