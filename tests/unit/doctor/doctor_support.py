"""Facts of healthy machines, and a doctor's visit to ranks of `run_world`."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from distdl.comm import World
from distdl.doctor import run
from distdl.doctor.checks import findings
from distdl.doctor.collect import collect, place_in
from distdl.doctor.collect.recipe import Asked
from distdl.doctor.facts import Facts, Network, Place, Wanted
from distdl.doctor.finding import Finding
from distdl.doctor.run import examine_together
from distdl.recipe import load_recipe
from distdl.topology import Topology

WANTED = Wanted(recipe="recipe.yaml", hash="0", engine="ddp")


def healthy(nodes: int = 1, per_node: int = 2) -> list[Facts]:
    """What the processes of a healthy job tell."""
    return [
        Facts(
            place=Place(
                rank=node * per_node + local, world_size=nodes * per_node, local_rank=local,
                local_world_size=per_node, launcher="torchrun", host=f"node{node}", node=f"node{node}",
            ),
            network=Network(
                host_addresses=(f"10.0.0.{node + 1}",), master_addr="node0", master_port=29500,
                master_addresses=("10.0.0.1",), master_local=node == 0,
            ),
        )
        for node in range(nodes)
        for local in range(per_node)
    ]  # fmt: skip


def changed(facts: Facts, **parts: Any) -> Facts:
    """`changed(f, network={"clock_skew": 9})`: fields of a part, or a whole part."""
    for name, value in parts.items():
        whole = value
        if isinstance(value, dict) and name != "env":
            whole = getattr(facts, name).model_copy(update=value)
        facts = facts.model_copy(update={name: whole})
    return facts


def problems(facts: list[Facts]) -> list[Finding]:
    """What is found wrong."""
    return [f for f in findings(facts) if f.status in ("warn", "fail")]


def visit(
    world: World, recipe: str | None, folders: list[str], cores: list[int] | None, open_files: int | None
) -> list[dict[str, str]]:
    """One rank: go to its folder, be limited, and be examined. What is found wrong, from rank 0."""
    os.chdir(folders[world.rank])
    if cores is not None:
        os.sched_setaffinity(0, cores)
    if open_files is not None:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (open_files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
    asked = Asked(Path(recipe).name, load_recipe(Path(recipe))) if recipe else None
    run.SEEN_S = 1.0  # a file system of this machine shows a file at once, or never
    told = {"rank": world.rank, "world_size": world.size, "local_rank": world.rank}
    told |= {"local_world_size": world.size, "launcher": "torchrun"}
    topology, place = Topology(**told), place_in({})[1].model_copy(update=told)
    env = {n: v for n, v in os.environ.items() if n not in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")}
    mine = collect(env, topology, place, asked, wait_s=5, fix=False)
    store = PrefixStore("doctor", dist.distributed_c10d._get_default_store())
    report = examine_together(mine, asked, store, topology, wait_s=20)
    return [f.as_dict() for f in report.findings or ()]
