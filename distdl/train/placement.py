"""Which CPUs the processes of a machine run on: each on those of one NUMA node, its GPU's where it has one.

A process that wanders between the nodes of a large machine reads memory that lies at another. On a machine of
one node, and where the launcher has bound the process already (srun does), nothing is changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from distdl.plan import Plan
from distdl.recipe import Recipe
from distdl.topology import Topology

Cpus = frozenset[int]
_NODES = Path("/sys/devices/system/node")
_PCI = Path("/sys/bus/pci/devices")
_CARDS = Path("/proc/driver/nvidia/gpus")


def bind(recipe: Recipe, topology: Topology) -> str:
    """Bind this process, before it starts threads; returns what was chosen for those of this machine, in a
    line. Every rank calls it, alone.
    """
    if not hasattr(os, "sched_setaffinity"):
        return "placement: left to the system"
    allowed, procs = frozenset(os.sched_getaffinity(0)), topology.local_world_size
    nodes = numa_nodes()
    on_gpus = topology.gpus > 0 and recipe.hardware.device != "cpu"
    cards = gpu_nodes(os.environ.get("CUDA_VISIBLE_DEVICES")) if on_gpus else []
    wanted = recipe.hardware.affinity == "numa"
    chosen = placements(nodes, allowed, procs, cards) if wanted else [None] * procs
    mine = chosen[topology.local_rank]
    if mine is not None:
        os.sched_setaffinity(0, mine)
    return described(chosen, allowed)


def placements(
    nodes: Sequence[Cpus], allowed: Cpus, procs: int, cards: Sequence[int | None] = ()
) -> list[Cpus | None]:
    """The CPUs of each of `procs` processes, by local rank; None: all that are `allowed`.

    `nodes`: the CPUs of each NUMA node; `cards`: the node of each GPU, where it is known. Without GPUs
    neighbours share a node, as evenly as may be. A process alone may use all CPUs.
    """
    usable = [(number, node & allowed) for number, node in enumerate(nodes) if node & allowed]
    if len(usable) < 2 or (procs == 1 and not cards):
        return [None] * procs
    by_number = dict(usable)
    found: list[Cpus | None] = []
    for rank in range(procs):
        near = cards[rank] if rank < len(cards) else None
        even = usable[rank * len(usable) // procs][1]
        found.append(by_number.get(near, even) if near is not None else even)
    return found


def described(chosen: Sequence[Cpus | None], allowed: Cpus) -> str:
    """One line for a person."""
    many = f"{len(chosen)} process{'es' * (len(chosen) > 1)}"
    if all(cpus is None for cpus in chosen):
        return f"placement: {many} on this machine, CPUs {ranges(allowed)}, bound to none of them"
    each = "; ".join(f"{rank}: {ranges(cpus or allowed)}" for rank, cpus in enumerate(chosen))
    return f"placement: {many} on this machine, each on the CPUs of a NUMA node: {each}"


def devices(plan: Plan, topology: Topology, visible: str | None) -> str:
    """The rest of that line: threads, and which GPUs. `visible`: CUDA_VISIBLE_DEVICES."""
    threads = f"{plan.threads} thread{'s' * (plan.threads != 1)} each"
    if plan.device != "cuda":
        return f"{threads}, no GPU"
    named = f" of CUDA_VISIBLE_DEVICES={visible}" if visible else ""
    if topology.own_gpu:
        return f"{threads}, each with the one GPU it sees"
    return f"{threads}, GPUs {ranges(frozenset(range(topology.local_world_size)))}{named}"


def numa_nodes(root: Path = _NODES) -> list[Cpus]:
    """The CPUs of each NUMA node, by its number; empty where the system does not say."""
    found = {int(p.name.removeprefix("node")): p / "cpulist" for p in root.glob("node[0-9]*")}
    try:
        return [parse_ranges(found[number].read_text()) for number in sorted(found)]
    except (OSError, ValueError):
        return []


def gpu_nodes(visible: str | None, cards: Path = _CARDS, pci: Path = _PCI) -> list[int | None]:
    """The NUMA node of each GPU that a process sees, by its index there; None where it is not known.

    NVIDIA's driver lists its cards by their places on the bus, in which order CUDA counts cards of one kind.
    """
    every = [_node_of(pci / card.name.lower() / "numa_node") for card in sorted(cards.glob("*:*"))]
    if visible is None:
        return every
    indexes = [word.strip() for word in visible.split(",") if word.strip()]
    if not all(re.fullmatch(r"\d+", word) and int(word) < len(every) for word in indexes):
        return []
    return [every[int(word)] for word in indexes]


def _node_of(file: Path) -> int | None:
    try:
        number = int(file.read_text())
    except (OSError, ValueError):
        return None
    return number if number >= 0 else None  # -1: the machine does not say


def parse_ranges(text: str) -> Cpus:
    """``0-2,8`` -> {0, 1, 2, 8}. Raises ValueError."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def ranges(cpus: Cpus) -> str:
    """{0, 1, 2, 8} -> ``0-2,8``."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in parts)
