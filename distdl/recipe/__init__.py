"""The recipe of a run: schema, loading and hashing. Does not import torch."""

from distdl.recipe.export import json_schema, to_yaml
from distdl.recipe.hashing import differences, mathematics, recipe_hash
from distdl.recipe.load import load_recipe, parse_recipe
from distdl.recipe.schema import Recipe

__all__ = [
    "Recipe",
    "differences",
    "json_schema",
    "load_recipe",
    "mathematics",
    "parse_recipe",
    "recipe_hash",
    "to_yaml",
]
