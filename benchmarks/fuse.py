"""What fused microbatches cost over a loop written by hand with one batch of the same total size.

Both run in the same processes, in turn, as in `benchmarks/overhead.py`. By hand: a DDP loop with its data in
memory, one forward and backward of all rows of a rank, plain BatchNorm and dropout. distdl: 8 microbatches a
step, fused, BatchNorm and dropout by microbatch, and all else that it always does. A
third column runs distdl with `hardware.fuse: 1`. Printed is the median over the turns of the ratio of
throughputs (above 1: distdl is faster).

    python benchmarks/fuse.py [--world 1 2] [--model cnn lstm] [--micro 32] [--fuse 8]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distdl.comm import World
from distdl.recipe import Recipe, parse_recipe
from distdl.record import RunDirectory
from distdl.tasks import Batch
from distdl.testing import run_world
from distdl.topology import Topology
from distdl.train.fusing import joined, padding_of
from distdl.train.loop import train_step
from distdl.train.session import Session
from distdl.train.setup import Opening, enter_world, open_session
from distdl.train.stop import StopFlag

M = 8
SECTIONS = {
    "cnn": {
        "task": {"name": "image_classification"},
        "model": {"name": "cnn5", "width": 32, "dropout": 0.3},
        "data": {"name": "fashion_mnist"},
    },
    "lstm": {
        "task": {"name": "text_classification"},
        "model": {"name": "lstm", "embedding": 128, "hidden": 128, "layers": 2, "dropout": 0.5},
        "data": {"name": "sentiment"},
    },
}


def recipe_for(model: str, micro: int, fuse: str, folder: str) -> Recipe:
    return parse_recipe(
        {
            **SECTIONS[model],
            "batch": {"global": M * micro, "micro": micro},
            "optim": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
            "train": {"max_steps": 100_000},
            "eval": {"every_epochs": None},
            "hardware": {"threads": 1, "device": "cpu", "fuse": fuse if fuse == "auto" else int(fuse)},
            "run": {"dir": folder},
        }
    )


def session_of(world: World, recipe: Recipe) -> Session:
    topology = Topology(
        rank=world.rank, world_size=world.size, local_rank=world.rank, local_world_size=world.size, cpus=2
    )
    _, plan, _ = enter_world(recipe, topology)
    directory = RunDirectory(recipe.run.dir or "")
    directory.create()
    world.barrier()
    attempt = Path(world.from_main(str(directory.new_attempt()) if world.is_main else None))
    session, _ = open_session(
        Opening(recipe, plan, world, topology, directory, attempt, StopFlag()), quiet=True
    )
    return session


def step_of(session: Session) -> Callable[[], None]:
    def step() -> None:
        batch = session.next_batch()
        assert batch is not None
        train_step(session, batch)

    return step


def by_hand(session: Session, model: nn.Module, batches: list[Batch]) -> Callable[[], None]:
    """A step of a DDP loop as one writes it, on whole batches that lie ready in memory."""
    wrapped = DistributedDataParallel(model) if session.world.size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    turn = 0

    def step() -> None:
        nonlocal turn
        batch = batches[turn % len(batches)]
        turn += 1
        optimizer.zero_grad()
        loss = session.task.loss_sum(wrapped, batch) / session.task.count(batch)
        loss.backward()
        optimizer.step()

    return step


def whole_batches(session: Session, steps: int) -> list[Batch]:
    """This rank's rows of the first steps, each step's as one batch."""
    session.fusing.padding = padding_of(session)
    found = []
    for step in range(steps):
        micros = session.batches.get(step)
        found.append(joined(session, micros, last=True)[0])
    return found


def measure(
    world: World, recipes: dict[str, Recipe], rounds: int, steps: int
) -> tuple[int, list[dict[str, float]]]:
    """How many microbatches a pass held; seconds a step of each, turn by turn, after a barrier."""
    sessions = {name: session_of(world, recipe) for name, recipe in recipes.items()}
    fused = sessions["fused"]
    torch.manual_seed(0)
    model = fused.task.build_model()
    if fused.engine._layout.channels_last:
        model = model.to(memory_format=torch.channels_last)
    batches = whole_batches(copy.copy(fused), 2 * steps)
    runs = {name: step_of(s) for name, s in sessions.items()} | {
        "by hand": by_hand(fused, model.train(), batches)
    }
    for _ in range(3):
        for run in runs.values():
            run()
    times = []
    for turn in range(rounds):
        found = {}
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            world.barrier()
            begin = time.perf_counter()
            for _ in range(steps):
                runs[name]()
            world.barrier()
            found[name] = (time.perf_counter() - begin) / steps
        times.append(found)
    return fused.fusing.most or 1, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", nargs="+", default=["cnn", "lstm"], choices=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--fuse", default="8")
    options = parser.parse_args()
    for model in options.model:
        for size in options.world:
            with tempfile.TemporaryDirectory() as folder:
                recipes = {
                    name: recipe_for(model, options.micro, fuse, f"{folder}/{name}")
                    for name, fuse in (("fused", options.fuse), ("separate", "1"))
                }
                most, times = run_world(
                    measure, size, recipes, options.rounds, options.steps, deadline_s=900
                )[0]
            report(model, size, options.micro, most, times)


def report(model: str, size: int, micro: int, most: int, times: list[dict[str, float]]) -> None:
    rates = {name: M * micro / statistics.median(t[name] for t in times) for name in times[0]}
    ratios = {n: statistics.median(t["by hand"] / t[n] for t in times) for n in ("fused", "separate")}
    print(
        f"{model} micro {micro} world {size}, {most} a pass: "
        + ", ".join(f"{name} {rate:.0f}/s" for name, rate in rates.items())
        + f"; fused over by hand {ratios['fused']:.3f}, separate over by hand {ratios['separate']:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
