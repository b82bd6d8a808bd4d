"""Gradients in flat buffers, a bucket of parameters at a time, folded along the tree as they come.

A slab is a flat buffer of which the parameters' `grad` are views, each with its parameter's own strides. It
begins as +0.0, and a backward adds to it. So a leaf of the tree is ``0.0 + g``, which is g but for -0.0,
which becomes +0.0: at every world size alike, whether or not the microbatch used the parameter. A sum is -0.0
only where both terms are (IEEE 754, round to nearest, subnormal numbers kept), so no node ever holds one. And
then ``x + g`` and ``x + (0.0 + g)`` have the same bits: the right one of two leaves may be added straight to
the left one's slab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from distdl.comm.exchange import even_cuts
from distdl.comm.tree import Node, parent

_FIRST_BYTES = 2**20
_BYTES = 25 * 2**20
_ALIGN = 16
"""Elements: 64 bytes of fp32, so that every view begins where vector instructions like it."""


class Slab:
    """One flat buffer and its views, one a parameter of the bucket."""

    def __init__(self, flat: Tensor, views: list[Tensor]) -> None:
        self.flat = flat
        self.views = views


class Bucket:
    """Parameters of one dtype whose gradients travel together, and this rank's subtrees of a step.

    Behind each parameter stands one more element, which is above 0 in the sum over all ranks where any
    microbatch gave the parameter a gradient. `owners`: by parameter, the rank that is to have the sum, in
    ascending order; `cuts`: the bounds of each rank's segment.
    """

    def __init__(self, parameters: Sequence[Parameter], owners: Sequence[int] | None, size: int) -> None:
        self.parameters = list(parameters)
        self.arrived: set[int] = set()
        self._seen: set[int] = set()
        self.stack: list[tuple[Node, Slab]] = []
        self._free: list[Slab] = []
        self._strides = [torch.empty_like(p, device="meta").stride() for p in parameters]
        self._offsets, end = [], 0
        starts: list[int] = []
        for i, parameter in enumerate(parameters):
            while owners is not None and len(starts) <= owners[i]:
                starts.append(end)
            self._offsets.append(end)
            end += -(-(parameter.numel() + 1) // _ALIGN) * _ALIGN
        self._length = end
        self.cuts = even_cuts(end, size)
        if owners is not None:
            self.cuts = tuple(starts + [end] * (size + 1 - len(starts)))
        flags = [o + p.numel() for o, p in zip(self._offsets, parameters, strict=True)]
        self._flags = torch.tensor(flags, device=parameters[0].device)

    def begin_leaf(self, number: int, count: int) -> None:
        """Before the backward of microbatch `number` of `count`: point the gradients at a slab."""
        leaf, left, pair = (number, number + 1), (number - 1, number), (number - 1, number + 1)
        self._seen = set()
        if self.stack and self.stack[-1][0] == left and parent(leaf, count) == pair:
            self.stack[-1] = (pair, self.stack[-1][1])
        else:
            slab = self.take()
            slab.flat.zero_()
            self.stack.append((leaf, slab))
        self.show(self.stack[-1][1])

    def note(self, index: int) -> bool:
        """The gradient of a parameter has been added; True where it was the last one of this backward.

        Raises RuntimeError for a second one: its two parts were rounded apart, against the tree.
        """
        if index in self._seen:
            raise RuntimeError(
                "a parameter got its gradient in several parts of one backward, as reentrant checkpointing "
                "of a layer that is used twice does; train.reduction=exact needs use_reentrant=False"
            )
        self._seen.add(index)
        self.arrived.add(index)
        return len(self._seen) == len(self.parameters)

    def fold(self, count: int) -> None:
        """After a backward: add up what are the two children of a node."""
        while len(self.stack) > 1:
            (left, into), (right, slab) = self.stack[-2:]
            above = parent(left, count)
            if above is None or above != parent(right, count):
                return
            into.flat.add_(slab.flat)
            self._free.append(slab)
            self.stack[-2:] = [(above, into)]

    def close(self) -> Slab:
        """When the step's last gradients are folded: note which parameters had any. Returns the slab that
        the sum over all ranks goes to, whose content is undefined where this rank ran no microbatch.
        """
        if not self.stack:
            return self.take()
        slab = self.stack[0][1]
        if len(self.arrived) == len(self.parameters):
            slab.flat.index_fill_(0, self._flags, 1.0)  # without a copy from the CPU, which a GPU waits for
        else:
            had = [float(i in self.arrived) for i in range(len(self.parameters))]
            slab.flat[self._flags] = torch.tensor(had, dtype=slab.flat.dtype, device=slab.flat.device)
        return slab

    def used(self, slab: Slab) -> list[bool]:
        """By parameter, whether any rank had a gradient for it; from the sum. CUDA: waits for it."""
        return [flag > 0 for flag in slab.flat[self._flags].tolist()]

    def show(self, slab: Slab | None) -> None:
        """Make the slab's views the parameters' gradients; None takes them away."""
        for i, parameter in enumerate(self.parameters):
            parameter.grad = slab.views[i] if slab is not None else None

    def take(self) -> Slab:
        """A slab that nobody uses, of undefined content."""
        if self._free:
            return self._free.pop()
        flat = self.parameters[0].detach().new_empty(self._length)
        flat.zero_()  # what stands between the views is sent as well
        layout = zip(self.parameters, self._strides, self._offsets, strict=True)
        return Slab(flat, [flat.as_strided(p.shape, strides, at) for p, strides, at in layout])

    def reset(self, result: Slab | None) -> None:
        """Forget the step: every slab is free again, `result`, which `close` returned, as well."""
        held = [slab for _, slab in self.stack]
        if result is not None and result not in held:
            held.append(result)
        self._free += held
        self.stack, self.arrived = [], set()
        self.show(None)


def make_buckets(
    parameters: Sequence[Parameter], size: int, owner: dict[Parameter, int] | None = None
) -> list[Bucket]:
    """Buckets in the order in which gradients come: the last parameters first, a small bucket to begin with.

    They depend on the parameters alone, never on the ranks, but for the order inside: by `owner`, if given.
    """
    groups: list[list[Parameter]] = []
    open_bytes: dict[torch.dtype, tuple[list[Parameter], int]] = {}
    for parameter in reversed(list(parameters)):
        group, held = open_bytes.get(parameter.dtype, ([], 0))
        size_bytes = parameter.numel() * parameter.element_size()
        limit = _FIRST_BYTES if group and group is groups[0] else _BYTES
        if not group or held + size_bytes > limit:
            group, held = [], 0
            groups.append(group)
        group.append(parameter)
        open_bytes[parameter.dtype] = (group, held + size_bytes)
    if owner is None:
        return [Bucket(group, None, size) for group in groups]
    for group in groups:
        group.sort(key=lambda p: owner[p])
    return [Bucket(group, [owner[p] for p in group], size) for group in groups]
