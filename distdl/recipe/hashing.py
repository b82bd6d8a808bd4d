"""Which recipes compute the same: the mathematics of a recipe, its hash, and what differs between two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from distdl.recipe.schema import Recipe

NOT_MATHEMATICS = frozenset({"hardware", "launch", "checkpoint", "run", "track"})
_LATER = {"translation": ("source_vocabulary", "target_vocabulary"), "transcription": ("vocabulary",)}
"""Keys of tasks that came after runs of them: at null they are left out, so that those runs go on."""
_ABSENT = "(absent)"


def mathematics(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that fixes what is computed, as JSON types with every default written out.

    Left out: where and how it runs, `data.path` and the names in `data.mixture`: where the data lie is not
    mathematics (a checkpoint records the fingerprint of the data themselves). Left out too is an `init` that
    names nothing to begin with.
    """
    exclude: dict[str, Any] = dict.fromkeys(NOT_MATHEMATICS, True)
    exclude["data"] = {"path"}
    if recipe.init.from_ is None:
        exclude["init"] = True
    result: dict[str, Any] = _positive_zeros(recipe.model_dump(mode="json", by_alias=True, exclude=exclude))
    for key in _LATER.get(recipe.task.name, ()):
        if result["task"].get(key) is None:
            result["task"].pop(key, None)
    if recipe.data.mixture is not None:
        result["data"]["mixture"] = list(recipe.data.mixture.values())
    return result


def recipe_hash(recipe: Recipe) -> str:
    """16 hexadecimal digits that name the mathematics of a recipe (SHA-256 of its canonical JSON)."""
    return hashlib.sha256(_canonical(mathematics(recipe)).encode()).hexdigest()[:16]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What changes from `a` to `b`, two results of `mathematics`, such as ["optim.lr: 0.1 -> 0.05"].

    Empty exactly if their hashes are equal. Values are written as JSON.
    """
    before, after = dict(_leaves(a)), dict(_leaves(b))
    return [
        f"{'.'.join(path)}: {before.get(path, _ABSENT)} -> {after.get(path, _ABSENT)}"
        for path in {**before, **after}
        if before.get(path) != after.get(path)
    ]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        # As text: Python finds 1, 1.0 and True equal, but they are not the same to a model that gets them.
        yield path, _canonical(value)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _positive_zeros(value: Any) -> Any:
    """Turn -0.0 into 0.0: they are equal, so recipes that hold them must have equal hashes."""
    if isinstance(value, dict):
        return {key: _positive_zeros(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_positive_zeros(item) for item in value]
    return value + 0.0 if isinstance(value, float) else value
