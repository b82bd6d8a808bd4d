"""Memory layout: `channels_last` for models of images, where convolutions are faster so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from distdl.errors import RecipeError


class Layout:
    """Takes models and batches to a device, in the memory layout that `hardware.channels_last` says."""

    def __init__(self, device: torch.device, channels_last: Literal["auto"] | bool) -> None:
        self._device = device
        self._wanted = channels_last
        self.channels_last = False

    def take(self, model: nn.Module) -> None:
        """Move the model, in place. "auto" is on where it has 4-D convolutions."""
        model.to(self._device)
        self.decide(model)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def decide(self, model: nn.Module) -> None:
        """Settle the layout of batches, and leave the model where and as it is. Raises RecipeError for
        `channels_last: true` where torch would write beyond its memory.
        """
        narrow = overrun(model) if self._device.type == "cpu" else None
        if self._wanted is True and narrow:
            raise RecipeError(
                f"hardware.channels_last = true: on a CPU, backward of convolution {narrow} (1x1, with a "
                f"stride, of fewer than {_LANES} channels) would write beyond its memory: leave it at auto"
            )
        auto = _has_2d_convolutions(model) and not narrow
        self.channels_last = auto if self._wanted == "auto" else bool(self._wanted)

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch on the device; does not wait for the copy where its memory is pinned."""
        images = torch.channels_last if self.channels_last else torch.contiguous_format
        return {
            name: t.to(
                self._device,
                non_blocking=True,
                memory_format=images if t.ndim == 4 else torch.preserve_format,
            )
            for name, t in batch.items()
        }


_LANES = 16
"""Numbers in the widest vector register of a CPU."""


def overrun(model: nn.Module) -> str | None:
    """The name of a convolution whose weights' gradient oneDNN computes wrongly in channels_last, and beyond
    the memory it has: 1x1, strided, with fewer channels than a vector register (oneDNN's issue 6035, in torch
    2.13). It ends the process in the allocator, if at all.
    """
    for name, module in model.named_modules():
        strided = isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1} and max(module.stride) > 1
        if strided and module.in_channels // module.groups < _LANES:
            return name or type(module).__name__
    return None


def _has_2d_convolutions(model: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.modules())
