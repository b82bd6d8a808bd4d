"""Arithmetic: autocast for bf16 and fp16 over fp32 weights, and the loss scale of fp16.

The loss is scaled so that small gradients do not vanish in fp16 (Micikevicius et al., 2018). The scale is
part of the state of a run: it grows after many good steps and falls where a gradient overflows, on all ranks
alike, since it follows the global gradient norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from distdl.errors import Incompatible
from distdl.pieces import Piece, Saved

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_GROWTH_STEPS = 2000
_LARGEST = 2.0**24
_SCALE, _GOOD_STEPS = "scaler/scale", "scaler/good_steps"


def dtype_of(precision: str) -> torch.dtype | None:
    """What autocast casts to; None for fp32."""
    return _DTYPES.get(precision)


def slow_here(precision: str, device: str) -> bool:
    """Whether this processor only imitates that arithmetic: many times slower than fp32, and no smaller."""
    if device != "cpu" or precision == "fp32":
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    return not getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported")()


@contextmanager
def autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """The context of a forward on a kind of device; does nothing for None."""
    if dtype is None:
        yield
        return
    with torch.autocast(device, dtype), _recurrent_layers_that_run(device, dtype):
        yield


class Precision:
    """What `train.precision` means for one rank. With fp32 and bf16 the scale is 1 and stays 1."""

    def __init__(self, precision: str, device: torch.device) -> None:
        self.dtype = dtype_of(precision)
        self.scale = 2.0**16 if precision == "fp16" else 1.0
        self._scales = precision == "fp16"
        self._device = device.type
        self._good_steps = 0

    def autocast(self) -> AbstractContextManager[None]:
        """The context of a forward; does nothing for fp32."""
        return autocast(self._device, self.dtype)

    def note(self, grad_norm: float) -> bool:
        """After each step, with the norm of the unscaled gradient: adapt the scale. True: it was lowered."""
        if not self._scales:
            return False
        if math.isfinite(grad_norm):
            self._good_steps += 1
            if self._good_steps >= _GROWTH_STEPS:
                self.scale, self._good_steps = min(self.scale * 2, _LARGEST), 0
            return False
        self._good_steps = 0
        lowered = self.scale > 1.0
        self.scale = max(self.scale / 2, 1.0)
        return lowered

    def held(self) -> dict[str, Piece]:
        """``scaler/scale`` (float64) and ``scaler/good_steps`` (int64), no dimension; nothing if not fp16."""
        if not self._scales:
            return {}
        return {
            _SCALE: Piece(torch.tensor(self.scale, dtype=torch.float64), ()),
            _GOOD_STEPS: Piece(torch.tensor(self._good_steps, dtype=torch.int64), ()),
        }

    def check(self, saved: Saved) -> None:
        """Raise Incompatible, touching nothing, unless `load` can take this state."""
        self._of(saved)

    def load(self, saved: Saved) -> None:
        """Take the scale of a state that has been checked; one without leaves this one as it is. Local."""
        self.scale, self._good_steps = self._of(saved)

    def _of(self, saved: Saved) -> tuple[float, int]:
        if not self._scales or not {_SCALE, _GOOD_STEPS} <= saved.metas.keys():
            return self.scale, self._good_steps
        shapes = [saved.metas[name].shape for name in (_SCALE, _GOOD_STEPS)]
        if shapes != [(), ()]:
            raise Incompatible(f"the checkpoint's loss scale has shapes {shapes}: expected numbers")
        scale = float(saved.whole(_SCALE))
        if not (math.isfinite(scale) and scale >= 1):
            raise Incompatible(f"the checkpoint's loss scale is {scale}: expected a number of at least 1")
        return scale, int(saved.whole(_GOOD_STEPS))


@contextmanager
def _recurrent_layers_that_run(device: str, dtype: torch.dtype) -> Iterator[None]:
    """oneDNN's recurrent layers raise in bf16 on a processor without AVX-512: there, torch's own are used."""
    if device != "cpu" or dtype is not torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield
        return
    enabled = torch._C._get_mkldnn_enabled()

    def before(module: nn.Module, _inputs: Any) -> None:
        if isinstance(module, nn.RNNBase):
            torch._C._set_mkldnn_enabled(False)

    def after(module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        if isinstance(module, nn.RNNBase):
            torch._C._set_mkldnn_enabled(enabled)

    hooks = [register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
