"""BatchNorm whose running statistics do not depend on who computed which microbatch.

Each microbatch is normalised by itself, as always. The running statistics are updated once a step, with the
count-weighted mean of the microbatches' statistics added in tree order, so that they are the same, to the
bit, at any world size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distdl.comm import World
from distdl.comm.tree import tree_sum
from distdl.engines.base import Pass
from distdl.errors import EngineError


class RunningStatistics:
    """Takes over the running statistics of every BatchNorm in a model.

    A module's momentum is set to 1, so that a forward leaves the microbatch's own statistics in its buffers;
    a hook takes them from there and puts the true ones back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self._momentum = [m.momentum for m in self._modules]
        self._true: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}
        self._current: dict[nn.Module, Tensor] = {}
        self._captured: list[Tensor] = []
        for module in self._modules:
            module.momentum = 1.0
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._after)

    def pass_done(self, this: Pass) -> None:
        """Close one pass, of one microbatch; what it left counts as the microbatch does."""
        count, weight = this.groups[0].count, this.weight
        self._restore()
        if weight and self._modules:
            found = torch.cat([self._current.get(m, _statistics(m)).double() for m in self._modules])
            # Stays on the device: a copy to the CPU would make a GPU wait, once a microbatch.
            self._captured.append(torch.cat([found.new_tensor([count]), found]))
        self._current = {}

    def discard(self) -> None:
        """Forget this step's microbatches: the step was skipped."""
        self._captured = []

    def start_update(self, world: World, counts: list[int]) -> Callable[[], None]:
        """Collective. Move the running statistics by one step; `counts` is real microbatches by rank.

        The exchange goes on in the background until what is returned is called.
        """
        if not self._modules:
            return lambda: None
        width = 1 + sum(2 * m.num_features for m in self._modules)
        empty = torch.empty((0, width), dtype=torch.float64)
        mine = torch.stack(self._captured).cpu() if self._captured else empty
        self._captured = []
        gathered = world.start_gather_rows(mine, counts)

        def finish() -> None:
            rows = gathered()
            total = tree_sum([row[:1] for row in rows])
            self._move(tree_sum([row[0] * row[1:] for row in rows]) / total)

        return finish

    def update(self, world: World, counts: list[int]) -> None:
        """Collective. `start_update`, and wait for it."""
        self.start_update(world, counts)()

    def _move(self, mean: Tensor) -> None:
        parts = iter(mean.split([n for m in self._modules for n in (m.num_features,) * 2]))
        for module, momentum in zip(self._modules, self._momentum, strict=True):
            new_mean, new_var = next(parts), next(parts)
            if not module.training:
                continue
            running_mean, running_var, steps = _buffers(module)
            steps += 1
            rate = momentum if momentum is not None else 1.0 / float(steps)
            for buffer, new in ((running_mean, new_mean), (running_var, new_var)):
                buffer.lerp_(new.to(buffer.device, buffer.dtype), rate)

    def _restore(self) -> None:
        # A recomputation that has all it needs is broken off inside the last module, before its hook.
        for module, buffers in self._true.items():
            _put(module, buffers)
        self._true = {}

    def _before(self, module: Any, _inputs: Any) -> None:
        if module.training:
            self._true.setdefault(module, _buffers(module))
            # Fresh buffers, not copies: backward keeps those that forward saw and refuses if they change.
            module.running_mean = torch.zeros_like(module.running_mean)
            module.running_var = torch.zeros_like(module.running_var)
            module.num_batches_tracked = torch.zeros_like(module.num_batches_tracked)

    def _after(self, module: Any, _inputs: Any, _output: Any) -> None:
        if module.training:
            # The first pass counts; a recomputation during backward runs the module again.
            self._current.setdefault(module, _statistics(module))
            _put(module, self._true.pop(module))


def _buffers(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    return module.running_mean, module.running_var, module.num_batches_tracked


def _put(module: Any, buffers: tuple[Tensor, Tensor, Tensor]) -> None:
    module.running_mean, module.running_var, module.num_batches_tracked = buffers


def _statistics(module: nn.Module) -> Tensor:
    mean, var, _ = _buffers(module)
    return torch.cat([mean, var]).detach()


def refuse_sync_batchnorm(model: nn.Module) -> None:
    found = [name for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    if found:
        raise EngineError(
            f"the model has SyncBatchNorm ({', '.join(found[:4])}), which mixes the ranks' microbatches and "
            "would tie the result to their number: use BatchNorm; distdl combines its statistics itself"
        )
