"""What each engine costs over the same library used by hand: the same network, batch and layout.

Two processes, one microbatch each, as benchmarks/overhead.py, which measures plain DDP and whose turns these
are: in the same processes, one after the other, ten steps each. distdl does all that it always does (keyed
order, gather from the memory map, agreement at each boundary, finite check, running statistics, metrics); by
hand there is nothing but the library's own loop. Above 1: distdl is faster.

    python benchmarks/engines.py [--engines ddp fsdp zero0 ...] [--rounds 20] [--steps 10]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from overhead import MICRO, RECIPE, by_hand, with_distdl
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from distdl.capabilities import ENGINES
from distdl.comm import World
from distdl.engines.blocks import sharded_units
from distdl.models.cnn5 import Cnn5
from distdl.recipe import Recipe, load_recipe
from distdl.testing import run_world

Step = Callable[[], None]
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


def batches(world: World, images: Tensor, labels: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """This rank's next images (channels last) and labels."""
    generator = torch.Generator().manual_seed(world.rank)

    def draw() -> tuple[Tensor, Tensor]:
        ids = torch.randint(len(images), (MICRO,), generator=generator)
        x = images[ids].unsqueeze(1).float().mul_(2 / 255).sub_(1)
        return x.to(memory_format=torch.channels_last), labels[ids]

    return draw


def network(layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    """Sharding libraries want contiguous weights; images are channels last, so the activations are."""
    torch.manual_seed(0)
    return Cnn5(1, 10, width=32).to(memory_format=layout)  # type: ignore[call-overload,no-any-return]


def fsdp_by_hand(world: World, images: Tensor, labels: Tensor) -> Step:
    model = network()
    for unit in sharded_units(model):
        fully_shard(unit)
    fully_shard(model)
    optimizer, draw = torch.optim.SGD(model.parameters(), **SGD), batches(world, images, labels)

    def step() -> None:
        x, y = draw()
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def zero_by_hand(stage: int) -> Callable[[World, Tensor, Tensor], Step]:
    def make(world: World, images: Tensor, labels: Tensor) -> Step:
        import deepspeed

        model = network()
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage},
        }
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        draw = batches(world, images, labels)

        def step() -> None:
            x, y = draw()
            engine.backward(functional.cross_entropy(engine(x), y))
            engine.step()

        return step

    return make


def accelerate_by_hand(world: World, images: Tensor, labels: Tensor) -> Step:
    from accelerate import Accelerator

    # As its launcher says it: without, Accelerate is one process in silence, and sends nothing.
    place = {"RANK": world.rank, "LOCAL_RANK": world.rank, "WORLD_SIZE": world.size, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    accelerator, model = Accelerator(cpu=True), network(torch.channels_last)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), **SGD))
    assert isinstance(model, DistributedDataParallel), f"Accelerate made a {type(model).__name__}"
    draw = batches(world, images, labels)

    def step() -> None:
        x, y = draw()
        optimizer.zero_grad()
        accelerator.backward(functional.cross_entropy(model(x), y))
        optimizer.step()

    return step


BY_HAND: dict[str, Callable[[World, Tensor, Tensor], Step]] = {
    "ddp": by_hand,
    "fsdp": fsdp_by_hand,
    **{f"zero{stage}": zero_by_hand(stage) for stage in range(4)},
    "accelerate": accelerate_by_hand,
}


def measure(world: World, recipe: Recipe, rounds: int, steps: int) -> list[tuple[float, float]]:
    """Seconds a step (distdl, by hand) of each round, after a barrier."""
    ours, images, labels = with_distdl(world, recipe)
    pair = {"ours": ours, "theirs": BY_HAND[recipe.hardware.engine](world, images, labels)}
    for _ in range(3):
        for step in pair.values():
            step()
    times = []
    for turn in range(rounds):
        took = {}
        for name in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(steps):
                pair[name]()
            dist.barrier()
            took[name] = (time.perf_counter() - begin) / steps
        times.append((took["ours"], took["theirs"]))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    print(f"{'engine':12} {'distdl':>8} {'by hand':>8}  samples/s    ratio (quartiles)")
    for engine in options.engines:
        with tempfile.TemporaryDirectory() as folder:
            changes = [
                f"run.dir={folder}",
                f"batch.micro={MICRO}",
                f"hardware.engine={engine}",
                "hardware.threads=1",
                "train.epochs=1000",
                "optim.lr=0.01",
            ]
            recipe = load_recipe(RECIPE, changes)
            times = run_world(measure, 2, recipe, options.rounds, options.steps, deadline_s=600)[0]
        ratios = [theirs / ours for ours, theirs in times]
        rates = [2 * MICRO / statistics.median(t[column] for t in times) for column in (0, 1)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{engine:12} {rates[0]:8.0f} {rates[1]:8.0f}            {middle:.3f} ({low:.3f} to {high:.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
