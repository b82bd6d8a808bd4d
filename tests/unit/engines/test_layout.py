"""channels_last: where it is on, and where torch would write beyond its memory in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distdl.engines.layout import Layout, overrun
from distdl.errors import RecipeError
from distdl.models.resnet import ResNet

NARROW = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 1, 2))


def on(model: nn.Module, wanted: bool | str = "auto", device: str = "cpu") -> bool:
    layout = Layout(torch.device(device), wanted)  # type: ignore[arg-type]
    layout.decide(model)
    return layout.channels_last


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(2, 2), False),
        (nn.Conv2d(1, 4, 3, 2), True),
        (nn.Conv2d(4, 8, 1), True),
        (nn.Conv2d(16, 8, 1, 2), True),
        (NARROW, False),
        (nn.Conv2d(32, 32, 1, 2, groups=4), False),
        (ResNet(3, 10, depth=20), True),
        (ResNet(3, 10, depth=20, width=8), False),
    ],
)
def test_by_itself_it_is_on_for_convolutions_that_it_suits(model: nn.Module, expected: bool) -> None:
    assert on(model) is expected
    assert on(model, False) is False
    has_convolutions = not isinstance(model, nn.Linear)
    assert on(model, device="cuda") is has_convolutions


def test_where_torch_would_overrun_it_is_refused() -> None:
    assert overrun(NARROW) == "1"
    with pytest.raises(
        RecipeError, match=r"channels_last = true: on a CPU, backward of convolution 1 \(1x1, with a stride"
    ):
        on(NARROW, True)
    assert on(NARROW, True, "cuda")
