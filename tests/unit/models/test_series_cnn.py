"""`fcn1d`, `conv1d_resnet`: shapes of the paper, and series of one length alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distdl.errors import RecipeError
from distdl.models import model_factory
from distdl.models.series_cnn import ConvBlock


def convolutions(model: nn.Module) -> list[tuple[int, int, int]]:
    found = [m for m in model.modules() if isinstance(m, nn.Conv1d)]
    return [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in found]


def test_the_layers_are_those_of_the_paper() -> None:
    fcn = model_factory("fcn1d", {})(features=1, steps=150, num_outputs=2)
    assert convolutions(fcn) == [(1, 128, 8), (128, 256, 5), (256, 128, 3)]
    resnet = model_factory("conv1d_resnet", {})(features=2, steps=150, num_outputs=2)
    main = [c for c in convolutions(resnet) if c[2] > 1]
    assert [c[1] for c in main] == [64] * 3 + [128] * 6
    assert [c[2] for c in main] == [8, 5, 3] * 3
    assert [c for c in convolutions(resnet) if c[2] == 1] == [(2, 64, 1), (64, 128, 1)]


@pytest.mark.parametrize("name", ["fcn1d", "conv1d_resnet"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_any_length_and_every_step_is_seen(name: str, steps: int) -> None:
    torch.manual_seed(0)
    model = model_factory(name, {"width": 4})(features=3, steps=steps, num_outputs=2).eval()
    series = torch.randn(2, steps, 3, requires_grad=True)
    outputs = model(series)
    assert outputs.shape == (2, 2)
    outputs.square().sum().backward()
    assert series.grad is not None
    assert (series.grad != 0).any(2).all()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kernel", [8, 5, 3])
def test_a_convolution_keeps_the_number_of_steps_and_is_centred(kernel: int) -> None:
    block = ConvBlock(1, 1, kernel)
    nn.init.ones_(block.convolution.weight)
    impulse = torch.zeros(1, 1, 21)
    impulse[0, 0, 10] = 1
    touched = block.eval()(impulse)[0, 0].nonzero().flatten().tolist()
    assert touched == list(range(10 - kernel // 2, 10 + (kernel - 1) // 2 + 1))


@pytest.mark.parametrize("name", ["fcn1d", "conv1d_resnet"])
def test_series_of_different_lengths_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"'{name}' reads series of one length.*use lstm, gru or rnn"):
        model_factory(name, {})(features=3, steps=None, num_outputs=2)
