"""BatchNorm whose running statistics do not depend on who computed which microbatch.

Each microbatch is normalised by itself, alone or as one group of a pass (`normalise_by_group`). The running
statistics are updated once a step, with the count-weighted mean of the microbatches' statistics added in
tree order, so that they are the same, to the bit, at any world size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from distdl.comm import World
from distdl.comm.tree import tree_sum
from distdl.engines.base import Pass
from distdl.errors import EngineError


class RunningStatistics:
    """Takes over the running statistics of every BatchNorm in a model.

    A module's momentum is set to 1, so that a forward leaves the microbatch's own statistics in its buffers;
    a hook takes them from there and puts the true ones back. `compiled`: no hook inside the model, where a
    compiler would stop at it; one before the model instead, and the rest when the pass is done.
    """

    def __init__(self, model: nn.Module, *, compiled: bool = False) -> None:
        self._modules = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self._momentum = [m.momentum for m in self._modules]
        self._true: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}
        self._current: dict[nn.Module, Tensor] = {}
        self._captured: list[Tensor] = []
        self._compiled = compiled
        if compiled:
            model.register_forward_pre_hook(self._before_all)
        for module in self._modules:
            module.momentum = 1.0
            if not compiled:
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after)

    def pass_done(self, this: Pass) -> None:
        """Close one pass; what each of its microbatches left counts as that microbatch does."""
        if self._compiled:
            self._take_all()
        self._restore()
        if this.weight and self._modules:
            n = len(this.groups)
            rows = [self._current.get(m, _statistics(m)).expand(n, -1) for m in self._modules]
            found = torch.cat(rows, 1).double()
            counts = found.new_tensor([[g.count] for g in this.groups])
            # Stays on the device: a copy to the CPU would make a GPU wait, once a microbatch.
            self._captured.extend(torch.cat([counts, found], 1))
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

    def _before_all(self, _model: nn.Module, _inputs: Any) -> None:
        for module in self._modules:
            self._before(module, None)

    def _take_all(self) -> None:
        for module, (mean, var, _) in self._true.items():
            _, _, forwards = _buffers(module)
            # One that the forward did not reach keeps what it has.
            kept = torch.cat([mean, var])
            self._current[module] = torch.where(forwards > 0, _statistics(module), kept)

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
            if not _rehearsing:
                self._current.setdefault(module, _statistics(module))
            _put(module, self._true.pop(module))


def _buffers(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    return module.running_mean, module.running_var, module.num_batches_tracked


def _put(module: Any, buffers: tuple[Tensor, Tensor, Tensor]) -> None:
    module.running_mean, module.running_var, module.num_batches_tracked = buffers


def _statistics(module: nn.Module) -> Tensor:
    """[2 * features], or [groups, 2 * features] after a forward by group."""
    mean, var, _ = _buffers(module)
    return torch.cat([mean, var], -1).detach()


_rehearsing = False


@contextmanager
def rehearsing() -> Iterator[None]:
    """Forwards in this block count for no running statistics."""
    global _rehearsing
    _rehearsing = True
    try:
        yield
    finally:
        _rehearsing = False


def normalise_by_group(module: Any, x: Tensor, rows: list[int]) -> Tensor:
    """A training-mode forward of BatchNorm on `x` [sum(rows), C, ...], each run of `rows` by itself.

    The same bits as one forward for each. A module that keeps running statistics finds the groups' own in
    its buffers, [groups, C]; RunningStatistics, which must have taken it over, puts the true ones back.
    """
    if x.dim() < 2 or x.shape[1] != module.num_features:
        raise ValueError(f"expected [N, {module.num_features}, ...] for BatchNorm, got {tuple(x.shape)}")
    values = x[0, 0].numel()
    if min(rows) * values < 2:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got {min(rows)} rows of {values} each"
        )
    if module.running_mean is not None:
        features = (len(rows), module.num_features)
        module.running_mean = module.running_mean.new_zeros(features)
        module.running_var = module.running_var.new_zeros(features)
    y: Tensor = _ByGroup.apply(
        x, module.weight, module.bias, module.running_mean, module.running_var, rows, module.eps
    )
    return y


class _ByGroup(torch.autograd.Function):
    """torch's own kernels on slices of one input and one output: no copy of either is made."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        means: Tensor | None,
        variances: Tensor | None,
        rows: list[int],
        eps: float,
    ) -> Tensor:
        y = torch.empty_like(x)
        # The statistics of a half-precision input are kept in the parameters' precision, as torch does.
        kept = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        saved = torch.empty((2, len(rows), x.shape[1]), dtype=kept, device=x.device)
        for i, (part, out) in enumerate(zip(x.split(rows), y.split(rows), strict=True)):
            mean = None if means is None else means[i]
            var = None if variances is None else variances[i]
            torch.native_batch_norm(
                part, weight, bias, mean, var, True, 1.0, eps, out=(out, saved[0, i], saved[1, i])
            )
        ctx.save_for_backward(x, weight, saved)
        ctx.rows, ctx.eps = rows, eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        dx = torch.empty_like(x) if wanted[0] else None
        # Another layout than the input's would make the kernels copy both.
        grad = grad.contiguous(memory_format=_layout(x))
        sums: list[Tensor | None] = [None, None]
        for i, (part, g) in enumerate(zip(x.split(ctx.rows), grad.split(ctx.rows), strict=True)):
            mean, inverse = saved[0, i], saved[1, i]
            found = torch.ops.aten.native_batch_norm_backward(
                g, part, weight, None, None, mean, inverse, True, ctx.eps, wanted
            )
            if dx is not None:
                dx.split(ctx.rows)[i].copy_(found[0])
            for k in (0, 1):
                if wanted[k + 1]:
                    so_far = sums[k]
                    sums[k] = found[k + 1] if so_far is None else so_far.add_(found[k + 1])
        return dx, sums[0], sums[1], None, None, None, None


def _layout(x: Tensor) -> torch.memory_format:
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == ndim and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def refuse_sync_batchnorm(model: nn.Module) -> None:
    found = [name for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    if found:
        raise EngineError(
            f"the model has SyncBatchNorm ({', '.join(found[:4])}), which mixes the ranks' microbatches and "
            "would tie the result to their number: use BatchNorm; distdl combines its statistics itself"
        )
