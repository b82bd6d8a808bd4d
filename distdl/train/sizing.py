"""`distdl plan --memory`: build the model, run one microbatch forward on the CPU, predict the need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distdl.data import Feed
from distdl.engines.blocks import recomputable
from distdl.engines.optim import freeze
from distdl.engines.precision import Precision
from distdl.engines.recompute import recompute_blocks
from distdl.engines.sizes import model_sizes, saved_bytes
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
    model = task.build_model().train()
    freeze(model, recipe.optim.freeze)
    rows = feed.rows(recipe.data.train_split)
    batch = task.collate(Columns(rows.gather(np.arange(min(plan.micro_batch, len(rows))))))
    # fp16 takes what bf16 takes, and not every kernel of a CPU has it.
    short = Precision("fp32" if plan.precision == "fp32" else "bf16", torch.device("cpu"))

    def loss(m: nn.Module) -> Tensor:
        with short.autocast():
            return task.loss_sum(m, batch)

    measure = recomputed_bytes if recipe.hardware.gradient_checkpointing else saved_bytes
    sizes = model_sizes(model)
    return predict(recipe, plan, replace(sizes, activations=measure(model, loss)))


def recomputed_bytes(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """`saved_bytes` with gradient checkpointing, which it turns on in `model`: what is kept between blocks,
    and what the largest block keeps while it is recomputed.
    """
    within = [0]

    def measured_first(forward: Callable[..., Any]) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
            within.append(saved_bytes(block, lambda _: forward(*args, **kwargs)))

        return hook

    hooks = [
        block.register_forward_pre_hook(measured_first(block.forward), with_kwargs=True)
        for block in recomputable(model)
    ]
    recompute_blocks(model)
    between = saved_bytes(model, loss)
    for hook in hooks:
        hook.remove()
    return between + max(within)
