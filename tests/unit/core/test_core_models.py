"""`cnn5` for any image, and a user's own model by import path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distdl.errors import RecipeError
from distdl.models import model_factory
from distdl.models.cnn5 import Cnn5


@settings(max_examples=40)
@given(
    channels=st.integers(1, 6),
    height=st.integers(1, 33),
    width=st.integers(1, 33),
    outputs=st.integers(1, 7),
    norm=st.sampled_from(["batch", "group", "none"]),
)
def test_any_channels_and_any_size(channels: int, height: int, width: int, outputs: int, norm: str) -> None:
    model = Cnn5(channels, outputs, width=3, norm=norm, hidden=5)
    logits = model(torch.randn(2, channels, height, width))
    assert logits.shape == (2, outputs)
    logits.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())


def test_every_pixel_is_seen() -> None:
    """Odd sizes too, whose last row and column are over when pixels are pooled in pairs."""
    torch.manual_seed(0)
    model = Cnn5(1, 3, width=4, norm="none").eval()
    for size in (4, 5, 7, 13):
        image = torch.randn(1, 1, size, size, requires_grad=True)
        model(image).square().sum().backward()
        assert image.grad is not None
        assert (image.grad != 0).any(2).all()
        assert (image.grad != 0).any(3).all()


@pytest.mark.parametrize(("norm", "bias"), [("batch", False), ("group", False), ("none", True)])
def test_no_bias_before_a_normalisation(norm: str, bias: bool) -> None:
    model = Cnn5(1, 10, width=4, norm=norm)
    assert [isinstance(c, nn.Conv2d) and (c.bias is not None) for c in model.convolutions] == [bias] * 5
    kind = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "none": nn.Identity}[norm]
    assert all(isinstance(m, kind) for m in model.norms)


@pytest.mark.parametrize("width", [1, 3, 8, 32])
def test_widths(width: int) -> None:
    model = Cnn5(3, 10, width=width, hidden=17)
    shapes = [(c.in_channels, c.out_channels) for c in model.convolutions if isinstance(c, nn.Conv2d)]
    w = width
    assert shapes == [(3, w), (w, w), (w, 2 * w), (2 * w, 2 * w), (2 * w, 4 * w)]
    assert (model.hidden.in_features, model.hidden.out_features) == (16 * w, 17)
    assert (model.head.in_features, model.head.out_features) == (17, 10)


def test_group_norm_divides_any_width_that_it_can() -> None:
    assert Cnn5(1, 10, width=8, norm="group")(torch.randn(1, 1, 8, 8)).shape == (1, 10)
    assert Cnn5(1, 10, width=5, norm="group")(torch.randn(1, 1, 8, 8)).shape == (1, 10)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = Cnn5(1, 4, width=4, norm="none", dropout=0.5)
    images = torch.randn(3, 1, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_by_name_with_the_keys_of_the_recipe() -> None:
    factory = model_factory("cnn5", {"width": 6, "norm": "none"})
    model = factory(in_channels=2, num_outputs=3, input_shape=(2, 9, 9))
    assert isinstance(model, Cnn5)
    assert model(torch.randn(1, 2, 9, 9)).shape == (1, 3)
    assert model.hidden.in_features == 16 * 6


MODELS = """
from torch import nn

class Net(nn.Linear):
    def __init__(self, in_channels, num_outputs, width):
        super().__init__(in_channels, num_outputs * width)

def everything(**given):
    net = nn.Identity()
    net.given = given
    return net

def needs_more(num_outputs, depth):
    return nn.Identity()

def not_a_model(num_outputs):
    return "a string"

def fails(num_outputs):
    raise ValueError("of its own")
"""


@pytest.fixture
def user_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "core_user_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "core_user_models", raising=False)


OFFERED = {"in_channels": 2, "num_outputs": 3, "input_shape": (2, 4, 4)}


@pytest.mark.usefixtures("user_models")
def test_a_users_own() -> None:
    net = model_factory("core_user_models:Net", {"width": 4})(**OFFERED)
    assert isinstance(net, nn.Linear)
    assert (net.in_features, net.out_features) == (2, 12)
    net = model_factory("core_user_models:everything", {"depth": 2})(**OFFERED)
    assert net.given == {"depth": 2}  # a ** may be handed on to a library's network, with words of its own


@pytest.mark.usefixtures("user_models")
@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("core_user_models:Net", {}, "missing 1 required positional argument: 'width'"),
        (
            "core_user_models:Net",
            {"width": 1, "depth": 2},
            r"\['depth', 'width'\].*unexpected keyword.*'depth'",
        ),
        ("core_user_models:needs_more", {}, "in_channels, num_outputs, input_shape"),
        ("core_user_models:not_a_model", {}, "returned a str: expected a torch.nn.Module"),
        ("core_user_models:needs_mroe", {}, "did you mean 'needs_more'"),
        ("core_user_no_such:Net", {}, "ModuleNotFoundError"),
    ],
)
def test_a_users_own_that_is_wrong(name: str, keys: dict[str, int], says: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s)model.name = '{name}'.*{says}"):
        model_factory(name, keys)(**OFFERED)


@pytest.mark.usefixtures("user_models")
def test_a_users_own_error_is_theirs() -> None:
    with pytest.raises(ValueError, match="of its own"):
        model_factory("core_user_models:fails", {})(**OFFERED)
