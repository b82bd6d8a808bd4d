"""What torch is like, asked in a process of its own: an import that crashes must not take the doctor along.

As a program (`python -m distdl.doctor.collect.torch_probe`) this prints `Torch` as JSON.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping

from pydantic import ValidationError

from distdl.doctor.facts import Torch

PATIENCE_S = 180.0
"""An import from a cold network disk takes a minute or two."""


def torch_here() -> Torch:
    """Import torch in this process, and say what it is."""
    try:
        import torch
    except Exception as error:
        return Torch(version=None, error=f"{type(error).__name__}: {error}", distributed=False, gloo=False)
    from distdl.engines.precision import slow_here

    there = torch.distributed.is_available()
    with warnings.catch_warnings(record=True) as said:  # torch warns where the driver does not suit it
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    why = None if usable or torch.version.cuda is None else "; ".join(str(w.message) for w in said)
    nccl = torch.cuda.nccl.version() if usable and there and torch.distributed.is_nccl_available() else None
    return Torch(
        version=torch.__version__,
        distributed=there,
        gloo=there and torch.distributed.is_gloo_available(),
        cuda=torch.version.cuda,
        nccl=".".join(map(str, nccl)) if nccl else None,
        devices=torch.cuda.device_count() if usable else 0,
        slow=tuple(precision for precision in ("bf16", "fp16") if slow_here(precision, "cpu")),
        cuda_error=None if why is None else why or "torch.cuda.is_available() is false",
    )


def ask_torch(env: Mapping[str, str]) -> Torch:
    """`torch_here` of another process; of this one, where torch is imported already."""
    if "torch" in sys.modules:
        return torch_here()
    command = [sys.executable, "-m", "distdl.doctor.collect.torch_probe"]
    try:
        done = subprocess.run(
            command, env=dict(env), capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        return Torch.model_validate_json(done.stdout.strip().rpartition("\n")[2])
    except subprocess.TimeoutExpired:
        why = f"importing it took more than {PATIENCE_S:.0f} s: is the disk that it lies on reachable?"
    except ValidationError:
        last = done.stderr.strip().rpartition("\n")[2]
        ended = signal.Signals(-done.returncode).name if done.returncode < 0 else f"code {done.returncode}"
        why = f"importing it ends the process with {ended}{': ' * bool(last)}{last}"
    return Torch(version=None, error=why, distributed=False, gloo=False)


if __name__ == "__main__":
    print(torch_here().model_dump_json())  # noqa: T201
