"""Which checkpoints are kept, and how the others go. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from distdl.checkpoint.folders import Place, child
from distdl.checkpoint.manifest import Manifest, step_name
from distdl.checkpoint.read import inspect
from distdl.errors import Corrupt, Incompatible, Incomplete

if TYPE_CHECKING:
    from distdl.checkpoint.store import Store


@dataclass(frozen=True)
class Keep:
    """What is kept: the newest `last`, and whatever any of the others names.

    `best`: so many of the best by the evaluation at their own step. `every_steps`: steps divisible by it.
    `every_s`: from the oldest on, each that is at least so many seconds younger than the one kept before it.
    """

    last: int = 3
    best: int = 0
    every_steps: int | None = None
    every_s: float | None = None

    def __post_init__(self) -> None:
        if self.last < 1 or self.best < 0:
            raise ValueError(f"keep is {self.last} and {self.best} best; expected at least 1 and 0")


@dataclass(frozen=True)
class Known:
    """What retention looks at. `score`: larger is better; None: there was no evaluation at that step."""

    whole: bool = True
    saved_at: float | None = None
    score: float | None = None


def to_remove(known: Mapping[int, Known], keep: Keep, just_saved: int) -> list[int]:
    """Steps to remove. Pure.

    Kept are the one just saved, which counts as one of the newest `keep.last`, and what else `keep` names, of
    whole ones alone. A damaged one goes only once `keep.last` whole ones are kept and all are newer: until
    then a person may want to look at it.
    """
    whole = {s: k for s, k in known.items() if k.whole}
    newest = {just_saved, *sorted(whole.keys() - {just_saved}, reverse=True)[: keep.last - 1]}
    kept = newest | _best(whole, keep.best) | _spaced(whole, keep.every_s)
    if keep.every_steps is not None:
        kept |= {s for s in whole if s % keep.every_steps == 0}
    damaged = known.keys() - whole.keys() - {just_saved}
    old_damaged = {s for s in damaged if len(newest) == keep.last and s < min(newest)}
    return sorted((whole.keys() - kept) | old_damaged)


def _best(whole: Mapping[int, Known], count: int) -> set[int]:
    """Of equally good ones the newer."""
    scores = {s: k.score for s, k in whole.items() if k.score is not None and not math.isnan(k.score)}
    return set(sorted(scores, key=lambda s: (scores[s], s), reverse=True)[:count])


def _spaced(whole: Mapping[int, Known], seconds: float | None) -> set[int]:
    """From the oldest on, so that what was kept once is kept at every later look."""
    kept: set[int] = set()
    if seconds is None:
        return kept
    last = -math.inf
    times = {s: k.saved_at for s, k in whole.items() if k.saved_at is not None}
    for step in sorted(times, key=lambda s: (times[s], s)):
        if times[step] - last >= seconds:
            kept.add(step)
            last = times[step]
    return kept


def known_of(manifest: Manifest, metric: tuple[str, str] | None = None) -> Known:
    """What a manifest tells retention. `metric`: the name and mode that count. None: any."""
    score = None
    found = manifest.metric
    if found is not None and (metric is None or metric == (found.name, found.mode)):
        score = found.value if found.mode == "max" else -found.value
    return Known(True, _seconds(manifest.saved_at), score)


def _seconds(saved_at: str) -> float | None:
    try:
        moment = datetime.fromisoformat(saved_at)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def look(store: Store, metric: tuple[str, str] | None = None) -> dict[int, Known]:
    """What there is in `store`, by step. Checkpoints of a newer distdl are left out, and so left alone.

    Whole means here that the manifest is right and the files have their sizes: hashing every checkpoint again
    at each save would cost more than the save.
    """
    known = {}
    for step in store.steps():
        try:
            known[step] = known_of(inspect(child(store.place, step_name(step)), hashes=False), metric)
        except (Incomplete, Corrupt):  # noqa: PERF203 (a directory takes far longer than a try)
            known[step] = Known(whole=False)
        except Incompatible:
            pass
    return known


def prune(store: Store, keep: Keep, just_saved: int, metric: tuple[str, str] | None = None) -> list[Place]:
    """Remove what `to_remove` names; returns where they were. One process calls it, after a commit.

    Raises OSError, and what the store's library raises.
    """
    steps = to_remove(look(store, metric), keep, just_saved)
    for step in steps:
        store.remove(step)
    return [child(store.place, step_name(step)) for step in steps]
