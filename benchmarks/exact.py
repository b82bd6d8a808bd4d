"""What `train.reduction: exact` costs: step time over that of `fast`, on the same separate microbatches.

Two processes. Both engines train in the same processes, in turn, so that what else runs on the machine slows
both. A step is what an engine does of it: forward and backward of each microbatch, reduction, norm, clipping,
optimiser, running statistics; the loop around it is the same for both. What is printed is the median over the
turns of the ratio of their step times (above 1: exact is slower), its quartiles, and the ratio of CPU time of
rank 0, which tells more where the machine is not idle.

    python benchmarks/exact.py [--rounds 30] [--steps 6] [--models cnn lstm] [--counts 2 8 12] [--micro 32]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.comm import World
from distdl.engines import Engine, Group, Pass, build_engine, microstep
from distdl.keys import seed_everything
from distdl.models.cnn5 import Cnn5
from distdl.models.lstm import Recurrent
from distdl.plan import make_plan
from distdl.recipe import Recipe, parse_recipe
from distdl.samples import DataInfo
from distdl.testing import run_world
from distdl.topology import Topology

LENGTH = 64
VOCABULARY = 5000


def recipe_for(micro: int, count: int, reduction: str, hardware: dict[str, Any]) -> Recipe:
    return parse_recipe(
        {
            "task": {"name": "image_classification"},
            "model": {"name": "cnn5"},
            "data": {"name": "fashion_mnist"},
            "batch": {"global": micro * count, "micro": micro},
            "optim": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "clip_norm": 1.0},
            "train": {"max_steps": 10**6, "reduction": reduction},
            "hardware": {"threads": 1, "device": "cpu", "fuse": 1, **hardware},
        }
    )


def model_and_batch(name: str, micro: int) -> tuple[nn.Module, dict[str, Tensor]]:
    seed_everything(0)
    labels = torch.randint(10, (micro,))
    if name == "cnn":
        return Cnn5(1, 10, width=32), {"images": torch.randn(micro, 1, 28, 28), "labels": labels}
    model = Recurrent(VOCABULARY, 10, embedding=128, hidden=256, layers=2)
    tokens = torch.randint(1, VOCABULARY, (micro, LENGTH))
    return model, {"tokens": tokens, "lengths": torch.full((micro,), LENGTH), "labels": labels}


class Run:
    """One engine that trains again and again on the same microbatches."""

    def __init__(
        self, world: World, name: str, micro: int, count: int, reduction: str, hardware: dict[str, Any]
    ) -> None:
        recipe = recipe_for(micro, count, reduction, hardware)
        info = DataInfo("made", {"train": micro * count, "test": 1}, {}, "f")
        self.world, self.exact = world, reduction == "exact"
        self.plan = make_plan(recipe, Topology.of(1, world.size), info)
        self.engine: Engine = build_engine(self.plan, recipe, world, torch.device("cpu"))
        model, batch = model_and_batch(name, micro)
        self.engine.setup(model)
        self.batch = self.engine.place(batch)

    def loss(self, model: nn.Module) -> Tensor:
        given = [t for key, t in self.batch.items() if key != "labels"]
        return functional.cross_entropy(model(*given), self.batch["labels"], reduction="sum")

    def step(self) -> None:
        mine = self.plan.microbatches_of(0, self.world.rank)
        rows, count = self.plan.micro_batch, self.plan.microbatches
        for i, m in enumerate(mine):
            groups = (Group(m.number, rows, rows, m.number),)
            this = Pass(groups, m.weight, i == len(mine) - 1, count)
            microstep(self.engine, self.loss, this, rows * count)
        self.engine.apply(1e-3, self.plan.counts(0))


def measure(
    world: World, name: str, micro: int, count: int, hardware: dict[str, Any], rounds: int, steps: int
) -> list[dict[str, float]]:
    """Seconds a step of each turn, "fast" and "exact", and this rank's CPU seconds."""
    runs = {kind: Run(world, name, micro, count, kind, hardware) for kind in ("fast", "exact")}
    times = []
    for turn in range(rounds + 1):
        took: dict[str, Any] = {}
        for kind in ("fast", "exact") if turn % 2 else ("exact", "fast"):
            torch.use_deterministic_algorithms(kind == "exact")
            torch.utils.deterministic.fill_uninitialized_memory = False
            runs[kind].step()  # caches are the other's
            world.barrier()
            begin, busy = time.perf_counter(), time.process_time()
            for _ in range(steps):
                runs[kind].step()
            took[f"{kind}_cpu"] = (time.process_time() - busy) / steps
            world.barrier()
            took[kind] = (time.perf_counter() - begin) / steps
        times.append(took)
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--models", nargs="+", default=["cnn", "lstm"], choices=["cnn", "lstm"])
    parser.add_argument("--counts", nargs="+", type=int, default=[2, 8, 12], help="microbatches of a step")
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument("--sharded", action="store_true", help="with hardware.shard_optimizer, both")
    parser.add_argument("--engine", default="ddp", choices=["ddp", "fsdp"], help="of both")
    options = parser.parse_args()
    hardware = {"engine": options.engine, "shard_optimizer": options.sharded}
    for name in options.models:
        for count in options.counts:
            steps = max(1, options.steps * 2 // count)
            given = (name, options.micro, count, hardware, options.rounds, steps)
            times = run_world(measure, options.procs, *given, deadline_s=3600)[0]
            ratios = [t["exact"] / t["fast"] for t in times]
            cpu = statistics.median(t["exact_cpu"] / t["fast_cpu"] for t in times)
            low, middle, high = statistics.quantiles(ratios, n=4)
            fast = 1000 * statistics.median(t["fast"] for t in times)
            exact = 1000 * statistics.median(t["exact"] for t in times)
            print(
                f"{name:5} M = {count:2}, {options.procs} ranks: fast {fast:7.1f} ms, exact {exact:7.1f} ms; "
                f"ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}), of CPU time {cpu:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
