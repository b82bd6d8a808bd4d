"""torch.compile, in place: names of parameters, hooks and wrappers stay as they are.

Only the code of `forward` is compiled; hooks of the same module run outside, as Python. Dropout in compiled
code draws other masks than in plain code, from the same keyed stream: the same at any world size.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import nn

from distdl.errors import EngineError

_COMPILERS = ("g++", "clang++", "c++")


def compile_forward(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Compile the forward of each of `modules`, none inside another, at its first call. No communication.

    Statistics of BatchNorm inside must be taken around the whole: `RunningStatistics(compiled=True)`.
    Raises EngineError where there is nothing to compile with.
    """
    check_compiler(device)
    for module in modules:
        # On the instance, as recomputation does; `nn.Module.compile` would compile the hooks as well.
        module.forward = torch.compile(module.forward)


def check_compiler(device: torch.device) -> None:
    """Local: nodes may differ. Raises EngineError where there is nothing to compile with."""
    if device.type == "cuda" and find_spec("triton") is None:
        raise EngineError(
            "hardware.compile needs Triton on CUDA, and it is not installed: pip install triton (a build of "
            "torch for CUDA brings it), or set hardware.compile=false"
        )
    wanted = (os.environ["CXX"],) if os.environ.get("CXX") else _COMPILERS
    if not any(shutil.which(name) for name in wanted):
        raise EngineError(
            f"hardware.compile needs a C++ compiler, and none was found ({', '.join(wanted)}): install one "
            "(g++), name it in the environment variable CXX, or set hardware.compile=false"
        )
