"""Objects as points: boxes to maps of centres, and back. Zhou et al. (2019), arXiv:1904.07850."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

STRIDE = 4
"""Pixels, down and across, of one cell of a map (R in the paper)."""

_OVERLAP = 0.7
"""Intersection over union that a box may lose before a cell near its centre counts as plain background."""

Floats = npt.NDArray[np.float32]


def maps(
    boxes: list[Floats], classes: list[npt.NDArray[np.int64]], num_classes: int, size: tuple[int, ...]
) -> tuple[Floats, Floats]:
    """Boxes [k, 4] (left, top, right, bottom in pixels) and classes [k] of each image -> what `loss` reads.

    Of images of `size` (H, W): heat [N, num_classes, H / 4, W / 4], 1 in the cell of each centre and a
    Gaussian around it; geometry [N, 4, H / 4, W / 4], in the cells of centres alone: the centre's offset
    (x, y) from the cell's corner, width and height, in cells.
    """
    height, width = (-(-n // STRIDE) for n in size)
    heat = np.zeros((len(boxes), num_classes, height, width), np.float32)
    geometry = np.zeros((len(boxes), 4, height, width), np.float32)
    down, across = np.ogrid[:height, :width]
    for n, (some, labels) in enumerate(zip(boxes, classes, strict=True)):
        for (left, top, right, bottom), label in zip(some / STRIDE, labels, strict=True):
            x, y, w, h = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
            column, row = min(max(int(x), 0), width - 1), min(max(int(y), 0), height - 1)
            spread = (2 * radius(w, h) + 1) / 6
            around = np.exp(-((down - row) ** 2 + (across - column) ** 2) / (2 * spread**2))
            np.maximum(heat[n, label], around, out=heat[n, label])
            geometry[n, :, row, column] = x - column, y - row, w, h
    return heat, geometry


def radius(width: float, height: float) -> float:
    """The largest shift of both corners, each in any direction, after which a box still overlaps itself by
    `_OVERLAP`: the least of three quadratic equations (Law and Deng, 2018, arXiv:1808.01244, section 3.2)."""
    around, area, t = width + height, width * height, _OVERLAP
    shifted = (around - math.sqrt(around**2 - 4 * area * (1 - t) / (1 + t))) / 2
    inside = (around - math.sqrt(around**2 - 4 * area * (1 - t))) / 4
    outside = (math.sqrt(around**2 + 4 * area * (1 - t) / t) - around) / 4
    return min(shifted, inside, outside)


def loss(output: Tensor, heat: Tensor, geometry: Tensor) -> Tensor:
    """The sum over all images; `output` is [N, num_classes + 4, H / 4, W / 4].

    Of scores the focal loss that weighs cells near a centre less (equation 1, alpha 2 and beta 4), of offsets
    the absolute error, of sizes 0.1 times it.
    """
    logits, guess = output.split([heat.shape[1], 4], 1)
    score, centre = torch.sigmoid(logits), heat == 1
    hit = (1 - score) ** 2 * functional.logsigmoid(logits)
    miss = (1 - heat) ** 4 * score**2 * functional.logsigmoid(-logits)
    # Every cell is computed and those without a centre weighed 0, which has a fixed order on CUDA too.
    error = (guess - geometry).abs() * centre.any(1, keepdim=True)
    total: Tensor = error[:, :2].sum() + 0.1 * error[:, 2:].sum() - torch.where(centre, hit, miss).sum()
    return total


def detections(output: Tensor, num_classes: int, most: int) -> list[dict[str, Any]]:
    """Of each image the `most` cells with the highest score among their neighbours, best first: `boxes`
    ([x, y, width, height] in pixels, to a thousandth), `classes` and `scores`, as lists."""
    heat, geometry = torch.sigmoid(output[:, :num_classes]), output[:, num_classes:]
    peaks = heat * (heat == functional.max_pool2d(heat, 3, 1, 1))
    scores, at = peaks.flatten(1).topk(min(most, peaks[0].numel()))
    cells = heat.shape[2] * heat.shape[3]
    labels, cell = at // cells, at % cells
    x, y, w, h = geometry.flatten(2).gather(2, cell[:, None].expand(-1, 4, -1)).unbind(1)
    x, y = x + cell % heat.shape[3], y + cell // heat.shape[3]
    # A side below nothing would make an area below nothing, and COCO's measure leaves such boxes out instead
    # of counting them as wrong.
    w, h = w.clamp(min=0), h.clamp(min=0)
    boxes = torch.stack([x - w / 2, y - h / 2, w, h], 2).double() * STRIDE
    return [
        {"boxes": b, "classes": c, "scores": s}
        for b, c, s in zip(boxes.round(decimals=3).tolist(), labels.tolist(), scores.tolist(), strict=True)
    ]
