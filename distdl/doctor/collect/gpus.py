"""GPUs as `nvidia-smi` tells of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from distdl.doctor.facts import Gpu, Gpus

PATIENCE_S = 30.0
Ask = Callable[[Sequence[str]], str]


def gpus_here() -> Gpus:
    """The GPUs of this node, whatever CUDA_VISIBLE_DEVICES says."""
    files = [p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]
    if shutil.which("nvidia-smi") is None:
        return Gpus(present=len(files))
    try:
        return read(_nvidia_smi)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stdout", None) or str(error)
        return Gpus(present=len(files), error=said.strip() if files else None)


def read(ask: Ask) -> Gpus:
    """`ask` runs nvidia-smi with arguments. Raises ValueError where it answers something unexpected."""
    cards = _rows(ask(["--query-gpu=index,name,uuid,memory.total,memory.used,driver_version", *_CSV]))
    busy = _rows(ask(["--query-compute-apps=gpu_uuid,pid,used_memory", *_CSV]))
    others: dict[str, dict[int, int]] = {}
    for uuid, pid, used in busy:
        others.setdefault(uuid, {})[int(pid)] = _mebibytes(used)
    return Gpus(
        present=len(cards),
        driver=cards[0][5] if cards else None,
        cards=tuple(
            Gpu(
                index=int(index), name=name, uuid=uuid, memory=_mebibytes(memory), used=_mebibytes(used),
                others={pid: n for pid, n in others.get(uuid, {}).items() if pid != os.getpid()},
            )
            for index, name, uuid, memory, used, _ in cards
        ),
    )  # fmt: skip


_CSV = ("--format=csv,noheader,nounits",)


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]


def _mebibytes(text: str) -> int:
    return int(text) << 20 if text.isdigit() else 0  # "[N/A]" on GPUs that are shared out in slices


def _nvidia_smi(arguments: Sequence[str]) -> str:
    done = subprocess.run(
        ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    return done.stdout
