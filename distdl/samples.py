"""What a dataset is to the plan, and which of its rows an epoch visits, in which order. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distdl.errors import DataError, PlanError, RecipeError, nearest

if TYPE_CHECKING:
    from distdl.recipe import Recipe
    from distdl.recipe.schema import Data

PACKED = ("packed", "lanes")
"""The orders whose rows are documents end to end, cut into one length."""


@dataclass(frozen=True)
class Field:
    """One column of a dataset: element type and shape of one row (None: varies); `num_classes` and
    the names of the `classes` for labels.

    `vocabulary`: how many different token ids there are, from 0, in a column of tokens. `meaning`: what its
    numbers mean beyond that, where it is known: a hash of the tokenizer, the bands of sound.
    """

    dtype: str
    shape: tuple[int | None, ...] = ()
    num_classes: int | None = None
    vocabulary: int | None = None
    classes: tuple[str, ...] = field(default=(), compare=False)
    meaning: str = field(default="", compare=False)


@dataclass(frozen=True)
class DataInfo:
    """What the plan and the model need to know about a dataset, read from its index alone.

    `elements`: split -> sequence column -> how many elements all its rows have, where an index says so.
    `remote`: its shards are fetched while it is read. Where the dataset has its tokenizer, `decode` makes
    text of token ids, and `unknown` says which id stands for words that it does not know (None: none).
    """

    name: str
    rows: Mapping[str, int]
    fields: Mapping[str, Field]
    fingerprint: str
    elements: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    remote: bool = False
    decode: Callable[[Sequence[int]], str] | None = field(default=None, compare=False)
    unknown: Callable[[], int | None] | None = field(default=None, compare=False)


def order_of(recipe: Recipe, data: DataInfo) -> str:
    """The kind of order, as `distdl.data.make_order` calls it, or "packed". DataError for weights of a
    mixture that are not a distribution.
    """
    wanted = recipe.data
    if wanted.mixture:
        check_weights(list(wanted.mixture.values()), len(wanted.mixture))
    kind = "weighted" if wanted.mixture is not None else wanted.order
    if not wanted.shuffle and kind in ("full", "block"):
        kind = "sequential"
    if data.remote and kind not in ("block", "sequential"):
        raise PlanError(
            f"data.order = {kind!r} would fetch shards of {data.name!r} again and again, in any order: use "
            "data.order=block, which reads a few at a time, or copy the folder here first with the store's "
            "own tool, or prepare it locally (`distdl data prepare`)"
        )
    return kind


def check_weights(weights: Sequence[float], parts: int) -> None:
    """Raises DataError unless there is a weight above 0 for each of `parts` datasets, and they sum to 1."""
    shown = ", ".join(f"{weight:g}" for weight in weights)
    if not parts or len(weights) != parts:
        raise DataError(
            f"a mixture of {parts} datasets needs as many weights; {len(weights)} given: [{shown}]"
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(
                f"the weights [{shown}] of the mixture are not a distribution: {weight:g} is not above 0. "
                "Give each dataset a positive share, and leave out those that should have none."
            )
    total = math.fsum(weights)
    if abs(total - 1) > 1e-6:
        normalised = ", ".join(f"{weight / total:.7g}" for weight in weights)
        raise DataError(
            f"the weights [{shown}] of the mixture sum to {total:.7g}, not to 1. "
            f"In the same proportions: [{normalised}]."
        )


def sequence_column(recipe: Recipe, data: DataInfo) -> str | None:
    """The column that `data.sequence` names, or the only one of varying length; None where there is none.

    One of a single length will do for augmentation, and has to be named. Raises DataError where the column
    is needed and not there, or not the only one; RecipeError for an order whose rows the task cannot read.
    """
    given = recipe.data.sequence
    if recipe.data.order in PACKED and ":" not in recipe.task.name != "language_modelling":
        raise RecipeError(
            f"data.order = {recipe.data.order!r} puts rows end to end and cuts them into one length, and "
            f"task.name = {recipe.task.name!r} reads each row for itself: leave data.order out, or set it to "
            "length_bucketed. language_modelling reads such rows, and a task of one's own may"
        )
    by_length = recipe.data.order in ("length_bucketed", *PACKED)
    found = [name for name, f in data.fields.items() if f.shape[:1] == (None,)]
    if given is not None:
        able = found if by_length else [name for name, f in data.fields.items() if f.shape]
        if given not in able:
            varying = " of varying length" if by_length else ""
            raise DataError(
                f"data.sequence = {given!r}: dataset {data.name!r} has no such column of sequences{varying}"
                f"{nearest(given, able) or '.'} It has {', '.join(able) or 'none'}."
            )
        return given
    if len(found) == 1:
        return found[0]
    if by_length:
        what = f"several ({', '.join(found)}): name one in data.sequence" if found else "none"
        raise DataError(
            f"data.order = {recipe.data.order!r} needs a column of varying length, and dataset {data.name!r} "
            f"has {what}"
        )
    return None


def packed_rows(elements: int, length: int) -> int:
    """Rows of `length` targets that a stream of `elements` tokens gives; its first token is no target."""
    return -(-max(elements - 1, 0) // length)


def pack_length(data: Data, split: str) -> int:
    """Targets in one packed row of `split`: those that are evaluated alone may be longer."""
    assert data.pack_length is not None, "the recipe says how long"
    return data.pack_length if split == data.train_split else data.eval_pack_length or data.pack_length


def samples_of(recipe: Recipe, data: DataInfo, order: str, sequence: str | None, which: str) -> int:
    """Samples of one epoch of training, or of the evaluation."""
    split, key = getattr(recipe.data, which), f"data.{which}"
    rows = _rows(data, split, key)
    if order == "weighted" and which == "train_split":
        return recipe.data.epoch_rows or rows
    if order not in PACKED:
        return rows
    assert sequence is not None
    elements = data.elements.get(split, {}).get(sequence)
    if elements is None:
        raise DataError(
            f"data.order = {order!r} needs to know how many tokens {data.name!r} has, and only a prepared "
            "dataset says so: run `distdl data prepare` on it"
        )
    packed = packed_rows(elements, pack_length(recipe.data, split))
    if not packed:
        raise DataError(f"{key} = {split!r}: column {sequence!r} has {elements} tokens; two are the least")
    return packed


def _rows(data: DataInfo, split: str, key: str) -> int:
    if split not in data.rows:
        raise DataError(
            f"{key} = {split!r}: dataset {data.name!r} has no such split; it has {', '.join(data.rows)}"
        )
    if data.rows[split] == 0:
        raise DataError(f"{key} = {split!r}: this split of dataset {data.name!r} is empty")
    return data.rows[split]
