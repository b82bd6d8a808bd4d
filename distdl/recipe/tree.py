"""YAML to a tree of plain values in which every value knows the place it was written.

The rules are those of the YAML 1.2 core schema: `1e-3` is a number, `no` and `on` are texts, `0123` is 123,
there are no dates and no merge keys (`extends` does that). Only mappings with text keys, lists, texts,
finite numbers, true, false and null can be written, so that every recipe is also JSON.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from distdl.errors import RecipeError

MAX_DEPTH = 32
MAX_VALUES = 20_000

_TAG = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", "tTfF"),
    ("null", r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z", "-+0123456789"),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    """Safe loading with the implicit types of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML keeps these on the class


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: the same implicit types decide which texts need quotes."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Outside double quotes PyYAML writes NEL, LS and PS as they are, and reads them back as line breaks.
    style = '"' if _BREAKS.search(text) else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_BREAKS = re.compile("[\r\n\x85\u2028\u2029]")
_Dumper.add_representer(str, _represent_text)
for _kind in (_Loader, _Dumper):
    for _name, _pattern, _first in _RESOLVERS:
        _kind.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list(_first))


@dataclass(frozen=True)
class Marked:
    """A value and where it was written. Lists and mappings hold further `Marked`; `plain` takes them out."""

    value: Any
    source: str


def parse_yaml(text: str, source: Callable[[int], str]) -> Marked | None:
    """The one document in `text`, or None if it holds nothing. `source(line)` names a line, counted from 1.

    Raises RecipeError where the text is not YAML, repeats a key, or holds what a recipe cannot.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        parts = [getattr(error, "context", None), getattr(error, "problem", None)]
        what = ", ".join(filter(None, parts)) or " ".join(str(error).split())
        raise RecipeError(f"{source(mark.line + 1 if mark else 1)}: not valid YAML: {what}") from None
    except RecursionError:
        raise RecipeError(f"{source(1)}: not valid YAML: nested too deeply") from None
    return None if node is None else _Builder(source).build(node, node, 0)


class _Builder:
    def __init__(self, source: Callable[[int], str]) -> None:
        self.source = source
        self.values = 0

    def build(self, node: yaml.Node, at: yaml.Node, depth: int) -> Marked:
        """`at` is the node whose line names the value: the key, for values in a mapping."""
        self.values += 1
        # Aliases can make a small file endless (a list that holds itself) or exponentially large.
        if depth > MAX_DEPTH or self.values > MAX_VALUES:
            raise self.problem(at, f"more than {MAX_DEPTH} levels or {MAX_VALUES} values, aliases included")
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return Marked(self.mapping(node, depth), self.where(at))
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return Marked([self.build(item, item, depth + 1) for item in node.value], self.where(at))
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            return Marked(self.scalar(node, kind), self.where(at))
        raise self.problem(
            at,
            f"the tag {node.tag.replace(_TAG, '!!')} is not allowed; "
            "a recipe holds mappings, lists, texts, numbers, true, false and null",
        )

    def mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Marked]:
        result: dict[str, Marked] = {}
        for key, value in node.value:
            if key.tag != _TAG + "str":
                raise self.problem(
                    key, f"the key {key.value!r} is not a text; put it in quotes if it is meant"
                )
            if key.value in result:
                raise self.problem(
                    key, f"the key {key.value!r} was already given at {result[key.value].source}; keep one"
                )
            result[key.value] = self.build(value, key, depth + 1)
        return result

    def scalar(self, node: yaml.ScalarNode, kind: str) -> Any:
        try:
            node.value.encode()
            return _SCALARS[kind](node.value)
        except (ValueError, KeyError):
            what = {"str": "a text in Unicode", "float": "a finite number"}.get(kind, f"of type {kind}")
            raise self.problem(node, f"{node.value[:60]!r} is not {what}") from None

    def where(self, node: yaml.Node) -> str:
        return self.source(node.start_mark.line + 1)

    def problem(self, node: yaml.Node, what: str) -> RecipeError:
        return RecipeError(f"{self.where(node)}: {what}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    "float": _finite,
}


def dump_yaml(value: Any) -> str:
    """`value` (JSON types) as YAML that `parse_yaml` reads back to an equal value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def from_python(value: Any, source: str, key: str = "", depth: int = 0) -> Marked:
    """A Python value (JSON types; tuples count as lists) as a tree. Raises RecipeError for anything else."""
    if depth > MAX_DEPTH:
        raise RecipeError(f"{source}: {key}: more than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise RecipeError(f"{source}: {key or 'the recipe'}: the key {name!r} is not a text")
        return Marked(
            {k: from_python(v, source, f"{key}.{k}".lstrip("."), depth + 1) for k, v in value.items()}, source
        )
    if isinstance(value, list | tuple):
        return Marked([from_python(v, source, f"{key}[{i}]", depth + 1) for i, v in enumerate(value)], source)
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return Marked(value, source)
    raise RecipeError(
        f"{source}: {key} = {value!r}: expected a mapping, list, text, finite number, true, false or null, "
        f"got {type(value).__name__}"
    )


def plain(tree: Marked) -> Any:
    """The values alone."""
    if isinstance(tree.value, dict):
        return {key: plain(item) for key, item in tree.value.items()}
    if isinstance(tree.value, list):
        return [plain(item) for item in tree.value]
    return tree.value


def source_of(tree: Marked, path: Sequence[str]) -> str:
    """Where the value at `path` was written, or the nearest of its parents that was written anywhere."""
    for key in path:
        if not isinstance(tree.value, dict) or key not in tree.value:
            break
        tree = tree.value[key]
    return tree.source
