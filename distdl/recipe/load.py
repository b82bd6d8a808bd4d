"""Reading a recipe: files, `extends`, overrides. Every value keeps its file and line for error messages.

How layers meet. A file that says `extends: other.yaml` (relative to itself) lies over that file, and the
overrides of a command line lie together over the files. Mappings are merged key by key; any other value, a
list too, replaces. Two exceptions, both so that keys which do not belong together never meet:

- A section that chooses something else REPLACES the section below it, with all its keys: `task`, `model`,
  `optim` and `schedule` when `name` changes, `data` when it goes from `name` to `path` or back.
- In `eval`, `checkpoint` and `schedule`, `every_epochs` given above turns off `every_steps` below, and the
  other way round.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distdl.errors import RecipeError, nearest
from distdl.recipe.named import NAMED
from distdl.recipe.problems import explain
from distdl.recipe.schema import Recipe, Run
from distdl.recipe.tree import Marked, from_python, parse_yaml, plain, source_of

EXTENDS = "extends"
_PERIODIC = ("eval", "checkpoint", "schedule")
_SOURCES = ("name", "path", "mixture")
_PERIODS = ("every_epochs", "every_steps")
_SUFFIXES = (".yaml", ".yml")


def load_recipe(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), beneath: Marked | None = None
) -> Recipe:
    """Read the recipe at `path`, with what it extends, and lay `overrides` ("optim.lr=0.05") over it.

    `beneath` is a tree that all of it is laid over, such as the profile of a cluster.
    `run.dir` becomes runs/STEM, for the file's stem, where nothing says otherwise. Reads files, nothing
    else. Raises RecipeError, naming every problem with its file, line, key, value and what is allowed.
    """
    file = Path(path)
    tree = _read_chain(file)
    tree = _with_overrides(tree if beneath is None else merge(beneath, tree), overrides)
    recipe = _validate(tree, str(file))
    if recipe.run.dir is None:
        recipe = recipe.model_copy(update={"run": Run(dir=f"runs/{file.stem}")})
    return recipe


def parse_recipe(mapping: Mapping[str, Any], source: str = "<mapping>") -> Recipe:
    """A recipe from a dict of JSON types, keys as in a file (`{"batch": {"global": 8, "micro": 4}, ...}`).

    `source` stands for the file in error messages. `run.dir` stays null where it is not given. Raises
    RecipeError.
    """
    return _validate(from_python(mapping, source), source)


def _validate(tree: Marked, source: str) -> Recipe:
    given = plain(tree)
    if not isinstance(given, dict):
        raise RecipeError(f"{source}: expected sections such as task, model and data, got {given!r}")
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        text = explain(error, given, lambda path: source_of(tree, path) if path else source)
    raise RecipeError(text)


def _read_chain(file: Path, chain: tuple[Path, ...] = (), told_by: str = "") -> Marked:
    """The file laid over what it extends. `chain` holds the files that extend it, outermost first.

    `told_by` begins the message where the file cannot be read: the place of the `extends` that names it.
    """
    if os.path.realpath(file) in map(os.path.realpath, chain):
        raise RecipeError("extends goes in a circle: " + " -> ".join(map(str, [*chain, file])))
    tree = _read_file(file, told_by)
    sections = dict(tree.value)
    base = sections.pop(EXTENDS, None)
    tree = Marked(sections, tree.source)
    if base is None:
        return tree
    if not isinstance(base.value, str) or not base.value:
        raise RecipeError(f"{base.source}: extends = {plain(base)!r}: expected the path of another recipe")
    parent = Path(os.path.normpath(file.parent / base.value))
    return merge(_read_chain(parent, (*chain, file), f"{base.source}: extends: "), tree)


def _read_file(file: Path, told_by: str) -> Marked:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{told_by}{_absent(file)}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text (byte {error.start}); is it a recipe?") from None
    except OSError as error:
        raise RecipeError(
            f"{told_by}{file}: cannot be read: {error.strerror}; expected a YAML file"
        ) from None
    tree = parse_yaml(text, lambda line: f"{file}:{line}")
    if tree is None:
        raise RecipeError(f"{file}: the file is empty; expected sections such as task, model and data")
    if not isinstance(tree.value, dict):
        got = "a list" if isinstance(tree.value, list) else f"a single value, {tree.value!r}"
        raise RecipeError(f"{tree.source}: expected sections such as task, model and data, got {got}")
    return Marked(tree.value, str(file))


def _absent(file: Path) -> str:
    """There is no such file: say what is there."""
    try:
        there = sorted(name for name in os.listdir(file.parent) if name.endswith(_SUFFIXES))
    except OSError as error:
        return f"{file}: no such file; its folder {file.parent}: {error.strerror}"
    hint = nearest(file.name, there)
    if not hint:
        hint = f"; recipes there: {', '.join(there[:8])}" if there else "; no *.yaml there"
    return f"{file}: no such file{hint}"


def _with_overrides(tree: Marked, overrides: Sequence[str]) -> Marked:
    """All overrides make one layer, so that their order decides only between two of the same key."""
    layer: dict[str, Marked] = {}
    for text in overrides:
        path, value = _parse_override(text)
        _put(layer, path, value)
    return merge(tree, Marked(layer, tree.source))


def _parse_override(text: str) -> tuple[list[str], Marked]:
    source = f"override {text}"
    key, equals, written = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise RecipeError(f"{source}: expected section.key=value, such as optim.lr=0.05")
    if path == [EXTENDS]:
        raise RecipeError(f"{source}: extends can be said in a recipe file only")
    value = parse_yaml(written, lambda line: source)
    return path, value or Marked(None, source)


def _put(layer: dict[str, Marked], path: Sequence[str], value: Marked) -> None:
    for key in path[:-1]:
        if key not in layer or not isinstance(layer[key].value, dict):
            layer[key] = Marked({}, value.source)
        layer = layer[key].value
    layer[path[-1]] = value


def merge(below: Marked, above: Marked, path: tuple[str, ...] = ()) -> Marked:
    """`above` laid over `below`, by the rules at the top of this file. Neither is changed."""
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    if len(path) == 1 and _chooses_anew(path[0], below.value, above.value):
        return Marked(above.value, f"{above.source} (replaces {below.source})")
    merged = dict(below.value)
    if len(path) == 1 and path[0] in _PERIODIC:
        for off in _turned_off(above.value):
            merged.pop(off, None)
    for key, value in above.value.items():
        merged[key] = merge(merged[key], value, (*path, key)) if key in merged else value
    return Marked(merged, below.source)


def _chooses_anew(section: str, below: Mapping[str, Marked], above: Mapping[str, Marked]) -> bool:
    if section in NAMED:
        return "name" in above and "name" in below and above["name"].value != below["name"].value
    if section == "data":
        before, now = _says(below, *_SOURCES), _says(above, *_SOURCES)
        return len(before) == len(now) == 1 and before != now
    return False


def _turned_off(above: Mapping[str, Marked]) -> list[str]:
    periods = _says(above, *_PERIODS)
    return [key for key in _PERIODS if key not in periods] if len(periods) == 1 else []


def _says(mapping: Mapping[str, Marked], *keys: str) -> list[str]:
    """Those of `keys` that have a value other than null."""
    return [key for key in keys if key in mapping and mapping[key].value is not None]
