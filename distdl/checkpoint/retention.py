"""Which checkpoints go, and how: never so that a half-removed one could be taken for a whole one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distdl.checkpoint.disk import aside, remove
from distdl.checkpoint.manifest import step_of
from distdl.checkpoint.read import inspect, step_directories
from distdl.errors import Corrupt, Incompatible, Incomplete


def to_remove(whole: Mapping[int, bool], keep: int, just_saved: int) -> list[int]:
    """Steps to remove: `whole` says of each step whether its checkpoint is whole. Pure.

    Kept are the one just saved and the newest other whole ones, `keep` in all. A damaged one goes only once
    `keep` whole ones are kept and all are newer: until then a person may want to look at it.
    """
    others = sorted((s for s, ok in whole.items() if ok and s != just_saved), reverse=True)
    kept = {just_saved, *others[: keep - 1]}
    old_damaged = [s for s, ok in whole.items() if not ok and len(kept) == keep and s < min(kept)]
    return sorted([s for s in others if s not in kept] + old_damaged)


def prune(directory: Path, keep: int, just_saved: Path) -> list[Path]:
    """Remove what `to_remove` names; returns those paths. One process calls it, after a commit.

    Whole means here that the manifest is right and the files have their sizes: hashing every checkpoint again
    at each save would cost more than the save. Checkpoints of a newer distdl are left alone. Raises OSError.
    """
    paths = {step_of(p.name): p for p in step_directories(directory)}
    whole: dict[int, bool] = {}
    for step, path in paths.items():
        verdict = _is_whole(path)
        if step is not None and verdict is not None:
            whole[step] = verdict
    last = step_of(just_saved.name)
    assert last is not None
    removed = [paths[step] for step in to_remove(whole, keep, last)]
    for path in removed:
        # The new name first: a kill in the middle of the removal then leaves what clean_temporary sweeps.
        remove(path.rename(aside(path, "tmp")))
    return removed


def _is_whole(path: Path) -> bool | None:
    try:
        inspect(path, hashes=False)
    except (Incomplete, Corrupt):
        return False
    except Incompatible:
        return None
    return True


def clean_temporary(directory: Path) -> list[Path]:
    """Remove what unfinished saves and removals left (`step-*.tmp-*`); returns those paths.

    Rank 0 calls it at start, while the run directory is locked: nobody else is writing there. Raises OSError.
    """
    if not directory.is_dir():
        return []
    left = [p for p in directory.iterdir() if _is_temporary(p.name)]
    for path in left:
        remove(path)
    return left


def _is_temporary(name: str) -> bool:
    step, mark, rest = name.partition(".tmp-")
    return bool(mark and rest) and step_of(step) is not None
