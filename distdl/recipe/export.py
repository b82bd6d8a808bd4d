"""A recipe written out again, and the JSON Schema of all recipes."""

from __future__ import annotations

from typing import Any

from distdl.recipe.hashing import recipe_hash
from distdl.recipe.schema import Recipe
from distdl.recipe.tree import dump_yaml

_PARTIAL = "Partial"


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, under a comment with its hash.

    It loads back to an equal recipe (a `run.dir` of null excepted: loading fills it in).
    """
    body = dump_yaml(recipe.model_dump(mode="json", by_alias=True))
    return f"# resolved recipe; hash of its mathematics: {recipe_hash(recipe)}\n{body}"


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of recipe files, for editors.

    A file that extends another may leave out whatever that one says, so required keys are required only
    of files that do not say `extends`.
    """
    whole = Recipe.model_json_schema(by_alias=True)
    definitions = whole.pop("$defs")
    whole["properties"]["extends"] = {
        "type": "string",
        "minLength": 1,
        "description": "Another recipe, relative to this file. What is said here is laid over it.",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "distdl recipe",
        "type": "object",
        "if": {"required": ["extends"]},
        "then": _relaxed(whole),
        "else": whole,
        "$defs": definitions | {name + _PARTIAL: _relaxed(d) for name, d in definitions.items()},
    }


def _relaxed(schema: Any) -> Any:
    """The same without required keys. Without them several options of a `oneOf` may fit: `anyOf`."""
    if isinstance(schema, list):
        return [_relaxed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, item in schema.items():
        if key == "$ref":
            result[key] = item + _PARTIAL
        elif key == "properties":
            result[key] = {name: _relaxed(option) for name, option in item.items()}
        elif key != "required":
            result["anyOf" if key == "oneOf" else key] = _relaxed(item)
    return result
