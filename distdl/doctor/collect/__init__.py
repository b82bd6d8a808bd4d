"""Reading the machine: the effects behind `Facts`. Nothing here raises because something is wrong with it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from distdl.doctor.collect.gpus import gpus_here
from distdl.doctor.collect.machine import machine_here
from distdl.doctor.collect.network import network_here
from distdl.doctor.collect.recipe import Asked
from distdl.doctor.collect.software import software_here
from distdl.doctor.collect.storage import storage_here
from distdl.doctor.facts import Facts, Place
from distdl.errors import EnvironmentProblem
from distdl.stores import scrub
from distdl.topology import Topology

PREFIXES = (
    "NCCL_",
    "GLOO_",
    "TP_SOCKET",
    "CUDA_",
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "TORCH_",
    "DISTDL_",
    "ACCELERATE_",
)
NAMES = (
    "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LD_LIBRARY_PATH", "PYTHONPATH",
    "TMPDIR",     "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY",
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
)  # fmt: skip


def place_in(env: Mapping[str, str]) -> tuple[Topology, Place]:
    """Where this process stands; a single one, with the error noted, where the variables make no sense."""
    problem = None
    try:
        topology = Topology.from_env(env)
    except EnvironmentProblem as error:
        topology, problem = Topology(), str(error)
    return topology, Place(
        rank=topology.rank,
        world_size=topology.world_size,
        local_rank=topology.local_rank,
        local_world_size=topology.local_world_size,
        launcher=topology.launcher,
        host=socket.gethostname(),
        node=_node(),
        own_gpu=topology.own_gpu,
        user=os.geteuid(),
        error=problem,
    )


def _node() -> str:
    """The same for processes that share a kernel and a network; containers of one machine are nodes too."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return socket.gethostname()


def collect(
    env: Mapping[str, str], topology: Topology, place: Place, asked: Asked | None, *, wait_s: float, fix: bool
) -> Facts:
    """All that this process can say of its machine. Blocks for seconds: imports torch in another process,
    and waits up to `wait_s` seconds for rank 0 to listen.
    """
    return Facts(
        place=place,
        software=software_here(env, asked, fix=fix),
        network=network_here(topology, wait_s),
        gpus=gpus_here(),
        machine=machine_here(env),
        storage=storage_here(asked),
        wanted=asked.wanted(topology) if asked else None,
        env={name: scrub(value) for name, value in env.items() if name in NAMES or name.startswith(PREFIXES)},
    )
