"""What each engine needs to train an LSTM of 100 million parameters with AdamW, beside the prediction.

Each engine trains a few steps in fresh processes. The peak is the highest resident memory of the fullest rank
(VmHWM) less what the process had before there was a model.

    python benchmarks/memory.py [--worlds 2 4] [--engines ddp fsdp zero1 ...]
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.capabilities import ENGINES
from distdl.comm import World
from distdl.engines import Group, Pass, build_engine, microstep
from distdl.engines.sizes import model_sizes
from distdl.keys import seed_everything
from distdl.memory import predict
from distdl.models.lstm import Recurrent
from distdl.plan import Plan, make_plan
from distdl.recipe import Recipe, parse_recipe
from distdl.samples import DataInfo
from distdl.testing import run_world
from distdl.topology import Topology

VOCABULARY, WIDTH, LAYERS, MICRO, STEPS_OF_TIME = 7_500, 1024, 11, 4, 16
TRAINED_STEPS = 3
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def recipe_for(engine: str) -> Recipe:
    return parse_recipe(
        {
            "task": {"name": "image_classification"},
            "model": {"name": "cnn5"},
            "data": {"name": "fashion_mnist"},
            "batch": {"global": 4 * MICRO, "micro": MICRO},
            "optim": {"name": "adamw", "lr": 1e-4},
            "train": {"max_steps": 100},
            "hardware": {"engine": engine, "device": "cpu", "threads": 1, "fuse": 1},
        }
    )


def plan_of(recipe: Recipe, size: int) -> Plan:
    return make_plan(recipe, Topology.of(1, size), DataInfo("made", {"train": 1600, "test": 8}, {}, "f"))


def network() -> Recurrent:
    seed_everything(1)
    return Recurrent(VOCABULARY, 10, embedding=WIDTH, hidden=WIDTH, layers=LAYERS)


def batch() -> dict[str, Tensor]:
    return {
        "tokens": torch.randint(1, VOCABULARY, (MICRO, STEPS_OF_TIME)),
        "lengths": torch.full((MICRO,), STEPS_OF_TIME),
        "labels": torch.randint(10, (MICRO,)),
    }


def loss_sum(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    logits = model(given["tokens"], given["lengths"])
    return functional.cross_entropy(logits.float(), given["labels"], reduction="sum")


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def peak(world: World, engine: str) -> int:
    """Bytes of this rank at its fullest while it trains, above what it had before the model."""
    # Large blocks go back to the system when they are freed: tensors are what is measured, not glibc's heap.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**18)
    recipe = recipe_for(engine)
    plan = plan_of(recipe, world.size)
    built = build_engine(plan, recipe, world, torch.device("cpu"))  # its library is loaded here
    torch.nn.Linear(8, 8)(torch.randn(2, 8)).sum().backward()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    model = network()
    built.setup(model)
    del model
    for step in range(TRAINED_STEPS):
        mine = plan.microbatches_of(step, world.rank)
        for i, m in enumerate(mine):
            given = built.place(batch())
            group = Group(m.number, MICRO, MICRO, m.number)
            microstep(
                built,
                lambda module, given=given: loss_sum(module, given),
                Pass((group,), 1, i == len(mine) - 1),
                16,
            )
        built.apply(1e-4, plan.counts(step))
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    options = parser.parse_args()
    model = network()
    sizes = model_sizes(model, lambda m: loss_sum(m, batch()))
    print(f"LSTM of {sizes.parameters:,} parameters, AdamW, fp32")
    print(f"{'engine':12} {'ranks':>5} {'measured':>10} {'predicted':>10} {'off by':>7} {'of DDP':>7}")
    del model
    for size in options.worlds:
        ddp = None
        for engine in options.engines:
            found = max(run_world(peak, size, engine, deadline_s=570))
            ddp = found if engine == "ddp" else ddp
            recipe = recipe_for(engine)
            wanted = predict(recipe, plan_of(recipe, size), sizes).total
            share = f"{found / ddp:7.2f}" if ddp else ""
            print(
                f"{engine:12} {size:5} {found / 2**20:6.0f} MiB {wanted / 2**20:6.0f} MiB "
                f"{wanted / found - 1:+7.1%} {share}",
                flush=True,
            )


if __name__ == "__main__":
    main()
