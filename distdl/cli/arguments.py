"""What several commands are given: the recipe, its overrides, how many processes and machines."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from distdl.recipe import Recipe, load_recipe

Config = Annotated[str, typer.Argument(help="The recipe, a YAML file.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads this at run time on Python 3.10
    typer.Argument(help="Keys to change, such as optim.lr=0.05."),
]
Procs = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Processes on each machine; default: launch.procs, or one a GPU."),
]
NodesAsked = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--nodes",
        metavar="N or MIN:MAX",
        help="Machines, or the fewest and the most of them; default: launch.nodes.",
    ),
]
EngineName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--engine", help="Short for hardware.engine=NAME."),
]
CheckpointPath = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--checkpoint", help="A checkpoint's folder or URL; default: the newest valid one of the run."
    ),
]
AllowChanged = Annotated[
    bool, typer.Option("--allow-changed", help="Go on from a checkpoint of another recipe.")
]


def load(config: str, overrides: list[str] | None, engine: str | None) -> Recipe:
    """The recipe that was typed. Raises RecipeError."""
    return load_recipe(config, overrides_of(overrides, engine))


def overrides_of(overrides: list[str] | None, engine: str | None) -> list[str]:
    """The keys to change, with what is short for one."""
    return [*(overrides or []), *([f"hardware.engine={engine}"] if engine else [])]
