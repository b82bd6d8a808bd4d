"""`resnet`: residual networks for large images, and the narrow ones for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.models.layers import norm_of

STAGES: dict[int, tuple[int, ...]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Depth -> blocks of each stage (He et al., 2016, table 1). From 50 on a block has three convolutions."""


def stages_of(depth: int) -> tuple[int, ...]:
    """Blocks of each stage; of depth 6n + 2, three stages of n (He et al., 2016, section 4.2)."""
    return STAGES.get(depth) or ((depth - 2) // 6,) * 3


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 to four times the width, and a way around them.

    The stride is that of the (first) 3x3 convolution. Where the shape changes, the way around is a 1x1
    convolution.
    """

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool, norm: str) -> None:
        super().__init__()
        self.outputs = width * (4 if bottleneck else 1)
        sizes = [(inputs, width, 1), (width, width, 3), (width, self.outputs, 1)]
        if not bottleneck:
            sizes = [(inputs, width, 3), (width, width, 3)]
        strided = 1 if bottleneck else 0
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, k, stride if i == strided else 1, k // 2, bias=False)
            for i, (a, b, k) in enumerate(sizes)
        )
        self.norms = nn.ModuleList(norm_of(norm, b) for _, b, _ in sizes)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != self.outputs:
            self.around = nn.Sequential(
                nn.Conv2d(inputs, self.outputs, 1, stride, bias=False), norm_of(norm, self.outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            y = norm(convolution(functional.relu(y) if i else y))
        total: Tensor = self.around(x) + y
        return functional.relu(total)


class Trunk(nn.Module):
    """Images [N, C, H, W] (float) -> features [N, outputs, H / stride, W / stride], rounded up.

    `stem` "imagenet" is a 7x7 convolution and a maximum over 3x3, each of stride 2; "cifar" one 3x3
    convolution of stride 1. `width` is that of the first stage; each further stage halves the size and
    doubles the width. The scale of each block's last normalisation begins at zero, so that a block begins as
    the identity (Goyal et al., 2017, arXiv:1706.02677, section 5.1); convolutions are drawn as in He et al.
    (2015, arXiv:1502.01852), over outgoing connections.
    """

    def __init__(self, in_channels: int, depth: int, stem: str, width: int, norm: str) -> None:
        super().__init__()
        large = stem == "imagenet"
        self.stem = nn.Conv2d(in_channels, width, *((7, 2, 3) if large else (3, 1, 1)), bias=False)
        self.norm = norm_of(norm, width)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.blocks = nn.ModuleList()
        self.stride = 4 if large else 1
        self.outputs = width
        for stage, blocks in enumerate(stages_of(depth)):
            for i in range(blocks):
                stride = 2 if stage and not i else 1
                block = Block(self.outputs, width << stage, stride, depth in STAGES and depth >= 50, norm)
                self.blocks.append(block)
                self.outputs = block.outputs
                self.stride *= stride
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block):
                nn.init.zeros_(module.norms[-1].weight)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.pool(functional.relu(self.norm(self.stem(images))))
        for block in self.blocks:
            x = block(x)
        return x


class ResNet(nn.Module):
    """Images [N, C, H, W] (float) of any size -> logits [N, num_outputs]. He et al. (2016), arXiv:1512.03385.

    Depth 18, 34, 50, 101, 152: four stages, by default with the stem for large images and 64 wide, strides in
    the 3x3 convolutions of a block. Depth 6n + 2 (8, 14, 20, 32, 44, 56, 110): three stages, with the stem
    for small images and 16 wide.
    """

    def __init__(
        self,
        in_channels: int,
        num_outputs: int,
        depth: int = 18,
        stem: str | None = None,
        width: int | None = None,
        norm: str = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        large = depth in STAGES
        stem = stem or ("imagenet" if large else "cifar")
        self.trunk = Trunk(in_channels, depth, stem, width or (64 if large else 16), norm)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.trunk.outputs, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.dropout(torch.mean(self.trunk(images), (2, 3)))
        logits: Tensor = self.head(x)
        return logits
