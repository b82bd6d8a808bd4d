"""What pydantic found wrong with a recipe, as text for a person: place, key, value, what is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from distdl.errors import nearest
from distdl.recipe.named import IMPORT_PATH, NAMED
from distdl.recipe.schema import Recipe

MAX_PROBLEMS = 8
_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}

Path = tuple[str, ...]
Where = Callable[[Sequence[str]], str]


def explain(error: ValidationError, given: Mapping[str, Any], where: Where) -> str:
    """One line for each problem, at most `MAX_PROBLEMS`. `where(path)` names the place of a key."""
    texts: dict[Path, str] = {}
    for item in error.errors(include_url=False):
        path, owner = _locate(item["loc"])
        # A key that may be one of several types is reported once for each of them; say it once. A range
        # says more than the type that did not fit either, but both are described in the same words.
        texts.setdefault(path, _describe_problem(str(item["type"]), item["msg"], path, owner, given))
    lines = [f"{where(_to_blame(path, given))}: {text}" for path, text in texts.items()]
    if len(lines) == 1:
        return lines[0]
    rest = [f"  and {len(lines) - MAX_PROBLEMS} more"] if len(lines) > MAX_PROBLEMS else []
    head = f"{where(())}: {len(lines)} problems"
    return "\n".join([head, *(f"  {line}" for line in lines[:MAX_PROBLEMS]), *rest])


def _locate(loc: Sequence[str | int]) -> tuple[Path, type[BaseModel] | None]:
    """Take union tags out of an error's location; also the model class that holds the last key of it."""
    rest = [str(part) for part in loc]
    path: list[str] = []
    inside: type[BaseModel] | None = Recipe
    owner = inside
    while rest and inside is not None:
        owner, key = inside, rest.pop(0)
        path.append(key)
        if owner is Recipe and key in NAMED:
            inside = NAMED[key].get(rest.pop(0)) if rest else None
        else:
            inside = _nested(owner, key)
    return tuple(path), owner


def _to_blame(path: Path, given: Mapping[str, Any]) -> Path:
    """A section that as a whole is wrong because of its name is blamed on the line of the name."""
    section = _value(given, path)
    wrong_name = len(path) == 1 and path[0] in NAMED and isinstance(section, dict)
    return (*path, "name") if wrong_name else path


def _describe_problem(
    kind: str, message: str, path: Path, owner: type[BaseModel] | None, given: Mapping[str, Any]
) -> str:
    value = _value(given, path)
    dotted = ".".join(path)
    if kind == "recipe":
        return f"{dotted}: {message}"
    if kind.startswith("union_tag"):
        return _unnamed(path[0], value)
    if kind == "string_pattern_mismatch":
        return f"{dotted} = {show(value)}: not an import path; write package.module:attribute"
    if owner is None or not path:
        return f"{dotted or 'the recipe'}: {message}"
    if kind == "extra_forbidden":
        allowed = f"allowed: {_listed(keys(owner))}"
        return f"{dotted} = {show(value)}: unknown key{_joined(_hint(path, owner), allowed)}"
    if kind == "missing" and value is None:  # with a value, it is an item of a list that is missing
        return _missing(path, owner)
    said = "out of range; expected" if kind in _RANGE else "expected"
    return f"{dotted} = {show(value)}: {said} {_expected(path, owner)}"


def _missing(path: Path, owner: type[BaseModel]) -> str:
    if owner is Recipe:
        return f"missing required section {path[0]!r}: {_expected(path, owner)}"
    return f"{'.'.join(path[:-1])}: missing required key {path[-1]!r}: {_expected(path, owner)}"


def _unnamed(section: str, value: Any) -> str:
    """A section that chooses by name, without a name that is known."""
    if not isinstance(value, dict):
        return f"{section} = {show(value)}: expected {_expected((section,), Recipe)}"
    names = [name for name in NAMED[section] if name != IMPORT_PATH]
    known = f"known: {_listed(names)}"
    if IMPORT_PATH in NAMED[section]:
        article = "an" if section[0] in "aeiou" else "a"
        known += f"; for {article} {section} of your own give its import path, package.module:attribute"
    if "name" not in value:
        return f"{section}: missing required key 'name'; {known}"
    name = value["name"]
    hint = nearest(name, names) if isinstance(name, str) else ""
    return f"{section}.name = {show(name)}: unknown {section}{_joined(hint, known)}"


def _hint(path: Path, owner: type[BaseModel]) -> str:
    """Who has that key: others that the section could name, or another section; else keys spelt nearly so."""
    section, key = path[0], path[-1]
    others = [name for name, model in NAMED.get(section, {}).items() if len(path) == 2 and key in keys(model)]
    if others:
        return f"; a key of {section}.name = {' or '.join(others)}"
    homes = list(dict.fromkeys(f"{section}.{key}" for section, model in _sections() if key in keys(model)))
    if homes:
        return "; did you mean " + " or ".join(repr(home) for home in homes[:3]) + "?"
    return nearest(key, keys(owner))


def _expected(path: Path, owner: type[BaseModel]) -> str:
    key = path[-1]
    if owner is Recipe and key in NAMED:
        names = [name if name != IMPORT_PATH else "or an import path" for name in NAMED[key]]
        return f"a mapping with a name ({_listed(names)}) and its options"
    model = _nested(owner, key)
    if model is not None:
        return f"a mapping (keys: {_listed(keys(model))})"
    return describe(_properties(owner)[key])


def describe(schema: Mapping[str, Any]) -> str:
    """What a key may be, in words, from its JSON Schema."""
    if "anyOf" in schema:
        return " or ".join(describe(option) for option in schema["anyOf"])
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    kind = schema.get("type")
    if kind == "object":
        if schema.get("additionalProperties") is True:
            return "a mapping"
        return f"a mapping of names, each to {describe(schema['additionalProperties'])}"
    if kind == "array" and "items" in schema:
        return f"a list, each {describe(schema['items'])}"
    if kind == "array":
        return f"a list of {schema['minItems']}, each {describe(schema['prefixItems'][0])}"
    names = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    text = names.get(str(kind), "a text that is not empty" if schema.get("minLength") else "a text")
    return " ".join([text, " and ".join(_bounds(schema))]).strip()


def _bounds(schema: Mapping[str, Any]) -> Iterator[str]:
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "greater than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    for key, word in words.items():
        if key in schema:
            yield f"{word} {schema[key]}"


def show(value: Any) -> str:
    """A value in one short line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def keys(model: type[BaseModel]) -> list[str]:
    """The keys of a section as they are written in a recipe."""
    return [field.alias or name for name, field in model.model_fields.items()]


@cache
def _properties(model: type[BaseModel]) -> dict[str, Any]:
    properties: dict[str, Any] = model.model_json_schema(by_alias=True)["properties"]
    return properties


def _nested(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The class of a key that is itself a section."""
    field = model.model_fields.get(key)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section's name and class; one of several classes for those that choose by name."""
    for key in Recipe.model_fields:
        model = _nested(Recipe, key)
        for found in [model] if model else NAMED[key].values():
            yield key, found


def _value(given: Any, path: Path) -> Any:
    for key in path:
        given = given.get(key) if isinstance(given, Mapping) else None
    return given


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


def _joined(hint: str, rest: str) -> str:
    """A question mark at the end of a hint stands for the semicolon."""
    return f"{hint} {rest}" if hint.endswith("?") else f"{hint}; {rest}"
