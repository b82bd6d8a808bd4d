"""What else decides the bits of a result: libraries, processor, threads; kept with every checkpoint.

`train.reduction: exact` gives the same bits at any world size where these are the same.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from distdl.comm import World
from distdl.plan import Plan


def settle(plan: Plan, reduction: str) -> None:
    """Set threads and deterministic kernels for the whole process. Call before CUDA starts.

    In exact mode an operation that has no deterministic kernel raises RuntimeError, which names it.
    """
    torch.set_num_threads(plan.threads)
    if reduction != "exact":
        return
    if plan.device == "cuda":
        # cuBLAS reads it when it starts; without, its matrix products may differ from run to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # Filling every new buffer with NaN finds programs that read what they did not write; it changes no bits.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def fingerprint(world: World, plan: Plan) -> dict[str, str]:
    """Collective. What the bits depend on beside the recipe; where ranks differ, each of their values."""
    cuda = plan.device == "cuda"
    mine = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()).lower(),
    }
    if cuda:
        mine |= {
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
            "tf32": f"{torch.backends.cuda.matmul.allow_tf32} {torch.backends.cudnn.allow_tf32}".lower(),
        }
    everyone = world.gather(mine)
    return {name: " | ".join(sorted({rank.get(name, "") for rank in everyone})) for name in mine}


def what_differs(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Each item of a fingerprint that has changed. What an older checkpoint does not say has not."""
    return [f"{name}: {then[name]} -> {now[name]}" for name in now if then.get(name, now[name]) != now[name]]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
