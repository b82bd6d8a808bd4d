"""Buffers that a model changes by itself while it trains, which would tie a run to the number of ranks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distdl.errors import EngineError


class UnkeyedBuffers:
    """Watches the buffers of a model over its first microbatch.

    BatchNorm's are looked after (engines/batchnorm.py). Any other that a forward changes (a moving average,
    a power iteration, a codebook) would see only this rank's microbatches, and the ranks would drift apart.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: dict[str, tuple[int, int]] = {}
        self._done = False

    def note(self) -> None:
        """Before a microbatch."""
        if not self._done:
            self._before = self._versions()

    def check(self, ranks: int) -> None:
        """After a microbatch. Raises EngineError, naming the buffers, the first time, with several ranks."""
        if self._done or ranks == 1:
            return
        self._done = True
        after = self._versions()
        changed = [name for name, seen in after.items() if self._before.get(name) != seen]
        if changed:
            raise EngineError(
                f"the model changes buffers in its forward: {', '.join(changed[:8])}. Each of {ranks} ranks "
                "would see only its own microbatches, and the result would depend on their number. Train "
                "with one process, or keep such state out of the model"
            )

    def _versions(self) -> dict[str, tuple[int, int]]:
        return {
            f"{prefix}.{name}".lstrip("."): (id(buffer), _version(buffer))
            for prefix, module in self._model.named_modules()
            if not isinstance(module, _BatchNorm)
            for name, buffer in module.named_buffers(recurse=False)
        }


def _version(tensor: Tensor) -> int:
    return tensor._version
