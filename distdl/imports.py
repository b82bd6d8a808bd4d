"""Names that are not distdl words: ``package.module:attribute``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

from distdl.errors import RecipeError, nearest


def import_attribute(path: str, key: str) -> Any:
    """Import what `path` ("package.module:attribute") names; the current folder is searched too.

    `key` is the recipe key that said it, for the message. Raises RecipeError when it cannot be imported.
    """
    module_name, _, attribute = path.partition(":")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"{key} = {path!r}: importing {module_name!r} failed with {type(error).__name__}: {error}. "
            f"Expected package.module:attribute, importable from {Path.cwd()} or installed"
        ) from error
    try:
        return attrgetter(attribute)(module)
    except AttributeError:
        hint = nearest(attribute, [n for n in dir(module) if not n.startswith("_")])
        raise RecipeError(
            f"{key} = {path!r}: module {module_name!r} has no attribute {attribute!r}{hint}"
        ) from None


def call_with_known(
    factory: Callable[..., Any], offered: dict[str, Any], asked: dict[str, Any], *, into_any: bool = False
) -> Any:
    """Call a user's factory with the keys of the recipe and those of `offered` that it has a name for.

    `into_any`: all of `offered` where it has a ``**`` for any name. That of a model is not given them: the
    factories of torchvision and timm hand their ``**kwargs`` on to networks that know other words.
    """
    parameters = inspect.signature(factory).parameters.values()
    takes_any = into_any and any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    return factory(**{k: v for k, v in offered.items() if takes_any or k in names} | asked)
