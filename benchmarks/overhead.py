"""What distdl's loop costs over a DDP loop written by hand: same model, same batch, same layout.

Two processes, one microbatch each. The hand-written loop has its data in memory as one tensor and does
nothing but index, normalise, forward, backward, step. distdl's does all it always does: keyed order, gather
from the memory map, agreement at each boundary, finite check, running statistics, metrics. Both run in the
same processes, in turn, ten steps each: in shorter turns the first step after a change, with cold caches and
a heap that was given back, decides the figure. What is printed is the median over the turns of the ratio of
their throughputs (above 1: distdl is faster).

    python benchmarks/overhead.py [--rounds 20] [--steps 10] [--set KEY=VALUE]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from distdl.comm import World
from distdl.models.cnn5 import Cnn5
from distdl.recipe import Recipe, load_recipe
from distdl.record import RunDirectory
from distdl.testing import run_world
from distdl.topology import Topology

MICRO = 128
RECIPE = Path(__file__).parent.parent / "configs" / "fashion_cnn.yaml"


def by_hand(world: World, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A step of a DDP loop as one writes it: SGD with momentum, weight decay, no clipping."""
    torch.manual_seed(0)
    model = Cnn5(1, 10, width=32).to(memory_format=torch.channels_last)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(world.rank)

    def step() -> None:
        ids = torch.randint(len(images), (MICRO,), generator=generator)
        x = images[ids].unsqueeze(1).float().mul_(2 / 255).sub_(1)
        x = x.to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        functional.cross_entropy(wrapped(x), labels[ids]).backward()
        optimizer.step()

    return step


def with_distdl(world: World, recipe: Recipe) -> tuple[Callable[[], None], torch.Tensor, torch.Tensor]:
    """A step of distdl's loop, and the same images and labels in memory for the other."""
    from distdl.train.loop import train_step
    from distdl.train.setup import Opening, enter_world, open_session
    from distdl.train.stop import StopFlag

    topology = Topology(rank=world.rank, world_size=2, local_rank=world.rank, local_world_size=2, cpus=2)
    _, plan, _ = enter_world(recipe, topology)
    directory = RunDirectory(recipe.run.dir or "")
    directory.create()
    world.barrier()
    attempt = Path(world.from_main(str(directory.new_attempt()) if world.is_main else None))
    opening = Opening(recipe, plan, world, topology, directory, attempt, StopFlag())
    session, _ = open_session(opening, quiet=True)

    def step() -> None:
        batch = session.next_batch()
        assert batch is not None
        train_step(session, batch)

    rows = session.eval_rows.gather(torch.arange(plan.eval_rows).numpy())
    return step, torch.from_numpy(rows["image"]), torch.from_numpy(rows["label"])


def measure(world: World, recipe: Recipe, rounds: int, steps: int) -> list[tuple[float, float]]:
    """Seconds a step (distdl, by hand) of each round, by the slower rank's clock after a barrier."""
    ours, images, labels = with_distdl(world, recipe)
    theirs = by_hand(world, images, labels)
    for warm in (ours, theirs) * 3:
        warm()
    times = []
    for turn in range(rounds):
        pair = {}
        for name in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
            world.barrier()
            begin = time.perf_counter()
            for _ in range(steps):
                (ours if name == "ours" else theirs)()
            dist.barrier()
            pair[name] = (time.perf_counter() - begin) / steps
        times.append((pair["ours"], pair["theirs"]))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE for the recipe")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(
            RECIPE,
            [
                f"run.dir={folder}",
                f"batch.micro={MICRO}",
                "hardware.threads=1",
                "train.epochs=1000",
                "optim.lr=0.01",
            ],
        )
        times = run_world(measure, 2, recipe, options.rounds, options.steps, deadline_s=600)[0]
    ratios = [theirs / ours for ours, theirs in times]
    for column, name in enumerate(("distdl", "by hand")):
        rate = 2 * MICRO / statistics.median(t[column] for t in times)
        print(f"{name:8} {rate:8.0f} samples/s (median of {len(times)} turns)")
    print(f"throughput of distdl over by hand: median {statistics.median(ratios):.3f}")
    quarters = statistics.quantiles(ratios, n=4)
    print(f"(quartiles {quarters[0]:.3f} to {quarters[2]:.3f})")


if __name__ == "__main__":
    main()
