"""What the tests of the core share: recipes and plans of a few lines, and a world of threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import torch

from distdl.comm import World
from distdl.plan import Plan, make_plan
from distdl.recipe import Recipe, parse_recipe
from distdl.samples import DataInfo, Field
from distdl.topology import Topology


def recipe_with(**changes: dict[str, Any]) -> Recipe:
    """A small valid recipe; each keyword is laid over a section (a new `name` replaces it)."""
    sections: dict[str, Any] = {
        "task": {"name": "image_classification"},
        "model": {"name": "cnn5", "width": 4},
        "data": {"name": "fashion_mnist"},
        "batch": {"global": 12, "micro": 4},
        "optim": {"name": "sgd", "lr": 0.5},
        "train": {"epochs": 2},
        "hardware": {"device": "cpu"},
    }
    for name, section in changes.items():
        below = {} if "name" in section else sections.get(name, {})
        sections[name] = {**below, **section}
    return parse_recipe(sections)


def images(shape: tuple[int, ...] = (28, 28), rows: int = 100, classes: int = 10) -> DataInfo:
    fields = {"image": Field("uint8", shape), "label": Field("int64", (), classes)}
    return DataInfo("pictures", {"train": rows, "test": 20}, fields, "fingerprint")


def plan_for(world_size: int = 1, rows: int = 100, **changes: dict[str, Any]) -> Plan:
    return make_plan(recipe_with(**changes), Topology.of(1, world_size, cpus=4), images(rows=rows))


class ThreadWorld(World):
    """A rank that is a thread. What it gathers is exchanged at a barrier, as JSON where a `World` does so."""

    def __init__(self, rank: int, size: int, shared: tuple[list[Any], threading.Barrier]) -> None:
        super().__init__(rank, size)
        self._slots, self._barrier = shared

    def _exchange(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values

    def sum_ints(self, values: list[int]) -> list[int]:
        return [sum(column) for column in zip(*self._exchange(values), strict=True)]

    def gather(self, value: Any) -> list[Any]:
        return self._exchange(json.loads(json.dumps(value)))

    def start_gather_rows(self, rows: torch.Tensor, counts: list[int]) -> Callable[[], torch.Tensor]:
        assert rows.shape[0] == counts[self.rank]
        gathered = torch.cat(self._exchange(rows))
        return lambda: gathered


def on_threads(size: int, fn: Callable[[World], Any]) -> list[Any]:
    """``fn(world)`` on `size` threads; by rank, what it returned or the exception that it raised."""
    shared: tuple[list[Any], threading.Barrier] = ([None] * size, threading.Barrier(size, timeout=30))
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = fn(ThreadWorld(rank, size, shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
