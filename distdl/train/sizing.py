"""`distdl plan --memory`: build the model, run one microbatch forward on the CPU, predict the need."""

from __future__ import annotations

import numpy as np

from distdl.data import Feed
from distdl.engines.sizes import model_sizes
from distdl.keys import key, seed_everything
from distdl.memory import Memory, predict
from distdl.models import model_factory
from distdl.plan import Plan
from distdl.recipe import Recipe
from distdl.tasks import Columns, build_task


def measured_memory(recipe: Recipe, plan: Plan) -> Memory:
    """The predicted memory of the fullest rank of `plan`. Called by one process; needs no process group.

    The first microbatch of the training rows as they are stored stands for all: sequences that are longer
    need more. Raises RecipeError and DataError as training would.
    """
    feed = Feed.open(recipe.data)
    make_model = model_factory(recipe.model.name, recipe.model.options())
    task = build_task(recipe.task.name, recipe.task.options(), make_model, feed.info)
    seed_everything(key(recipe.train.seed, "init"))
    model = task.build_model()
    rows = feed.rows(recipe.data.train_split)
    batch = task.collate(Columns(rows.gather(np.arange(min(plan.micro_batch, len(rows))))))
    return predict(recipe, plan, model_sizes(model, lambda m: task.loss_sum(m, batch)))
