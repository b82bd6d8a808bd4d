"""From the command to the first finished step: two processes on one machine, by each way in, in turn.

    python benchmarks/launch.py [--rounds 7]

The script under torchrun is written by hand: the same imports, network and batch, and plain DDP. The
others start the recipe. The clock begins when the command is started, and ends when rank 0 has made its
first step. What is printed is the median of each, and the median over the rounds of its ratio to the
script's. What a launcher takes by itself, whatever it starts, is shown by an empty script, which does
nothing but say that it runs.

Then how long `distdl --help` and `distdl plan` take, which import no torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from distdl.record import read_lines

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs" / "fashion_cnn.yaml"
MICRO = 32
KEYS = ["train.max_steps=2", "hardware.threads=1", "hardware.device=cpu", f"batch.micro={MICRO}"]
BIN = Path(sys.executable).parent
EMPTY = """
import os, sys, time
if os.environ["RANK"] == "0":
    with open(os.environ["SAYS_SO"], "w") as done:
        done.write(str(time.time()))
"""


def script(done: Path) -> None:
    """What torchrun starts: one DDP step as one writes it, on the images of the recipe."""
    import torch
    import torch.distributed as dist
    from torch.nn import functional
    from torch.nn.parallel import DistributedDataParallel

    import distdl.train.process  # noqa: F401 - the same imports, for whatever they cost
    from distdl.data import ShardedDataset
    from distdl.models.cnn5 import Cnn5

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    dataset = ShardedDataset("fashion_mnist", split="train")
    rows = dataset[rank * 4 * MICRO : (rank + 1) * 4 * MICRO]
    images, labels = (torch.from_numpy(rows[name]) for name in ("image", "label"))
    torch.manual_seed(0)
    wrapped = DistributedDataParallel(Cnn5(1, 10, width=32))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01, momentum=0.9)
    x = images.unsqueeze(1).float().mul_(2 / 255).sub_(1)
    functional.cross_entropy(wrapped(x), labels.long()).backward()
    optimizer.step()
    if rank == 0:
        done.write_text(str(time.time()))
    del wrapped, optimizer  # what outlives the group may wait for it for ever
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def commands(run: Path) -> dict[str, list[str]]:
    """Name of a way in -> the command that trains with it, two processes. Those that are installed."""
    distdl = ["distdl", "train", str(RECIPE), *KEYS, f"run.dir={run}"]
    empty = run.parent / "empty.py"
    empty.write_text(EMPTY)
    torchrun = [str(BIN / "torchrun"), "--nproc-per-node=2", f"--master-port={free_port()}"]
    found = {
        "torchrun, a script": [*torchrun, __file__, "--done", str(run / "done")],
        "distdl launch": [str(BIN / "distdl"), "launch", *distdl[2:], "--procs", "2"],
        "torchrun -m distdl": [*torchrun, "-m", *distdl],
        "torchrun, empty": [*torchrun, str(empty)],
    }
    if importlib.util.find_spec("accelerate"):
        options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
        options += ["--dynamo_backend=no", f"--main_process_port={free_port()}"]
        accelerate = [str(BIN / "accelerate"), "launch", *options]
        found["accelerate launch"] = [*accelerate, "-m", *distdl]
        found["accelerate, empty"] = [*accelerate, str(empty)]
    if importlib.util.find_spec("deepspeed"):
        options = ["--num_gpus=2", f"--master_port={free_port()}"]
        deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", *options]
        found["deepspeed"] = [*deepspeed, "--module", *distdl]
        found["deepspeed, empty"] = [*deepspeed, str(empty)]
    return found


def first_step(run: Path) -> float:
    """When rank 0 had made its first step, on the clock of `time.time`."""
    if (run / "done").exists():
        return float((run / "done").read_text())
    return float(next(e["time"] for e in read_lines(run / "events.jsonl") if e["event"] == "first_step"))


def measure(name: str, folder: Path) -> float | None:
    """Seconds to the first step; None where this way in is not installed."""
    folder.mkdir()
    command = commands(folder).get(name)
    if command is None:
        return None
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]])}
    environment["SAYS_SO"] = str(folder / "done")
    begin = time.time()
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return first_step(folder) - begin


def seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--done", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.done:
        script(options.done)
        return
    with tempfile.TemporaryDirectory() as folder:
        names = list(commands(Path(folder)))
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(options.rounds + 1):  # the first one warms the caches and is not counted
            for i, name in enumerate(names if turn % 2 else names[::-1]):
                took = measure(name, Path(folder) / f"{turn}-{i}")
                if turn and took is not None:
                    times[name].append(took)
    bare = times["torchrun, a script"]
    for name, taken in times.items():
        ratio = statistics.median(mine / its for mine, its in zip(taken, bare, strict=True))
        what = "its first line" if name.endswith("empty") else "the first step"
        print(f"{name:20} {statistics.median(taken):6.2f} s to {what}, {ratio:.2f} of the script")
    for words in (["--help"], ["plan", str(RECIPE)]):
        command = [str(BIN / "distdl"), *words]
        taken = [seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(9)]  # noqa: B023
        print(f"distdl {words[0]:13} {statistics.median(taken):6.2f} s")


if __name__ == "__main__":
    main()
