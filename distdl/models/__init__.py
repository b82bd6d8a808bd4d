"""Models by name. A model knows shapes, never tasks; its keys in the recipe are its arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from distdl.errors import RecipeError
from distdl.imports import call_with_known, import_attribute
from distdl.models.cnn5 import Cnn5

ModelFactory = Callable[..., nn.Module]
"""Called by a task as ``factory(in_channels=..., num_outputs=..., input_shape=...)``."""


def _cnn5(in_channels: int, num_outputs: int, input_shape: tuple[int, ...], **keys: Any) -> nn.Module:
    return Cnn5(in_channels, num_outputs, **keys)


BUILT_IN: dict[str, ModelFactory] = {"cnn5": _cnn5}


def model_factory(name: str, keys: dict[str, Any]) -> ModelFactory:
    """The factory that recipe section `model` names, with its keys bound.

    A user's factory ("package.module:attribute") is given those of `in_channels`, `num_outputs` and
    `input_shape` that it has parameters for. Raises RecipeError when it cannot be imported or called.
    """
    if name in BUILT_IN:
        return partial(BUILT_IN[name], **keys)
    factory = import_attribute(name, "model.name")

    def build(**offered: Any) -> nn.Module:
        try:
            model = call_with_known(factory, offered, keys)
        except TypeError as error:
            raise RecipeError(
                f"model.name = {name!r}: calling it with {sorted(keys)} of the recipe failed: {error}. "
                "Its parameters are the keys of section `model`, plus any of in_channels, num_outputs, "
                "input_shape"
            ) from error
        if not isinstance(model, nn.Module):
            raise RecipeError(
                f"model.name = {name!r} returned a {type(model).__name__}: expected a torch.nn.Module"
            )
        return model

    return build
