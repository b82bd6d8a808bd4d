"""Lion and LAMB, which torch does not have. State is kept for each parameter, under names that torch uses.

Both take lists of tensors a step at a time (torch's foreach), never a fused kernel: bits do not depend on how
parameters are shared out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from distdl.engines.shards import local


class Lion(Optimizer):
    """The sign of a blend of momentum and gradient, with decoupled decay (Chen et al., 2023,
    arXiv:2302.06675, Algorithm 2). Every element is updated by itself, so shards of parameters may be too.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have gradients. `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            params, grads, states = _trained(self, group, "exp_avg")
            if not params:
                continue
            averages = [local(s["exp_avg"]) for s in states]
            blend, kept = group["betas"]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            updates = torch._foreach_lerp(averages, grads, 1 - blend)
            torch._foreach_sign_(updates)
            torch._foreach_add_(params, updates, alpha=-group["lr"])
            torch._foreach_lerp_(averages, grads, 1 - kept)


class Lamb(Optimizer):
    """AdamW's direction, scaled for each parameter to the norm of its weights (You et al., 2020,
    arXiv:1904.00962v5, Algorithm 2, with the identity for its function phi).

    Looks at whole parameters. A group with ``adapt`` False keeps AdamW's scale, as the authors do for norms
    and biases; so does a parameter whose norm is 0, or that of its update.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have gradients. `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            params, grads, states = _trained(self, group, "exp_avg", "exp_avg_sq")
            if not params:
                continue
            for state in states:
                state["step"] = state.get("step", torch.zeros(())) + 1  # on the CPU: reading it costs nothing
            updates = _adam_direction(group, grads, states)
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            if group["adapt"]:
                torch._foreach_mul_(updates, _trust_ratios(params, updates))
            torch._foreach_add_(params, updates, alpha=-group["lr"])


def _trained(
    optimizer: Optimizer, group: dict[str, Any], *slots: str
) -> tuple[list[Tensor], list[Tensor], list[dict[str, Any]]]:
    """(parameters, gradients, states) of what has a gradient, this rank's shards; `slots` begin as zeros."""
    held = [p for p in group["params"] if p.grad is not None]
    for p in held:
        for slot in slots:
            if slot not in optimizer.state[p]:
                optimizer.state[p][slot] = torch.zeros_like(p)
    return [local(p) for p in held], [local(p.grad) for p in held], [optimizer.state[p] for p in held]


def _adam_direction(group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Any]]) -> list[Tensor]:
    """Bias-corrected mean over root mean square, after taking in `grads`."""
    means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    first, second = group["betas"]
    torch._foreach_lerp_(means, grads, 1 - first)
    torch._foreach_mul_(squares, second)
    torch._foreach_addcmul_(squares, grads, grads, 1 - second)
    steps = [float(s["step"]) for s in states]
    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, [(1 - second**n) ** 0.5 for n in steps])
    torch._foreach_add_(roots, group["eps"])
    updates = torch._foreach_div(means, roots)
    torch._foreach_div_(updates, [1 - first**n for n in steps])
    return list(updates)


def _trust_ratios(params: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
    weights, steps = torch._foreach_norm(params), torch._foreach_norm(updates)
    return [
        torch.where((w > 0) & (u > 0), w / u, torch.ones_like(w)) for w, u in zip(weights, steps, strict=True)
    ]
