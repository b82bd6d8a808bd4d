"""Files that are pickles: read only when the user said so, without running code where that will do."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from distdl.errors import CheckpointError, Corrupt

REFUSED = (
    "{path} is a Python pickle ({what}): to load one can run any code that its author put there. Where you "
    "trust it, say --trust-pickle; it is then read with torch's weights_only loader first"
)


def require_trust(path: Path, what: str, trusted: bool) -> None:
    """Raise CheckpointError unless the user said that pickles may be loaded."""
    if not trusted:
        raise CheckpointError(REFUSED.format(path=path, what=what))


def load_pickle(path: Path, what: str, trusted: bool) -> Any:
    """What `torch.save` wrote, on the CPU, tensors mapped from the file where its format allows it.

    With weights_only first; only where that refuses what it finds, as any pickle. Raises CheckpointError
    where pickles are not trusted, and Corrupt where the file cannot be read.
    """
    require_trust(path, what, trusted)
    try:
        return _load(path, weights_only=True)
    except pickle.UnpicklingError:
        pass  # it holds more than tensors and plain values
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise Corrupt(f"{path}: cannot be read: {error}") from error
    try:
        return _load(path, weights_only=False)
    except ImportError as error:
        raise CheckpointError(
            f"{path} holds objects of a library that is not here ({error}): install it to read this file"
        ) from error
    except Exception as error:  # a pickle may raise anything
        raise Corrupt(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def _load(path: Path, *, weights_only: bool) -> Any:
    with path.open("rb") as file:
        mappable = file.read(4) == b"PK\x03\x04"  # torch's zip files; older ones cannot be mapped
    return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mappable or None)
