"""Comparing two runs: norm-wise, or to the bit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def relative_error(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|`` in the Euclidean norm, in float64; 0 where both are zero, infinite where that is no
    number or `b` alone is zero. Raises AssertionError on other shapes.
    """
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    difference, size = float((a.double() - b.double()).norm()), float(b.double().norm())
    if difference == 0:
        return 0.0
    # Not NaN, which no comparison finds too large.
    return difference / size if size and math.isfinite(difference) else math.inf


def worst(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[str, float]:
    """The name with the largest `relative_error`, and that error. Raises AssertionError on other names."""
    assert a.keys() == b.keys(), f"only in one: {sorted(a.keys() ^ b.keys())}"
    errors = {name: relative_error(a[name], b[name]) for name in a}
    name = max(errors, key=lambda n: errors[n])
    return name, errors[name]


def assert_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Raise AssertionError, naming the tensors, unless all are equal to the bit."""
    assert a.keys() == b.keys(), f"only in one: {sorted(a.keys() ^ b.keys())}"
    differ = [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(_bits(a[n]), _bits(b[n]))]
    assert not differ, f"{len(differ)} of {len(a)} tensors differ, among them {differ[:5]}"


def _bits(tensor: Tensor) -> Tensor:
    # As bytes: NaN equals itself, and -0.0 differs from 0.0.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
