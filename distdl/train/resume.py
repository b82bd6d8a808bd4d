"""Where a run stands: the newest checkpoint that verifies, checked against the recipe before use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distdl.checkpoint.find import find_and_verify
from distdl.checkpoint.folders import Place, child, name_of, shown
from distdl.checkpoint.manifest import Manifest, step_name
from distdl.checkpoint.open import Checkpoint, open_checkpoint
from distdl.checkpoint.read import Found, read_manifest
from distdl.checkpoint.replicas.keeper import Replicas
from distdl.checkpoint.replicas.search import Search
from distdl.checkpoint.store import Store
from distdl.comm import World, together
from distdl.engines import Engine
from distdl.errors import CheckpointError, Corrupt, Incompatible, Incomplete
from distdl.train.arithmetic import what_differs
from distdl.train.carrying import Carry
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
    in_memory: bool = False
    """Whether the bytes came from copies in the nodes' memories."""
    notes: tuple[str, ...] = ()
    """What was found wrong with such copies."""
    changed: tuple[str, ...] = ()
    arithmetic: tuple[str, ...] = ()
    """In what way the processor, its libraries or threads are others than those it was saved with."""


def resume(
    store: Store,
    world: World,
    engine: Engine,
    identity: Identity,
    *,
    allow_changed: bool,
    replicas: Replicas | None = None,
    carry: Carry | None = None,
) -> Resumed:
    """Collective. Find, check and load the newest valid checkpoint, from memory where `replicas` still have
    it; everything is validated before the model is touched.

    Raises CheckpointError where there are checkpoints and none is valid, Incompatible for one of another
    recipe, other data or another model, on all ranks together.
    """
    search = Search(replicas, identity.recipe_hash, identity.data_fingerprint) if replicas else None
    found, here = _newest(store, world, search)
    damaged = [(name_of(path), reason) for path, reason in found.damaged]
    notes = tuple(search.notes) if search else ()
    path = found.path
    if path is None:
        if search is not None:
            search.close(used=False)
        return Resumed(TrainState(), None, damaged)

    def check() -> tuple[Checkpoint, list[str], TrainState]:
        saved = open_checkpoint(here or path)
        changed = saved.manifest.what_changed(identity.mathematics, identity.data_fingerprint)
        if changed and not allow_changed:
            listed = "\n  ".join(changed)
            raise Incompatible(
                f"{shown(path)} belongs to another recipe; what differs (checkpoint -> now):\n  {listed}\n"
                "Choose another run.dir, undo the change, or continue with --allow-changed"
            )
        state = _state(saved.manifest)
        if carry is not None:
            carry.check(saved.metas, state.step)
        return saved, changed, state

    saved, changed, state = together(world, check)
    with reading_alone():
        engine.load(saved)
        if carry is not None:
            carry.load(saved, state.step)
    if search is not None:
        search.close(used=here is not None)
    arithmetic = what_differs(saved.manifest.versions, identity.arithmetic)
    return Resumed(state, path, damaged, here is not None, notes, tuple(changed), tuple(arithmetic))


def _newest(store: Store, world: World, search: Search | None) -> tuple[Found, Path | None]:
    """Collective. The newest checkpoint that is whole; and its copy, where that is to be read instead.

    Which steps there are, and which checkpoint of a step, is the store's to say: a run whose checkpoints were
    moved away begins afresh.
    """
    steps = world.from_main(together(world, lambda: store.steps() if world.is_main else None))
    if search is None or not steps:
        return find_and_verify(store, world), None
    wanted = sorted(set(steps) & set(search.steps))
    told = together(world, lambda: [_hash_on_disk(store, s) for s in wanted] if world.is_main else None)
    on_disk: dict[int, str | None] = dict(zip(wanted, world.from_main(told), strict=True))
    copy = search.newest(steps[0], on_disk)
    damaged: list[tuple[Place, str]] = []
    if copy is None:
        try:
            found = find_and_verify(store, world)
        except Incompatible:
            raise
        except CheckpointError:
            copy = search.newest(0, on_disk)
            if copy is None:
                raise
        else:
            assert found.manifest is not None
            damaged = found.damaged
            # A newer one than the disk has whole, if those of the disk that are newer are damaged.
            copy = search.newest(found.manifest.step + 1, on_disk)
            if copy is None:
                return found, None
    here, manifest = copy
    return Found(child(store.place, step_name(manifest.step)), manifest, damaged), here


def _hash_on_disk(store: Store, step: int) -> str | None:
    """What tells a step's checkpoint from others; None where its manifest is damaged."""
    try:
        return read_manifest(child(store.place, step_name(step))).self_hash
    except (Corrupt, Incomplete):
        return None
    except Incompatible:
        return ""  # of a newer distdl: no copy is of it


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
