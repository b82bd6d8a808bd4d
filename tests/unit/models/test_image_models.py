"""resnet, cnn, crnn, image_rnn, unet, centernet and the autoencoders: shapes, sizes, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distdl.errors import RecipeError
from distdl.models import model_factory
from distdl.models.resnet import Block, ResNet

CLASSIFY = {"resnet": {"depth": 20, "width": 4}, "cnn": {"padding": True, "width": 3}}
CLASSIFY |= {"crnn": {"padding": True, "width": 3, "hidden": 5}, "image_rnn": {"hidden": 6, "blocks": 2}}


def make(name: str, shape: tuple[int, ...], **keys: Any) -> nn.Module:
    offered: dict[str, Any] = {"input_shape": shape}
    if "autoencoder" not in name:
        what = {"unet": "num_pixel_classes", "centernet": "num_object_classes"}.get(name, "num_outputs")
        offered |= {"in_channels": shape[0], what: 3}
    return model_factory(name, keys)(**offered)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check(model: nn.Module, images: Tensor, shape: tuple[int, ...]) -> None:
    """The result has `shape`, and every parameter a gradient."""
    result = model(images)
    assert result.shape == shape
    result.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@settings(max_examples=10)
@given(channels=st.integers(1, 4), height=st.integers(1, 33), width=st.integers(1, 33))
@pytest.mark.parametrize("name", [*CLASSIFY, "unet", "centernet", "autoencoder", "conv_autoencoder"])
def test_any_channels_and_any_size(name: str, channels: int, height: int, width: int) -> None:
    small = {"unet": {"width": 2, "levels": 3}, "centernet": {"width": 2, "hidden": 4}}
    small |= {"autoencoder": {"hidden": [7], "code": 2}, "conv_autoencoder": {"width": 2, "code": 3}}
    model = make(name, (channels, height, width), **(CLASSIFY | small)[name])
    found: dict[str, tuple[int, ...]] = {"unet": (3, height, width)}
    found["centernet"] = (7, -(-height // 4), -(-width // 4))
    found |= dict.fromkeys(["autoencoder", "conv_autoencoder"], (channels, height, width))
    check(model, torch.rand(2, channels, height, width), (2, *found.get(name, (3,))))


@pytest.mark.parametrize(
    ("depth", "shape", "expected"),
    [
        # torchvision's counts, of which 2,048,000 or 512,000 weights and 1,000 biases are the head.
        (18, (3, 64, 64), 11_689_512),
        (34, (3, 64, 64), 21_797_672),
        (50, (3, 64, 64), 25_557_032),
    ],
)
def test_resnets_for_large_images_have_the_usual_number_of_parameters(
    depth: int, shape: tuple[int, ...], expected: int
) -> None:
    with torch.device("meta"):
        assert parameters(ResNet(shape[0], 1000, depth)) == expected


@pytest.mark.parametrize(
    ("depth", "layers"), [(8, 8), (14, 14), (20, 20), (32, 32), (56, 56), (18, 18), (50, 50)]
)
def test_depth_counts_the_layers(depth: int, layers: int) -> None:
    with torch.device("meta"):
        model = ResNet(3, 10, depth)
    names = [
        n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "around" not in n
    ]
    assert len(names) == layers
    small = depth not in (18, 50)
    assert (model.trunk.stride, model.trunk.outputs) == (
        (4, 64) if small else (32, 512 if depth == 18 else 2048)
    )


@pytest.mark.parametrize("depth", [18, 50, 20])
def test_a_block_begins_as_the_way_around_it(depth: int) -> None:
    model = ResNet(1, 10, depth, width=4)
    for block in model.trunk.blocks:
        assert isinstance(block, Block)
        x = torch.rand(2, block.convolutions[0].in_channels, 8, 8)  # type: ignore[arg-type]
        torch.testing.assert_close(block(x), block.around(x).relu())


def test_the_stem_for_small_images_keeps_their_size() -> None:
    small, large = ResNet(1, 10, 18, "cifar", 4), ResNet(1, 10, 18, "imagenet", 4)
    images = torch.rand(2, 1, 32, 32)
    assert (small.trunk(images).shape[2:], large.trunk(images).shape[2:]) == ((4, 4), (1, 1))


def test_the_reference_networks_are_as_they_are_read() -> None:
    shape = (1, 28, 28)
    plain = make("cnn", shape, layers=20, kernel=2, width=4)
    convolutions = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.kernel_size, m.out_channels) for m in convolutions] == [((2, 2), 4)] * 20
    assert (plain.head.in_features, plain.head.out_features) == (4 * 8 * 8, 3)  # type: ignore[union-attr]
    recurrent = make("crnn", shape, layers=20, kernel=2, width=4, cell="rnn", hidden=6)
    (layer,) = (m for m in recurrent.modules() if isinstance(m, nn.RNN))
    assert (layer.input_size, layer.hidden_size) == (4 * 8, 6)
    rows = make("image_rnn", shape, steps=5, features=7, blocks=3, layers=4, hidden=6, cell="rnn", outputs=20)
    assert sum(isinstance(m, nn.RNN) for m in rows.modules()) == 12
    assert rows(torch.rand(2, *shape)).shape == (2, 20)


def test_rows_are_read_from_top_to_bottom() -> None:
    """What the last state has seen: all rows; after a change of the last row alone, another result."""
    torch.manual_seed(0)
    model = make("image_rnn", (1, 10, 7), steps=5, features=7, hidden=6).eval()
    image = torch.rand(1, 1, 10, 7, requires_grad=True)
    model(image).square().sum().backward()
    assert image.grad is not None
    assert (image.grad != 0).all()


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        (
            "cnn",
            {"layers": 20, "kernel": 3},
            "take 40 pixels off each side, and the images are 28x28: at most 13",
        ),
        ("crnn", {"kernel": 2, "padding": True}, "padding keeps the size of odd kernels alone"),
        ("image_rnn", {"outputs": 2}, "outputs = 2: the task has 3 classes"),
        ("centernet", {"depth": 20, "stem": "imagenet", "width": 2}, None),
        ("centernet", {"depth": 20, "stem": "cifar", "width": 2}, None),
    ],
)
def test_keys_that_do_not_fit(name: str, keys: dict[str, Any], says: str | None) -> None:
    if says is None:
        make(name, (1, 28, 28), **keys)
        return
    with pytest.raises(RecipeError, match=says):
        make(name, (1, 28, 28), **keys)


@pytest.mark.parametrize("name", ["unet", "autoencoder", "crnn_ctc"])
def test_a_model_that_cannot_do_the_task_is_refused(name: str) -> None:
    known = "Models that do: cnn5, lstm, gru, rnn, cnn, crnn, image_rnn, resnet$"
    with pytest.raises(RecipeError, match=f"model.name = '{name}' does not read what the task has.*{known}"):
        model_factory(name, {})(in_channels=1, num_outputs=3, input_shape=(1, 8, 8))
