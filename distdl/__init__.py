"""distdl: write a training run once; run it anywhere, through any failure, and get the same run.

Importing this package does not import torch, so that `distdl plan` works on a login node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distdl.version import __version__

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from distdl.train.own_loop import Run

__all__ = ["__version__", "open_run"]


def open_run(
    config: str | os.PathLike[str], overrides: Sequence[str] = (), *, allow_changed: bool = False
) -> Run:
    """Open the run of a recipe for a loop of your own; every rank calls it. Blocks until all have.

    The model, data and engine are the recipe's; it goes on from the newest checkpoint if there is one.
    `overrides` as on the command line: "optim.lr=0.05". Use it in a `with` statement, or call `Run.close`.

    Raises what `distdl train` ends with, on all ranks together: RecipeError, PlanError, DataError,
    CheckpointError, EnvironmentProblem.
    """
    from distdl.train.own_loop import open_run as opened

    return opened(config, overrides, allow_changed=allow_changed)
