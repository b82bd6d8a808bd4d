"""Section `init`: what it takes, and that it is mathematics only where it names something."""

from __future__ import annotations

from pathlib import Path

import pytest

from distdl.errors import RecipeError
from distdl.recipe import Recipe, differences, load_recipe, mathematics, recipe_hash

BASE = Path(__file__).resolve().parents[3] / "configs" / "fashion_cnn.yaml"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(BASE, overrides)


def test_without_a_path_it_leaves_the_hash_as_it_was() -> None:
    assert "init" not in mathematics(recipe())
    assert recipe_hash(recipe("init.strict=false")) == recipe_hash(recipe())


def test_with_one_every_key_enters_the_hash() -> None:
    given = ["init.from=a"]
    changes = ["init.from=b", "init.strict=false", "init.ignore=[x]", "init.map={x: y}"]
    assert len({recipe_hash(recipe(*given, change)) for change in ["init.from=a", *changes]}) == 5
    before, after = mathematics(recipe(*given)), mathematics(recipe("init.from=b"))
    assert differences(before, after) == ['init.from: "a" -> "b"']


def test_a_star_needs_a_star_to_stand_for() -> None:
    assert recipe("init.map={'a.*.b': 'c.*', 'd.*': e}").init.map == {"a.*.b": "c.*", "d.*": "e"}
    with pytest.raises(RecipeError, match=r"map 'a': 'b\.\*' has more \* than"):
        recipe("init.map={a: 'b.*'}")
