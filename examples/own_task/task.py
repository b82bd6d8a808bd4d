"""A task of your own: a network sees images with noise and has to give back the clean ones.

Nothing here knows of ranks, devices or accumulation. The loss is a sum and says what it is a sum over, here
pixels; distdl divides by the count of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distdl.samples import DataInfo
from distdl.tasks import Batch, Prediction, Rows


class Denoise:
    """Rows with a uint8 column "image" of [H, W]. Metric: mse, the mean squared error of a pixel in 0..1."""

    image_field = "image"
    """The column that `data.augment` acts on; None would mean none."""

    inputs = ("image",)
    """The columns that `predict` reads."""

    def __init__(self, make_model: Callable[..., nn.Module], data_info: DataInfo, noise: float = 0.5) -> None:
        self._make_model = make_model
        self._noise = noise
        self._shape = data_info.fields["image"].shape

    def build_model(self) -> nn.Module:
        # Whatever the recipe's `model` section names, with one output a pixel.
        height, width = self._shape
        return self._make_model(in_channels=1, num_outputs=height * width, input_shape=(1, height, width))

    def collate(self, rows: Rows) -> Batch:
        clean = torch.from_numpy(rows["image"].astype(np.float32) / 255).unsqueeze(1)
        return {"clean": clean}

    def count(self, batch: Batch) -> int:
        return batch["clean"].numel()

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        clean = batch["clean"]
        # Drawn from torch's generator, which distdl keys by (seed, step, microbatch): the same at any number
        # of processes, and after a resume.
        noisy = clean + self._noise * torch.randn_like(clean)
        return _squared_error(model, noisy, clean)

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        clean = batch["clean"]
        generator = torch.Generator().manual_seed(0)  # an evaluation is the same each time
        noise = torch.randn(clean.shape[1:], generator=generator).to(clean.device)
        error = _squared_error(model, clean + self._noise * noise, clean)
        return {"mse": (float(error), clean.numel())}

    # What follows is for `distdl predict`, and may be left out.

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """The images of `--input` without their noise: floats 0 to 1, [H, W], which become PNG files."""
        given = batch["clean"]  # what collate calls it: here it is what is to be cleaned
        found = model(given).float().view_as(given).clamp(0, 1)
        return [{"image": image} for image in found[:, 0].cpu().numpy()]

    def draw(self, axes: Any, row: dict[str, Any], prediction: Prediction) -> None:
        """The image and, right of it, without its noise."""
        axes.imshow(np.concatenate([row["image"] / 255, prediction["image"]], 1), cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()


def _squared_error(model: nn.Module, noisy: Tensor, clean: Tensor) -> Tensor:
    given: Tensor = model(noisy)
    return (given.float().view_as(clean) - clean).square().sum()
