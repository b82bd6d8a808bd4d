"""A recipe's model outside a training: freshly made, or with an example of what its task gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distdl.data import Feed
from distdl.data.description import access_of, describe_data
from distdl.data.table.rows import close
from distdl.errors import RecipeError
from distdl.keys import key, seed_everything
from distdl.models import model_factory
from distdl.recipe import Recipe, load_recipe
from distdl.samples import DataInfo
from distdl.tasks import Columns, Task, build_task

ROWS = (2, 3)
"""Rows of the two examples: not 1, which a graph would take for a constant."""


def fresh_model(recipe: Recipe) -> tuple[nn.Module, DataInfo]:
    """The model as training would initialise it, and what the data are. Reads indexes of the data alone."""
    info = describe_data(recipe.data, access_of(recipe))
    return _task(recipe, info)[1], info


def model_with_examples(recipe_file: Path) -> tuple[nn.Module, tuple[tuple[Tensor, ...], ...]]:
    """The model, in evaluation mode, and the arguments that its task calls it with for 2 and for 3 rows.

    Opens the data of the recipe. Raises RecipeError where the task does not call the model with tensors.
    """
    recipe = load_recipe(recipe_file)
    feed = Feed.open(recipe.data, access_of(recipe))
    task, model = _task(recipe, feed.info)
    rows = feed.rows(recipe.data.eval_split)
    try:
        batches = [task.collate(Columns(rows.gather(np.arange(min(n, len(rows)))))) for n in ROWS]
    finally:
        close(rows)
    model.eval()
    return model, tuple(_arguments(task, model, batch) for batch in batches)


def _task(recipe: Recipe, info: DataInfo) -> tuple[Task, nn.Module]:
    make_model = model_factory(recipe.model.name, recipe.model.options())
    task = build_task(recipe.task.name, recipe.task.options(), make_model, info)
    seed_everything(key(recipe.train.seed, "init"))
    return task, task.build_model()


def _arguments(task: Task, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    seen: list[tuple[Any, dict[str, Any]]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            (getattr(task, "measure", None) or task.metric_sums)(model, batch)
    finally:
        hook.remove()
    args, kwargs = seen[0] if seen else ((), {"nothing": None})
    if kwargs or not all(isinstance(a, Tensor) for a in args):
        raise RecipeError(
            "the task does not call its model with tensors alone, by position, which a graph needs: export "
            "the weights with --to safetensors instead"
        )
    return tuple(args)
