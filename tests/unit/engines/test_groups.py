"""Dropout by group: the masks that each microbatch would draw alone. And what cannot be joined."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from distdl.comm import World
from distdl.engines.base import Group, Pass
from distdl.engines.batchnorm import RunningStatistics
from distdl.engines.groups import Rehearsal, groups_of, has_batchnorm, unfusable
from distdl.errors import EngineError
from distdl.keys import seed_everything
from distdl.models.cnn5 import Cnn5

ROWS = (4, 1, 3)


def a_pass(*extents: int | None) -> Pass:
    wanted = extents or (None,) * len(ROWS)
    groups = [Group(i, n, n, 1000 + i, e) for i, (n, e) in enumerate(zip(ROWS, wanted, strict=True))]
    return Pass(tuple(groups), 1, last=True)


def alone(model: nn.Module, this: Pass, parts: list[Tensor]) -> list[Tensor]:
    found = []
    for group, x in zip(this.groups, parts, strict=True):
        seed_everything(group.key)
        found.append(model(x))
    return found


def together(model: nn.Module, this: Pass, x: Tensor) -> list[Tensor]:
    seed_everything(this.groups[0].key)
    with groups_of(model, this):
        return list(model(x).split(ROWS))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.Dropout, (6,)),
        (nn.Dropout, (3, 4, 4)),
        (nn.Dropout1d, (3, 4)),
        (nn.Dropout2d, (3, 4, 4)),
        (nn.Dropout3d, (3, 2, 4, 4)),
        (nn.AlphaDropout, (6,)),
        (nn.FeatureAlphaDropout, (3, 4, 4)),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_each_group_draws_the_masks_that_it_draws_alone(
    kind: Any, shape: tuple[int, ...], inplace: bool
) -> None:
    """Twice in a row, so that the streams go on; to the bit, in every memory layout."""
    model = nn.Sequential(nn.Identity(), kind(0.4, inplace=inplace), nn.Tanh(), kind(0.3, inplace=inplace))
    torch.manual_seed(0)
    layouts = [torch.contiguous_format] + ([torch.channels_last] if len(shape) == 3 else [])
    for layout in layouts:
        parts = [torch.randn(n, *shape).to(memory_format=layout) for n in ROWS]
        whole = torch.cat(parts)
        expected = alone(model, a_pass(), [x.clone(memory_format=torch.preserve_format) for x in parts])
        for a, b in zip(expected, together(model, a_pass(), whole), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(expected[0][:1], expected[1])


@pytest.mark.parametrize("time_first", [False, True], ids=["batch first in memory", "time first in memory"])
def test_sequences_draw_for_their_own_length(time_first: bool) -> None:
    """An LSTM's output with batch_first=True lies time first in memory on a CPU."""
    model, this = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.2)), a_pass(5, 7, 2)
    parts = [torch.rand(n, g.extent or 0, 6) + 1 for n, g in zip(ROWS, this.groups, strict=True)]
    whole = torch.cat([functional.pad(x, (0, 0, 0, 7 - x.shape[1])) for x in parts])
    if time_first:
        parts = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in parts]
        whole = whole.transpose(0, 1).contiguous().transpose(0, 1)
    for group, a, b in zip(this.groups, alone(model, this, parts), together(model, this, whole), strict=True):
        assert torch.equal(a, b[:, : group.extent])
        assert b.shape[1] == 7


def test_activations_without_a_time_dimension_are_drawn_whole() -> None:
    """Of two dimensions, the second is features, even where there are as many as time steps."""
    model, this = nn.Dropout(0.5), a_pass(5, 7, 2)
    parts = [torch.rand(n, 7) + 1 for n in ROWS]
    for a, b in zip(alone(model, this, parts), together(model, this, torch.cat(parts)), strict=True):
        assert torch.equal(a, b)


def test_gradients_follow_the_masks_and_the_generator_stands_where_it_stood() -> None:
    model = nn.Dropout(0.5)
    x = torch.ones(8, 5, requires_grad=True)
    seed_everything(7)
    before = torch.get_rng_state()
    with groups_of(model, a_pass()):
        y = model(x)
        y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    assert "forward" not in model.__dict__


def test_evaluation_and_a_single_group_are_left_alone() -> None:
    model = nn.Dropout(0.5)
    x = torch.ones(8, 5)
    with groups_of(model, Pass(a_pass().groups[:1], 1, last=True)):
        assert "forward" not in model.__dict__
    with groups_of(model.eval(), a_pass()):
        assert torch.equal(model(x), x)


def test_rows_that_are_no_multiple_are_refused_and_flattened_ones_are_not() -> None:
    model = nn.Dropout(0.5)
    with pytest.raises(EngineError, match=r"given \(9, 2\) for 3 microbatches of together 8 rows"):
        together(model, a_pass(), torch.ones(9, 2))
    parts = [torch.ones(2 * n, 3) for n in ROWS]
    seed_everything(0)
    with groups_of(model, a_pass()):
        found = model(torch.cat(parts))
    assert torch.equal(found, torch.cat(alone(model, a_pass(), parts)))


def test_dropout_in_a_recomputed_part_is_refused_in_backward() -> None:
    model = nn.Dropout(0.5)
    x = torch.ones(8, 5, requires_grad=True)
    with groups_of(model, a_pass()), pytest.raises(EngineError, match=r"set hardware\.fuse=1"):
        checkpoint(lambda t: model(t).sin(), x, use_reentrant=False).sum().backward()


def test_a_network_in_double_precision_has_the_gradients_of_separate_passes() -> None:
    """BatchNorm and dropout in a CNN: what is left of a difference is the order of sums."""
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = Cnn5(1, 3, width=2, dropout=0.3, hidden=8).double().train()
        statistics, this = RunningStatistics(model), a_pass()
        parts = [torch.randn(n, 1, 12, 12, dtype=torch.float64) for n in ROWS]
        passes = [this] if fused else [Pass((g,), 1, last=False) for g in this.groups]
        for one, x in zip(passes, [torch.cat(parts)] if fused else parts, strict=True):
            seed_everything(one.groups[0].key)
            with groups_of(model, one):
                model(x).square().sum().backward()
            statistics.pass_done(one)
        statistics.update(World(), [len(ROWS)])
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([t.flatten().double() for t in (*grads, *model.buffers())]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-13


def test_modules_that_are_known_are_named() -> None:
    assert "stack single layers" in (unfusable(nn.Sequential(nn.LSTM(2, 2, 2, dropout=0.1))) or "")
    assert unfusable(nn.Sequential(nn.LSTM(2, 2, 2), nn.GRU(2, 2), nn.Dropout(0.5))) is None
    assert "attention" in (unfusable(nn.TransformerEncoderLayer(4, 2)) or "")
    assert has_batchnorm(nn.Sequential(nn.BatchNorm1d(2)))
    assert not has_batchnorm(nn.Sequential(nn.GroupNorm(1, 2)))


class Odd(nn.Module):
    """Draws, changes a buffer or fails, as told."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(1))
        self.does = "nothing"

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(x))
        if self.does == "torch":
            x = functional.dropout(x, 0.5)
        elif self.does == "python":
            x = x * random.random()
        elif self.does == "numpy":
            x = x * float(np.random.rand())
        elif self.does == "buffer":
            self.seen += 1
        elif self.does == "fail":
            self.norm.running_mean = torch.zeros(7)
            raise RuntimeError("as told")
        return x


@pytest.mark.parametrize(
    ("does", "reason"),
    [("nothing", None), ("torch", "random numbers outside"), ("python", "random numbers outside"),
     ("numpy", "random numbers outside"), ("buffer", "changes buffers in its forward: seen")],
)  # fmt: skip
def test_a_rehearsal_finds_what_groups_cannot_have_and_leaves_no_trace(does: str, reason: str | None) -> None:
    model = Odd()
    model.does = does
    before = {name: t.clone() for name, t in model.state_dict().items()}
    seed_everything(3)
    drawn = [random.random(), np.random.rand(), float(torch.rand(()))]
    seed_everything(3)
    RunningStatistics(model)
    rehearsal = Rehearsal(model, torch.device("cpu"))
    with rehearsal(), groups_of(model, a_pass()):
        value, found = rehearsal.watch(lambda: model(torch.ones(8, 3, 2)))
    assert value.shape == (8, 3, 2)
    assert not value.requires_grad
    assert (found or "").find(reason or "") >= 0
    assert (found is None) == (reason is None)
    assert [random.random(), np.random.rand(), float(torch.rand(()))] == drawn
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_rehearsal_that_fails_puts_everything_back() -> None:
    model = Odd()
    model.does = "fail"
    kept = model.norm.running_mean
    with pytest.raises(RuntimeError, match="as told"), Rehearsal(model, torch.device("cpu"))():
        model(torch.randn(8, 3))
    assert model.norm.running_mean is kept
