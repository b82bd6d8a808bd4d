"""Which tensor of one state is which of another: renaming by patterns, and what is left over. Pure.

In a pattern `*` stands for any text, a dot included; everything else stands for itself. In a renaming the
nth `*` of the new name is what the nth `*` of the old one stood for: `backbone.*` to `*` takes a prefix off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from distdl.errors import Incompatible, nearest

SHOWN = 8
"""Names that a message lists of each kind."""


class Shaped(Protocol):
    """Anything with a shape: `Meta`, a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Paired:
    """Which source tensor goes where, and all that does not.

    Names are those of the model; `unexpected` are the source's, as they are after renaming.
    """

    names: dict[str, str]
    """The model's name -> the source's own."""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What a person is told, one line a kind; no line for a kind of which there is none."""
        kinds = {
            "not in the source, left as initialised": self.missing,
            "not in the model, left out": self.unexpected,
            "ignored": self.ignored,
        }
        return [f"{what}: {', '.join(names)}" for what, names in kinds.items() if names]


def matches(pattern: str, name: str) -> re.Match[str] | None:
    """Whether `pattern` stands for the whole of `name`, with the texts of its `*` as groups."""
    return re.fullmatch("(.*)".join(map(re.escape, pattern.split("*"))), name, re.DOTALL)


def rename(name: str, renamings: Mapping[str, str]) -> str:
    """The name by the first renaming that matches; unchanged where none does."""
    for old, new in renamings.items():
        if found := matches(old, name):
            texts = iter(found.groups())
            return "".join(next(texts) if part == "*" else part for part in re.split(r"(\*)", new))
    return name


def pair_up(
    source: Mapping[str, Shaped],
    target: Mapping[str, Shaped],
    renamings: Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
    *,
    strict: bool = True,
) -> Paired:
    """Pair the tensors of a source with those of a model, by name after `renamings`.

    What matches one of `ignore` (the model's names) is left as it is in the model. Raises Incompatible where
    two source tensors get one name, where a pattern matches nothing, where shapes differ, and, if `strict`,
    where anything is missing or unexpected; every kind is listed, with the nearest names.
    """
    renamings, ignore = dict(renamings or {}), tuple(ignore)
    by_new = _renamed(source, renamings)
    _require_use({**source}, renamings, "map")
    _require_use({**by_new, **target}, ignore, "ignore")
    ignored = {n for n in {**target, **by_new} if any(matches(p, n) for p in ignore)}
    names = {n: by_new[n] for n in target if n in by_new and n not in ignored}
    missing = tuple(n for n in target if n not in by_new and n not in ignored)
    unexpected = tuple(n for n in by_new if n not in target and n not in ignored)
    shapes = [
        f"{n}: {list(source[of].shape)} in the source, {list(target[n].shape)} in the model"
        for n, of in names.items()
        if tuple(source[of].shape) != tuple(target[n].shape)
    ]
    problems = [f"other shapes: {_shown(shapes)}"] if shapes else []
    if strict:
        problems += _left_over(missing, unexpected)
    if problems:
        raise Incompatible(
            "the weights do not fit the model:\n  " + "\n  ".join(problems) + "\n"
            "Rename with map (old: new; * stands for any text), or leave out with ignore"
        )
    return Paired(names, missing, unexpected, tuple(sorted(ignored)))


def _renamed(source: Iterable[str], renamings: Mapping[str, str]) -> dict[str, str]:
    """New name -> own name."""
    result: dict[str, str] = {}
    for own in source:
        new = rename(own, renamings)
        if new in result:
            raise Incompatible(f"map gives two tensors the name {new!r}: {result[new]!r} and {own!r}")
        result[new] = own
    return result


def _require_use(names: Iterable[str], patterns: Iterable[str], key: str) -> None:
    known = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in known):
            raise Incompatible(
                f"{key}: {pattern!r} matches no name{nearest(pattern, known) or '.'} "
                f"There are {_shown(known)}"
            )


def _left_over(missing: tuple[str, ...], unexpected: tuple[str, ...]) -> list[str]:
    result = []
    if missing:
        named = [f"{n}{nearest(n, unexpected)}" for n in missing]
        result.append(f"missing from the source: {_shown(named)}")
    if unexpected:
        result.append(f"unknown to the model: {_shown(unexpected)}")
    return result


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    more = f", and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
