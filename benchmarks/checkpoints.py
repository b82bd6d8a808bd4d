"""What a checkpoint of 200 million parameters with AdamW costs (2.4 GB), beside what others need for it.

Each way of saving begins, lets training go on (the *stall*), and is durable at some time (the *total*):

    raw write            the bytes of the same tensors, one write after another, and fsync
    distdl               synchronous, and asynchronous (buffers kept from save to save; the first makes them)
    torch.save           and fsync; rank 0 alone
    DCP save             torch.distributed.checkpoint with its own FileSystemWriter, which fsyncs
    DCP async_save       with the stager it makes by default, and with one that is kept (warm from the second
                         save on)

All of them run in the same processes, one after the other, in an order that turns from round to round;
medians over the rounds, and ratios of the same round. Then the checkpoints are loaded into tensors that are
there: they have just been written, so files come from the page cache, for everybody. Last, the peak of
memory: each way in fresh processes, saving twice, highest resident memory (VmHWM) less what was there before
its first save.

    python benchmarks/checkpoints.py [--ranks 2] [--millions 200] [--rounds 3] [--dir FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from checkpoint_ways import (
    ASYNCHRONOUS,
    DCP_ASYNC,
    DCP_KEPT,
    DCP_LOAD,
    LOADS,
    RAW,
    SYNCHRONOUS,
    UNVERIFIED,
    VERIFIED,
    WAYS,
    Save,
    State,
    make_state,
    size_of,
)

from distdl.comm import World
from distdl.testing import run_world

BUFFERS = 64 << 20
"""What may come on top of a copy of the state: buffers of reading and writing, stacks of threads."""
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
DEADLINE_S = 3600.0


def slowest(world: World, seconds: float) -> float:
    """The slowest rank's time: what a step of all of them waits for."""
    return float(max(world.gather(seconds)))


def save_once(world: World, way: Save, state: State, folder: Path) -> tuple[float, float]:
    """(stall, total) in seconds of the slowest rank."""
    for tensor in state.values():
        tensor.mul_(
            1.0
        )  # as a step does before each save: what was just written and removed is out of the way
    world.barrier()
    begin = time.perf_counter()
    wait = way(state, folder, world)
    stall = time.perf_counter() - begin
    wait()  # DCP's thread communicates until here: nobody else may
    total = time.perf_counter() - begin
    return slowest(world, stall), slowest(world, total)


def clear(world: World, folder: Path) -> None:
    """Remove a checkpoint, and let the file system come to rest before the next one is timed."""
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.sync()
    world.barrier()


def turned(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def measure(world: World, root: Path, millions: float, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds of each round, by way: "saves" as (stall, total), "loads"; and the state's bytes."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # DCP says that it saves without a process group
    state = make_state(millions)
    saves: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    ways = {name: make() for name, make in WAYS.items()}
    for turn in range(-1, rounds):  # the first makes the buffers that are kept, and is not counted
        for name in turned(list(WAYS), turn):
            clear(world, root / name)
            times = save_once(world, ways[name], state, root / name)
            saves[name].append(times)
            if world.is_main:
                print(
                    f"  round {turn + 1}: {name:28} stall {times[0]:6.2f} s, total {times[1]:6.2f} s",
                    flush=True,
                )
            if turn < rounds - 1 or name not in {of for of, _ in LOADS.values()}:
                clear(world, root / name)
    del ways
    loads = measure_loads(world, root, state, rounds)
    first = {name: times.pop(0) for name, times in saves.items()}
    return {"bytes": size_of(state), "saves": saves, "first": first, "loads": loads}


def measure_loads(world: World, root: Path, state: State, rounds: int) -> dict[str, list[float]]:
    target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    loads: dict[str, list[float]] = {name: [] for name in LOADS}
    for turn in range(-1, rounds):
        for name in turned(list(LOADS), turn):
            of, load = LOADS[name]
            for tensor in target.values():
                tensor.zero_()
            world.barrier()
            begin = time.perf_counter()
            load(target, root / of, world)
            seconds = slowest(world, time.perf_counter() - begin)
            wrong = [n for n, t in state.items() if not torch.equal(t, target[n])]
            assert not wrong, f"{name}: {wrong[0]} is not what was saved"
            if turn >= 0:
                loads[name].append(seconds)
                if world.is_main:
                    print(f"  round {turn + 1}: {name:28} {seconds:6.2f} s", flush=True)
    return loads


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def peak(world: World, root: Path, millions: float, threads: int, name: str) -> tuple[int, int]:
    """(extra bytes at the fullest, bytes of the state) of this rank over two saves of one way."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**18)  # what is freed goes back: not glibc's heap is measured
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    tiny = {"warm": torch.zeros(8)}
    clear(world, root / name)
    WAYS[name]()(tiny, root / name, world)()  # what its library loads at its first use
    state = make_state(millions)
    before = status("VmRSS")
    way = WAYS[name]()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    for _ in range(2):
        clear(world, root / name)
        save_once(world, way, state, root / name)
    extra = status("VmHWM") - before
    clear(world, root / name)
    return extra, size_of(state)


# --- what is printed ---


def over(top: list[float], bottom: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(top, bottom, strict=True))


def bounds(found: dict[str, Any], memory: dict[str, tuple[int, int]]) -> list[tuple[str, float, float, bool]]:
    """What has to hold: (what, the figure, its bound, whether that is the most; else the least)."""
    total = {name: [t for _, t in times] for name, times in found["saves"].items()}
    stall = {name: [s for s, _ in times] for name, times in found["saves"].items()}
    loads = found["loads"]
    rows = [
        ("synchronous throughput / raw write", over(total[RAW], total[SYNCHRONOUS]), 0.9, False),
        ("asynchronous stall / DCP, default stager", over(stall[ASYNCHRONOUS], stall[DCP_ASYNC]), 0.35, True),
        ("asynchronous stall / DCP, kept stager", over(stall[ASYNCHRONOUS], stall[DCP_KEPT]), 1.0, True),
        ("load speed, verified / DCP", over(loads[DCP_LOAD], loads[VERIFIED]), 1.0, False),
        ("load speed, not verified / DCP", over(loads[DCP_LOAD], loads[UNVERIFIED]), 1.0, False),
    ]
    for name in (SYNCHRONOUS, ASYNCHRONOUS):
        if name in memory:
            extra, size = memory[name]
            rows.append((f"peak extra memory / state, {name}", extra / size, 1.0 + BUFFERS / size, True))
    return rows


def report(found: dict[str, Any], memory: dict[str, tuple[int, int]]) -> None:
    size = found["bytes"] / 1e9
    print(f"\n{'saving':28} {'stall':>8} {'total':>8} {'GB/s':>6} {'first stall':>12} {'extra memory':>13}")
    for name, times in found["saves"].items():
        stall, total = (statistics.median(t[i] for t in times) for i in (0, 1))
        extra = f"{memory[name][0] / 2**20:9,.0f} MiB" if name in memory else ""
        first = found["first"][name][0]
        print(f"{name:28} {stall:6.2f} s {total:6.2f} s {size / total:6.2f} {first:10.2f} s {extra:>13}")
    print(f"\n{'loading':28} {'time':>8} {'GB/s':>6}")
    for name, seconds in found["loads"].items():
        middle = statistics.median(seconds)
        print(f"{name:28} {middle:6.2f} s {size / middle:6.2f}")
    print()
    for what, value, bound, at_most in bounds(found, memory):
        verdict = "PASS" if (value <= bound if at_most else value >= bound) else "FAIL"
        print(f"{verdict}  {what:48} {value:6.3f}  ({'at most' if at_most else 'at least'} {bound:.3g})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes, each of which holds the whole state")
    parser.add_argument("--millions", type=float, default=200, help="of parameters; 12 bytes each are saved")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of each process (default: its share of the cores)")
    parser.add_argument("--dir", type=Path, default=Path(), help="where the files go for the time being")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--memory", nargs="*", default=list(WAYS), help="ways whose peak is measured")
    options = parser.parse_args()
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.ranks)
    needed = int(
        5 * 12e6 * options.millions
    )  # three checkpoints that are loaded, one beside them, and margin
    free = shutil.disk_usage(options.dir).free
    if free < needed:
        parser.error(
            f"{options.dir.resolve()} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} are needed"
        )
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=options.dir) as folder:
        given = (Path(folder), options.millions)
        print(f"{options.ranks} rank(s), {threads} thread(s) each, {options.millions:g} million parameters")
        found = run_world(measure, options.ranks, *given, options.rounds, threads, deadline_s=DEADLINE_S)[0]
        memory = {
            name: max(run_world(peak, options.ranks, *given, threads, name, deadline_s=DEADLINE_S))
            for name in options.memory
        }
    report(found, memory)
    found |= {"memory": memory, "bounds": bounds(found, memory), "ranks": options.ranks, "threads": threads}
    text = json.dumps(found)
    print(f"\n{text}")
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
