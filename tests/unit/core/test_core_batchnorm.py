"""BatchNorm's running statistics: one update a step, with the same bits whoever computed what."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from core_support import on_threads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distdl.comm import World
from distdl.engines.base import Group, Pass
from distdl.engines.batchnorm import RunningStatistics
from distdl.engines.groups import groups_of
from distdl.plan import share

COUNTS = (4, 4, 3, 4, 4, 2, 4)


def a_pass(count: int, weight: int) -> Pass:
    return Pass((Group(0, count, count, key=0),), weight, last=False)


class Net(nn.Module):
    """Two kinds of BatchNorm, with numbers of features that do not agree."""

    def __init__(self, momentum: float | None = 0.3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=momentum), nn.ReLU(), nn.Flatten()
        )
        self.neck = nn.Linear(27, 5)
        self.norm = nn.BatchNorm1d(5, momentum=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.neck(self.body(x)))


def net(momentum: float | None = 0.3) -> Net:
    torch.manual_seed(0)
    return Net(momentum).train()


def inputs(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(n, 2, 5, 5, generator=generator) * (1 + i) for i, n in enumerate(COUNTS)]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.named_buffers()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_steps(
    world: World, model: nn.Module, steps: int = 3, counted: Sequence[int] = COUNTS
) -> dict[str, Tensor]:
    """Train-mode forwards of this rank's share of each step's microbatches; the buffers afterwards."""
    statistics = RunningStatistics(model)
    counts = [hi - lo for lo, hi in (share(len(COUNTS), r, world.size) for r in range(world.size))]
    lo, hi = share(len(COUNTS), world.rank, world.size)
    for step in range(steps):
        micros = inputs(step)
        for i in range(lo, hi):
            model(micros[i]).sum().backward()
            statistics.pass_done(a_pass(counted[i], 1))
        statistics.update(world, counts)
    return buffers(model)


def by_formula(model: nn.Module, momenta: Sequence[float | None], steps: int = 3) -> dict[str, Tensor]:
    """running <- (1 - m) running + m * sum(count * statistic) / sum(count), from torch's own BatchNorm."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)}
    expected = {k: t.double() for k, t in buffers(model).items()}
    for norm in norms.values():
        norm.momentum = 1.0
    for step in range(steps):
        means: dict[str, Tensor] = {}
        for count, x in zip(COUNTS, inputs(step), strict=True):
            model(x)
            for name, value in model.named_buffers():
                means[name] = means.get(name, torch.zeros(())) + count * value.double() / sum(COUNTS)
        for (name, _), momentum in zip(norms.items(), momenta, strict=True):
            rate = 1 / (step + 1) if momentum is None else momentum
            for buffer in ("running_mean", "running_var"):
                key = f"{name}.{buffer}"
                expected[key] = (1 - rate) * expected[key] + rate * means[key]
            expected[f"{name}.num_batches_tracked"] += 1
    return expected


@pytest.mark.parametrize("momentum", [0.3, 1.0, None])
def test_one_update_a_step_with_the_count_weighted_mean(momentum: float | None) -> None:
    found = run_steps(World(), net(momentum))
    expected = by_formula(net(momentum), [momentum, 0.1])
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert found["norm.num_batches_tracked"] == 3
    # The weighting shows: the plain mean of the microbatches is something else.
    plain = run_steps(World(), net(momentum), counted=[1] * len(COUNTS))
    assert not torch.allclose(plain["body.1.running_var"].double(), expected["body.1.running_var"], rtol=1e-3)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_the_same_bits_whatever_the_split(size: int, momentum: float | None) -> None:
    alone = run_steps(World(), net(momentum))
    models = [net(momentum) for _ in range(size)]
    for found in on_threads(size, lambda world: run_steps(world, models[world.rank])):
        assert equal(found, alone)


def test_each_microbatch_is_normalised_by_itself() -> None:
    model, plain = net(), net()
    statistics = RunningStatistics(model)
    for count, x in zip(COUNTS, inputs(0), strict=True):
        assert torch.equal(model(x), plain(x))
        statistics.pass_done(a_pass(count, 1))


def test_a_microbatch_of_weight_zero_touches_nothing() -> None:
    model = net()
    expected = run_steps(World(), net(), steps=1)
    statistics = RunningStatistics(model)
    micros = inputs(0)
    for i, (count, x) in enumerate(zip(COUNTS, micros, strict=True)):
        before = buffers(model)
        model(micros[i - 1] * 100).sum().backward()
        statistics.pass_done(a_pass(count, 0))
        assert equal(buffers(model), before)
        model(x)
        statistics.pass_done(a_pass(count, 1))
    statistics.update(World(), [len(COUNTS)])
    assert equal(buffers(model), expected)


def test_a_rank_with_repeats_alone_takes_part() -> None:
    micros = inputs(0)[:2]
    models = [net() for _ in range(3)]

    def run(world: World) -> dict[str, Tensor]:
        model = models[world.rank]
        statistics = RunningStatistics(model)
        real = world.rank < 2
        model(micros[world.rank if real else 1])
        statistics.pass_done(a_pass(4, int(real)))
        statistics.update(world, [1, 1, 0])
        return buffers(model)

    one = net()
    statistics = RunningStatistics(one)
    for x in micros:
        one(x)
        statistics.pass_done(a_pass(4, 1))
    statistics.update(World(), [2])
    assert all(equal(found, buffers(one)) for found in on_threads(3, run))


def joint(model: nn.Module, counts: Sequence[int], parts: Sequence[Tensor], steps: int = 1) -> Tensor:
    """Each step one pass of all `parts`, each of them a group; the last output."""
    statistics = RunningStatistics(model)
    groups = [Group(i, n, len(x), key=i) for i, (n, x) in enumerate(zip(counts, parts, strict=True))]
    this = Pass(tuple(groups), 1, last=True)
    for _ in range(steps):
        with groups_of(model, this):
            y: Tensor = model(torch.cat(list(parts)))
            y.square().sum().backward()
        statistics.pass_done(this)
        statistics.update(World(), [len(parts)])
    return y


def separate(model: nn.Module, counts: Sequence[int], parts: Sequence[Tensor], steps: int = 1) -> Tensor:
    statistics = RunningStatistics(model)
    for _ in range(steps):
        ys: list[Tensor] = []
        for n, x in zip(counts, parts, strict=True):
            ys.append(model(x))
            ys[-1].square().sum().backward()
            statistics.pass_done(a_pass(n, 1))
        statistics.update(World(), [len(parts)])
    return torch.cat(ys)


@pytest.mark.parametrize(
    ("norm", "shape", "layout"),
    [
        (nn.BatchNorm1d, (3,), torch.contiguous_format),
        (nn.BatchNorm1d, (3, 7), torch.contiguous_format),
        (nn.BatchNorm2d, (3, 5, 4), torch.contiguous_format),
        (nn.BatchNorm2d, (3, 5, 4), torch.channels_last),
        (nn.BatchNorm3d, (3, 2, 3, 4), torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_a_pass_are_normalised_by_themselves_to_the_bit(
    norm: type[nn.Module], shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    """Outputs, gradients of input and parameters, and running statistics, of groups that differ in size."""
    torch.manual_seed(1)
    counts = (4, 2, 5)
    inputs = [(torch.randn(n, *shape, dtype=dtype) * n).to(memory_format=layout) for n in counts]
    found = []
    for run in (separate, joint):
        model = norm(3, momentum=None)
        nn.init.uniform_(model.weight)
        parts = [x.clone().requires_grad_() for x in inputs]
        with torch.no_grad():
            model.weight.copy_(torch.tensor([0.5, 1.5, -1.0]))
        y = run(model, counts, parts, steps=2)
        found.append((y, [x.grad for x in parts], buffers(model), [p.grad for p in model.parameters()]))
    (y, dx, state, dp), (y2, dx2, state2, dp2) = found
    assert torch.equal(y, y2)
    assert y2.stride() == y.stride()
    for a, b in zip(dx, dx2, strict=True):
        assert a is not None
        assert torch.equal(a, b)
    assert equal(state, state2)
    for a, b in zip(dp, dp2, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_groups_without_affine_or_running_statistics_and_frozen() -> None:
    torch.manual_seed(1)
    parts = [torch.randn(n, 3, 4) * n for n in (4, 3)]
    plain = {"affine": False, "track_running_stats": False}
    models = [
        nn.Sequential(nn.BatchNorm1d(3, **plain), nn.Conv1d(3, 2, 1), nn.BatchNorm1d(2)) for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model[2].eval()
    assert torch.allclose(separate(models[0], (4, 3), parts), joint(models[1], (4, 3), parts), atol=1e-6)
    assert equal(buffers(models[0]), buffers(models[1]))


def test_groups_of_a_recomputed_part_count_once() -> None:
    def part() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 1))

    plain, again = part(), Recomputing(part(), reentrant=False)
    micros = inputs(0)
    expected, found = separate(plain, COUNTS, micros), joint(again, COUNTS, micros)
    assert torch.allclose(found, expected, atol=1e-6)
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(buffers(plain).items(), buffers(again).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_a_group_of_one_value_is_refused_as_it_would_be_alone() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        joint(nn.BatchNorm1d(3), (4, 1), [torch.randn(4, 3), torch.randn(1, 3)])


class Recomputing(nn.Module):
    """A net part of which is computed a second time during backward."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self._reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x.requires_grad_(), use_reentrant=self._reentrant)
        return result


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("last", [True, False], ids=["the norm last", "the norm inside"])
def test_recomputation_in_backward_does_not_count(reentrant: bool, last: bool) -> None:
    """A norm at the end is the hard one: its recomputation is broken off before its hook runs."""

    def part() -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)]
        return nn.Sequential(*layers, *([] if last else [nn.ReLU(), nn.Conv2d(3, 1, 1)]))

    expected = run_steps(World(), part())
    found = run_steps(World(), Recomputing(part(), reentrant))
    assert equal({name.removeprefix("inner."): t for name, t in found.items()}, expected)


class Twice(nn.Module):
    """One norm, used at two places."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self._recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for convolution in (self.first, self.second):
            part = nn.Sequential(convolution, self.norm, nn.ReLU())
            x = checkpoint(part, x, use_reentrant=False) if self._recompute else part(x)
        return x


def test_recomputation_of_a_norm_in_two_places_does_not_count() -> None:
    """Backward recomputes the places in the other order."""
    assert equal(run_steps(World(), Twice(True)), run_steps(World(), Twice(False)))


def test_a_skipped_step_leaves_them() -> None:
    model = net()
    statistics = RunningStatistics(model)
    before = buffers(model)
    for count, x in zip(COUNTS, inputs(9), strict=True):
        model(x * float("inf"))
        statistics.pass_done(a_pass(count, 1))
    statistics.discard()
    assert equal(buffers(model), before)
    for count, x in zip(COUNTS, inputs(0), strict=True):
        model(x)
        statistics.pass_done(a_pass(count, 1))
    statistics.update(World(), [len(COUNTS)])
    assert equal(buffers(model), run_steps(World(), net(), steps=1))


def test_evaluation_leaves_them_and_uses_them() -> None:
    model = net()
    statistics = RunningStatistics(model)
    for count, x in zip(COUNTS, inputs(0), strict=True):
        model(x)
        statistics.pass_done(a_pass(count, 1))
    statistics.update(World(), [len(COUNTS)])
    before = buffers(model)
    plain = net().eval()
    plain.load_state_dict(model.state_dict())
    model.eval()
    assert torch.equal(model(inputs(5)[0]), plain(inputs(5)[0]))
    assert equal(buffers(model), before)


def test_a_frozen_norm_stays_as_it_is() -> None:
    """In eval mode while the rest trains, as in fine-tuning."""
    model = net()
    model.body[1].eval()
    before = buffers(model)
    found = run_steps(World(), model)
    for name, value in found.items():
        assert torch.equal(value, before[name]) == name.startswith("body.1."), name


def test_modules_without_running_statistics_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.GroupNorm(1, 2)).train()
    statistics = RunningStatistics(model)
    model(inputs(0)[0])
    statistics.pass_done(a_pass(4, 1))
    statistics.update(World(), [1])
    assert buffers(model) == {}
    assert model[0].momentum == 0.1


def test_the_state_has_the_names_of_the_model() -> None:
    model = net()
    names = list(model.state_dict())
    RunningStatistics(model)
    assert list(model.state_dict()) == names
    assert list(copy.deepcopy(model.state_dict())) == names
