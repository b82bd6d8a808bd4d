"""What tasks on text ask of a dataset: which columns are tokens, and how many different ones there are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from distdl.errors import DataError, RecipeError
from distdl.samples import DataInfo


def token_columns(data: DataInfo) -> list[str]:
    """The columns of integers of varying length."""
    return [n for n, f in data.fields.items() if f.shape == (None,) and "int" in f.dtype]


def check_tokens(
    values: npt.NDArray[np.integer], column: str, vocabulary: int, key: str = "vocabulary"
) -> None:
    """Raises DataError for a token that the vocabulary does not have: an embedding has no row for it."""
    if values.size and not 0 <= values.min() <= values.max() < vocabulary:
        raise DataError(
            f"column {column!r} has tokens from {values.min()} to {values.max()}, and a vocabulary of "
            f"{vocabulary}, 0 to {vocabulary - 1}: raise task.{key} to {values.max() + 1} or more, or "
            "prepare the data anew"
        )


def vocabulary_of(data: DataInfo, column: str, given: int | None, key: str = "vocabulary") -> int:
    """How many different tokens `column` has: as the dataset says, or `given` (by key `key` of the task).

    Raises DataError where neither says so, RecipeError where `given` is too small.
    """
    said = data.fields[column].vocabulary
    if given is None and said is None:
        raise DataError(
            f"dataset {data.name!r} does not say how many different tokens column {column!r} has: `distdl "
            f"data prepare --tokenize` writes it down; for tokens from elsewhere, give task.{key} (the "
            "largest id plus one)"
        )
    if given is not None and said is not None and given < said:
        raise RecipeError(
            f"task.{key} = {given}: column {column!r} of dataset {data.name!r} has {said} different "
            f"tokens; give {said} or more, or leave the key out"
        )
    return given or said or 0
