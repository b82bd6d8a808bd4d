"""Renaming by patterns, and what is said of what does not fit."""

from __future__ import annotations

import pytest
import torch

from distdl.checkpoint.convert.names import matches, pair_up, rename
from distdl.errors import Incompatible


def shapes(**sizes: int) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.empty(size) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("name", "renamings", "expected"),
    [
        ("module.fc.weight", {"module.*": "*"}, "fc.weight"),
        ("fc.weight", {"module.*": "*"}, "fc.weight"),
        ("fc.weight", {"fc.weight": "head.weight"}, "head.weight"),
        ("a.1.b.2", {"a.*.b.*": "x.*.y.*"}, "x.1.y.2"),
        ("fc.weight", {"*": "model.*"}, "model.fc.weight"),
        ("fc.weight", {"fc.*": "a.*", "*": "b.*"}, "a.weight"),  # the first that matches
        ("fc.weight", {"f*.*": "x"}, "x"),
        ("fcXweight", {"fc.weight": "x"}, "fcXweight"),  # a dot is a dot
    ],
)
def test_rename(name: str, renamings: dict[str, str], expected: str) -> None:
    assert rename(name, renamings) == expected


def test_a_pattern_stands_for_the_whole_name() -> None:
    assert matches("head.*", "head.weight")
    assert not matches("head", "head.weight")
    assert not matches("head.*", "my.head.weight")
    assert matches("*.a.*", "x.a.y\nz")


def test_all_pairs_and_what_is_left_over() -> None:
    source = shapes(module__a=2, module__b=3, module__extra=1, module__head=7)
    target = shapes(a=2, b=3, new=4, head=5)
    found = pair_up(source, target, {"module.*": "*"}, ["head"], strict=False)
    assert found.names == {"a": "module.a", "b": "module.b"}
    assert (found.missing, found.unexpected, found.ignored) == (("new",), ("extra",), ("head",))
    assert found.lines() == [
        "not in the source, left as initialised: new",
        "not in the model, left out: extra",
        "ignored: head",
    ]


def test_strict_names_every_difference_and_the_nearest() -> None:
    with pytest.raises(Incompatible) as caught:
        pair_up(shapes(hidden__wieght=3, other=1), shapes(hidden__weight=3, zzz=2))
    text = str(caught.value)
    assert "missing from the source: hidden.weight; did you mean 'hidden.wieght'?, zzz" in text
    assert "unknown to the model: hidden.wieght, other" in text


def test_shapes_that_differ_are_an_error_unless_ignored() -> None:
    source, target = shapes(a=2, head=10), shapes(a=2, head=5)
    for strict in (True, False):
        with pytest.raises(Incompatible, match=r"head: \[10\] in the source, \[5\] in the model"):
            pair_up(source, target, strict=strict)
    assert pair_up(source, target, ignore=["he*"]).names == {"a": "a"}


@pytest.mark.parametrize(
    ("renamings", "ignore", "says"),
    [
        ({"modul.*": "*"}, [], r"map: 'modul\.\*' matches no name"),
        ({}, ["haed"], r"ignore: 'haed' matches no name; did you mean 'head'\?"),
        ({"a": "b"}, [], r"map gives two tensors the name 'b': 'a' and 'b'"),
    ],
)
def test_patterns_that_cannot_be_meant(renamings: dict[str, str], ignore: list[str], says: str) -> None:
    both = shapes(a=2, b=2, head=1)
    with pytest.raises(Incompatible, match=says):
        pair_up(both, both, renamings, ignore)
