"""Metrics that are no ratio of sums: what was measured of every batch, once each, in order, on every rank."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distdl.comm import World
from distdl.errors import DataError
from distdl.testing import run_world
from distdl.train.evaluate import evaluate

ROWS = 23


class Ids:
    """Notes the ids of a batch; its metrics depend on the order in which they are told."""

    def collate(self, rows: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"ids": torch.from_numpy(rows["ids"])}

    def measure(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"ids": batch["ids"].tolist(), "text": "ä"}

    def metrics(self, found: list[Any]) -> dict[str, float]:
        ids = [i for batch in found for i in batch["ids"]]
        if ids != list(range(ROWS)):
            raise DataError(f"out of order: {ids}")
        return {"batches": len(found), "last": ids[-1]}


class Picky(Ids):
    def metrics(self, found: list[Any]) -> dict[str, float]:
        raise DataError("no sense in these")


class Stored:
    def gather(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return {"ids": ids}


def session(world: World, task: Any) -> Any:
    plan = SimpleNamespace(eval_rows=ROWS, micro_batch=4, engine="ddp", precision="fp32")
    engine = SimpleNamespace(
        evaluating=nullcontext, place=lambda b: b, module=nn.Identity(), device=torch.device("cpu")
    )
    return SimpleNamespace(world=world, task=task, plan=plan, engine=engine, eval_rows=Stored())


def ids_of(world: World) -> dict[str, float] | None:
    return evaluate(session(world, Ids()))


def refused(world: World) -> str:
    with pytest.raises(DataError) as caught:
        evaluate(session(world, Picky()))
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_batch_is_told_once_and_in_order_on_every_rank(size: int) -> None:
    assert run_world(ids_of, size) == [{"batches": 6, "last": ROWS - 1}] * size


def test_metrics_that_make_no_sense_end_every_rank_with_their_error() -> None:
    assert run_world(refused, 2) == ["no sense in these"] * 2
