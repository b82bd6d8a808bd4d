"""A run's checkpoints at a glance, and those that retention would not keep. Imports no torch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from distdl.checkpoint.convert.locate import checkpoints_of, run_at
from distdl.checkpoint.folders import Place, child, shown
from distdl.checkpoint.manifest import Manifest, step_name
from distdl.checkpoint.read import inspect
from distdl.checkpoint.retention import Keep, look, to_remove
from distdl.checkpoint.store import store_at
from distdl.errors import CheckpointError
from distdl.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One checkpoint. `verdict`: "yes", or what is wrong; `manifest` is None where it cannot be read."""

    step: int
    verdict: str
    manifest: Manifest | None = None

    @property
    def age_s(self) -> float | None:
        """Seconds since it was saved."""
        if self.manifest is None:
            return None
        try:
            saved = datetime.fromisoformat(self.manifest.saved_at)
        except ValueError:
            return None
        aware = saved if saved.tzinfo else saved.replace(tzinfo=timezone.utc)
        return (datetime.now(timezone.utc) - aware).total_seconds()

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        said: dict[str, Any] = {
            "step": self.step,
            "valid": self.manifest is not None,
            "verdict": self.verdict,
        }
        if self.manifest is not None:
            metric = self.manifest.metric
            said |= {
                "saved_at": self.manifest.saved_at,
                "age_s": self.age_s,
                "bytes": self.manifest.nbytes,
                "engine": self.manifest.engine,
                "world_size": self.manifest.world_size,
                "recipe_hash": self.manifest.recipe_hash,
                "metric": metric.model_dump() if metric is not None else None,
            }
        return said


def overview(folder: Place) -> list[Row]:
    """Each checkpoint in `folder`, the highest step first. Manifests and sizes are looked at, no hashes."""
    return [_row(folder, step) for step in store_at(folder).steps()]


def _row(folder: Place, step: int) -> Row:
    try:
        return Row(step, "yes", inspect(child(folder, step_name(step)), hashes=False))
    except (CheckpointError, OSError) as error:
        return Row(step, str(error))


def removable(run: str, asked: dict[str, Any], *, remove: bool) -> list[str]:
    """The checkpoints of RUN that are not kept, by its recipe's rules, or by those of `asked` (fields of
    `Keep`) in their place; with `remove`, after they have been removed.

    The newest whole one is always kept. Raises EnvironmentProblem where a process is training in RUN,
    CheckpointError, OSError.
    """
    folder = checkpoints_of(run)
    store = store_at(folder)
    directory, recipe = run_at(run) or (None, None)
    keep = replace(_keep(recipe), **asked)
    with directory.lock() if remove and directory is not None else nullcontext():
        known = look(store, (recipe.eval.metric, recipe.eval.mode) if recipe else None)
        whole = [step for step, what in known.items() if what.whole]
        steps = to_remove(known, keep, max(whole)) if whole else []
        for step in steps if remove else ():
            store.remove(step)
    return [shown(child(folder, step_name(step))) for step in steps]


def _keep(recipe: Recipe | None) -> Keep:
    if recipe is None:
        return Keep()
    said = recipe.checkpoint
    return Keep(said.keep, said.keep_best, said.keep_every_steps, said.keep_every_s)
