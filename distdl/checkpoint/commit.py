"""What rank 0 alone does to make written files a checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import torch

from distdl.checkpoint.folders import child
from distdl.checkpoint.manifest import Facts, seal, serialise, step_name
from distdl.checkpoint.read import inspect, verify
from distdl.checkpoint.store import Store
from distdl.errors import CheckpointError, Corrupt, Incomplete
from distdl.testing import faults
from distdl.version import __version__


def stands_already(store: Store, facts: Facts) -> bool:
    """Whether this step's checkpoint exists, is sound, and is of this recipe and these data."""
    if not store.stands(facts.step):
        return False
    try:
        manifest = verify(child(store.place, step_name(facts.step)))
    except (Incomplete, Corrupt):
        return False
    return (manifest.recipe_hash, manifest.data_fingerprint) == (facts.recipe_hash, facts.data_fingerprint)


def commit(
    store: Store, attempt: str, facts: Facts, world_size: int, written: Sequence[Mapping[str, Any]]
) -> bytes:
    """Make an attempt a checkpoint; its manifest. `written`: by rank, its file's name, size, hash and pieces.

    Raises CheckpointError where the pieces do not make up their tensors, or rank 0 does not see the files.
    """
    faults.point("save.before_manifest", facts.step)
    files = {part["file"]: {"size": part["size"], "xxh3_128": part["xxh3_128"]} for part in written}
    _require_visible(store, attempt, facts.step, files)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        manifest = seal(_with_versions(facts), world_size, now, files, merged(written))
    except ValueError as error:
        raise CheckpointError(f"the ranks' pieces do not make a checkpoint: {error}") from error
    data = serialise(manifest)
    store.commit(attempt, facts.step, data, _kept_as(store, facts.step))
    return data


def merged(written: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The manifest's entries of all tensors. Raises ValueError where ranks differ about one."""
    entries: dict[str, dict[str, Any]] = {}
    for part in written:
        for name, (dtype, shape, begin, end) in part["tensors"].items():
            entry = entries.setdefault(name, {"dtype": dtype, "shape": shape, "pieces": []})
            if (entry["dtype"], entry["shape"]) != (dtype, shape):
                raise ValueError(
                    f"{name} is {dtype} {shape} in {part['file']}, "
                    f"{entry['dtype']} {entry['shape']} elsewhere"
                )
            entry["pieces"].append([part["file"], begin, end])
    for entry in entries.values():
        entry["pieces"].sort(key=lambda piece: piece[1:])
    return dict(sorted(entries.items()))


def _require_visible(store: Store, attempt: str, step: int, files: Mapping[str, Any]) -> None:
    """Two nodes that do not share the directory would each see only their own files."""
    folder = store.written(attempt, step)
    for name, entry in files.items():
        try:
            source = folder.open(name)
            source.close()
            seen = source.size
        except Incomplete:
            seen = None
        if seen != entry["size"]:
            raise CheckpointError(
                f"{child(folder.place, name)}, as its rank wrote it, is not what rank 0 sees: the run "
                "directory has to be on a file system that all nodes share"
            )


def _with_versions(facts: Facts) -> Facts:
    known = {"distdl": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return replace(facts, versions={**known, **facts.versions})


def _kept_as(store: Store, step: int) -> str | None:
    """How to keep what stands in the way: `stands_already` found it damaged, or of another recipe or data."""
    if not store.stands(step):
        return None
    try:
        inspect(child(store.place, step_name(step)), hashes=True)
    except (Incomplete, Corrupt):
        return "bad"
    return "old"
