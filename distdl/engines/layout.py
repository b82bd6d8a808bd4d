"""Memory layout: `channels_last` for models of images, where convolutions are faster so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn


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
        """Settle the layout of batches, and leave the model where and as it is."""
        self.channels_last = bool(self._wanted) if self._wanted != "auto" else _has_2d_convolutions(model)

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


def _has_2d_convolutions(model: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.modules())
