"""What a person means by RUN and by CKPT. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from distdl.checkpoint.folders import Place, child, is_url, local_path, shown
from distdl.checkpoint.manifest import MANIFEST, step_name, step_of
from distdl.checkpoint.read import find_latest
from distdl.errors import CheckpointError, RecipeError
from distdl.recipe import Recipe, load_recipe
from distdl.record import RunDirectory


def run_at(text: str) -> tuple[RunDirectory, Recipe | None] | None:
    """The run directory that `text` names, with its resolved recipe where that can be read; None where it is
    another folder, a URL or nothing.
    """
    if is_url(text):
        return None
    run, recipe = RunDirectory(local_path(text)), None
    if run.recipe.is_file():
        try:
            recipe = load_recipe(run.recipe)
        except RecipeError:  # of another distdl: what can be done without it still is
            pass
        else:
            run = RunDirectory(run.path, recipe.checkpoint.dir)
    elif not local_path(run.checkpoints).is_dir():
        return None
    return run, recipe


def checkpoints_of(run: str) -> Place:
    """The folder or URL with the checkpoints of RUN: a run directory, or that folder itself.

    Raises CheckpointError where there is no such folder.
    """
    if is_url(run):
        return run.rstrip("/")
    if (found := run_at(run)) is not None:
        return found[0].checkpoints
    if not local_path(run).is_dir():
        raise CheckpointError(f"{run}: there is no such folder; expected a run directory or its checkpoints")
    return local_path(run)


def is_one(text: str) -> bool:
    """Whether `text` names one checkpoint, sound or not, and no folder of them."""
    named = step_of(text.rstrip("/").rpartition("/")[2]) is not None
    return named or (not is_url(text) and (local_path(text) / MANIFEST).is_file())


def find_checkpoint(text: str) -> Place:
    """The checkpoint that CKPT means: the one that is named, or the newest valid one of a RUN.

    Raises CheckpointError where there is none, or none that is valid.
    """
    if is_one(text):
        return text.rstrip("/") if is_url(text) else local_path(text)
    folder = checkpoints_of(text)
    found = find_latest(folder)
    if found.path is None:
        raise CheckpointError(f"{shown(folder)}: there is no checkpoint in it (step-NNNNNNNN)")
    return found.path


def place_of_new(out: str, step: int) -> tuple[Place, Place]:
    """Where a checkpoint of `step` goes that is asked for at OUT: (folder of checkpoints, checkpoint).

    OUT is a checkpoint's own name, a run directory, or a folder of checkpoints. Raises CheckpointError where
    OUT is the name of another step.
    """
    head, _, last = out.rstrip("/").rpartition("/")
    found = step_of(last)
    if found is not None and found != step:
        raise CheckpointError(
            f"--out {out}: the new checkpoint is of step {step}; expected {step_name(step)}"
        )
    if found is not None:
        folder: Place = head if is_url(out) else local_path(out).parent
    elif (run := run_at(out)) is not None:
        folder = run[0].checkpoints
    else:
        folder = out.rstrip("/") if is_url(out) else local_path(out)
    return folder, child(folder, step_name(step))


def recipe_of(checkpoint: Place) -> Path | None:
    """The resolved recipe of the run that a checkpoint lies in, where it still does."""
    if is_url(checkpoint):
        return None
    file = local_path(checkpoint).absolute().parent.parent / "recipe.yaml"
    return file if file.is_file() else None
