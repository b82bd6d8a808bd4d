"""What a built-in task can be told is what a recipe can tell it: no key is missing, none is idle."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from distdl import tasks
from distdl.recipe.named import IMPORT_PATH, NAMED

OFFERED = {"make_model", "data_info"}
"""What a task is given besides its keys."""


def keys_of(factory: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(factory).parameters) - OFFERED


@pytest.mark.parametrize("name", tasks.BUILT_IN)
def test_keys_of_a_task(name: str) -> None:
    assert keys_of(tasks.BUILT_IN[name]) == set(NAMED["task"][name].model_fields) - {"name"}


def test_every_task_has_a_section() -> None:
    assert set(NAMED["task"]) - {IMPORT_PATH} == set(tasks.BUILT_IN)
