"""bf16 under every engine beside fp32 under DDP: test accuracy, the mean of three seeds, two processes.

A CNN on the embedded subset of Fashion-MNIST and an LSTM on the sentiment sentences, in short runs.

    python benchmarks/precision.py [--engines ddp fsdp ...] [--seeds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
from pathlib import Path

from distdl.capabilities import ENGINES
from distdl.comm import World
from distdl.recipe import Recipe, load_recipe
from distdl.record import read_lines
from distdl.testing import run_world
from distdl.topology import Topology

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = {
    "fashion_cnn": ["model.width=16", "train.epochs=2", "batch.micro=64"],
    "sentiment_lstm": ["train.epochs=3"],
}
"""Recipe -> what is changed in it."""


def train_rank(world: World, recipe: Recipe) -> int:
    """One rank of a whole run."""
    from distdl.train.process import Options, train_process

    topology = Topology(
        rank=world.rank,
        world_size=world.size,
        local_rank=world.rank,
        local_world_size=world.size,
        launcher="torchrun",
        master_addr="127.0.0.1",
        master_port=1,
        cpus=1,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return train_process(recipe, topology, Options())


def accuracy(name: str, engine: str, precision: str, seed: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        changes = [
            *RUNS[name],
            f"run.dir={folder}",
            f"hardware.engine={engine}",
            f"train.precision={precision}",
            f"train.seed={seed}",
            "hardware.threads=1",
            "eval.every_epochs=null",
            "checkpoint.every_epochs=null",
            "checkpoint.every_steps=null",
        ]
        recipe = load_recipe(CONFIGS / f"{name}.yaml", changes)
        assert run_world(train_rank, 2, recipe, deadline_s=580) == [0, 0]
        return float(read_lines(Path(folder) / "metrics.jsonl")[-1]["eval_accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for name in RUNS:
        seeds = range(1, options.seeds + 1)
        fp32 = statistics.mean(accuracy(name, "ddp", "fp32", seed) for seed in seeds)
        print(f"{name:15} fp32 ddp         {fp32:.4f}", flush=True)
        for engine in options.engines:
            found = statistics.mean(accuracy(name, engine, "bf16", seed) for seed in seeds)
            points = 100 * (found - fp32)
            print(f"{name:15} bf16 {engine:11} {found:.4f} ({points:+.2f} points)", flush=True)


if __name__ == "__main__":
    main()
