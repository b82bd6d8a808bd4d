"""Mixup and CutMix: blends of the images of one microbatch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta


def blend(images: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor, float]:
    """Images [N, C, H, W], each blended with another -> (images, which other: int64 [N], share of its own).

    mixup: `share` times the one plus the rest of the other, `share` from Beta(mixup, mixup) (Zhang et al.,
    2018, arXiv:1710.09412). cutmix: a rectangle of the other in the one's place, its area from
    Beta(cutmix, cutmix), its centre anywhere (Yun et al., 2019, arXiv:1905.04899). With both, one of them by
    the toss of a coin. Draws from torch's CPU generator, on any device: one share, or rectangle, for the
    whole microbatch.
    """
    order = torch.randperm(images.shape[0]).to(images.device)
    cut = not mixup or bool(cutmix and torch.rand(()) < 0.5)
    share = float(Beta(cutmix if cut else mixup, cutmix if cut else mixup).sample())
    if not cut:
        return share * images + (1 - share) * images[order], order, share
    height, width = images.shape[2:]
    side = (1 - share) ** 0.5
    top, bottom = _span(height, side)
    left, right = _span(width, side)
    images = images.clone()
    images[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    return images, order, 1 - (bottom - top) * (right - left) / (height * width)


def _span(size: int, part: float) -> tuple[int, int]:
    """`part` of [0, size) around a random centre, as far as it lies inside."""
    centre, half = float(torch.rand(())) * size, part * size / 2
    return max(round(centre - half), 0), min(round(centre + half), size)
