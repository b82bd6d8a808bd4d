"""`cnn` and `crnn`: a plain stack of convolutions, and one whose feature map recurrent layers read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distdl.errors import RecipeError
from distdl.models.layers import convolution
from distdl.models.lstm import RecurrentLayer


class Stack(nn.Module):
    """Images [N, C, H, W] (float) -> [N, width, H', W']: so many convolutions, each as wide as the others.

    Without padding each makes the image smaller by kernel - 1. Raises RecipeError where nothing is left.
    """

    def __init__(
        self, input_shape: tuple[int, ...], layers: int, kernel: int, width: int, padding: bool, norm: str
    ) -> None:
        super().__init__()
        channels, *size = input_shape
        if padding and kernel % 2 == 0:
            raise RecipeError(f"model.kernel = {kernel}: padding keeps the size of odd kernels alone")
        lost = 0 if padding else layers * (kernel - 1)
        if lost >= min(size):
            raise RecipeError(
                f"model.layers = {layers}: convolutions of kernel {kernel} without padding take {lost} "
                f"pixels off each side, and the images are {size[0]}x{size[1]}: at most "
                f"{(min(size) - 1) // max(kernel - 1, 1)} layers, or set padding=true"
            )
        self.layers = nn.Sequential(
            *(
                convolution(width if i else channels, width, norm, kernel, padding=kernel // 2 * padding)
                for i in range(layers)
            )
        )
        self.outputs = (width, size[0] - lost, size[1] - lost)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.layers(images)
        return x


class Cnn(nn.Module):
    """Images [N, C, H, W] (float) -> logits [N, num_outputs]: a stack of convolutions and a linear head that
    sees every pixel of the last feature map."""

    def __init__(
        self,
        num_outputs: int,
        input_shape: tuple[int, ...],
        layers: int = 5,
        kernel: int = 3,
        width: int = 32,
        padding: bool = False,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        self.stack = Stack(input_shape, layers, kernel, width, padding, norm)
        channels, height, breadth = self.stack.outputs
        self.head = nn.Linear(channels * height * breadth, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.flatten(self.stack(images), 1))
        return logits


class Crnn(nn.Module):
    """Images [N, C, H, W] (float) -> logits [N, num_outputs]: the rows of a stack's feature map, top to
    bottom, are the steps of a sequence that recurrent layers read; the head sees the last state.

    As in Shi et al. (2017, arXiv:1507.05717), who read columns.
    """

    def __init__(
        self,
        num_outputs: int,
        input_shape: tuple[int, ...],
        layers: int = 5,
        kernel: int = 3,
        width: int = 32,
        padding: bool = False,
        norm: str = "batch",
        cell: str = "lstm",
        hidden: int = 128,
        recurrent_layers: int = 1,
    ) -> None:
        super().__init__()
        self.stack = Stack(input_shape, layers, kernel, width, padding, norm)
        channels, _, breadth = self.stack.outputs
        sizes = [channels * breadth, *[hidden] * recurrent_layers]
        self.recurrent = nn.ModuleList(RecurrentLayer(cell, a, hidden, False) for a in sizes[:-1])
        self.head = nn.Linear(hidden, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stack(images).permute(0, 2, 1, 3).flatten(2)  # [N, H', width * W']
        for layer in self.recurrent:
            x = layer(x, None)
        logits: Tensor = self.head(x[:, -1])
        return logits
