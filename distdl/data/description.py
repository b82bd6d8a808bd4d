"""What the data of a recipe are, from indexes alone: what a plan needs, on a login node too.

Imports neither numpy nor pyarrow until a dataset is met that says less about itself than a prepared one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from distdl.data.catalogue import data_folder
from distdl.data.index import TOKENIZER_FILE
from distdl.data.info import describe, is_url
from distdl.errors import DataError
from distdl.samples import DataInfo, Field

if TYPE_CHECKING:
    from distdl.data.stream.remote_rows import Access
    from distdl.recipe.schema import Data, Recipe


def describe_data(data: Data, access: Access | None = None) -> DataInfo:
    """What the plan needs to know of what `data` names. Imports no torch; reads indexes alone. DataError."""
    patience = access.patience if access is not None else None
    parts = [describe(name, path, patience) for name, path in named(data)]
    for source, part in zip(data.mixture or (), parts, strict=False):
        if data.train_split not in part.rows:
            raise DataError(
                f"data.mixture: {source} has no split {data.train_split!r} to train on; it has "
                f"{', '.join(sorted(part.rows))}"
            )
    return merge([narrowed(part, data) for part in parts], list(data.mixture or ()))


def narrowed(info: DataInfo, data: Data) -> DataInfo:
    """Only the columns that the recipe reads."""
    if data.columns is None:
        return info
    from distdl.data.table.arrow import choose

    names = choose(list(info.fields), data.columns, info.name)
    return replace(info, fields={name: info.fields[name] for name in names})


def access_of(
    recipe: Recipe,
    notice: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Access | None:
    """How the recipe says that remote data are read; None where it names none.

    `notice` hears why the data are waited for, `stopped` ends a wait: see `Patience`.
    """
    if not any(is_url(path) for _, path in named(recipe.data)):
        return None
    from distdl.data.stream.remote_rows import Access
    from distdl.data.stream.retry import Patience

    patience = Patience(recipe.hardware.retry_s)
    if notice is not None:
        patience = replace(patience, notice=notice)
    if stopped is not None:
        patience = replace(patience, stopped=stopped)
    return Access(recipe.hardware.cache_bytes, patience)


def named(data: Data) -> list[tuple[str | None, str | None]]:
    """(catalogue name, path) of each dataset that `data` names, one of the two None."""
    if data.mixture is None:
        return [(data.name, data.path)]
    return [(None, one) if is_path(one) else (one, None) for one in data.mixture]


def is_path(source: str) -> bool:
    """A mixture's key is a path where it exists, is a URL or has a separator and is not in `$DISTDL_DATA`."""
    if "://" in source or Path(source).expanduser().exists():
        return True
    return "/" in source and not (data_folder(os.environ) / source).exists()


def from_anywhere(data: Data) -> Data:
    """The same data by absolute paths; URLs and catalogue names stand as they are."""

    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().absolute())

    mixture = data.mixture and {absolute(s) if is_path(s) else s: w for s, w in data.mixture.items()}
    return data.model_copy(update={"path": data.path and absolute(data.path), "mixture": mixture})


def merge(parts: Sequence[DataInfo], sources: Sequence[str] = ()) -> DataInfo:
    """Several datasets as one; `sources` is what the recipe calls them. DataError where columns differ."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        raise DataError("data.mixture names no dataset; give each with its share, such as {a: 0.5, b: 0.5}")
    first = parts[0]
    for source, other in zip(sources[1:], parts[1:], strict=True):
        _check_same(first, other, sources[0], source)
    splits = sorted({split for part in parts for split in part.rows})
    whole = xxhash.xxh3_128(" ".join(part.fingerprint for part in parts).encode())
    return DataInfo(
        name=" + ".join(part.name for part in parts),
        rows={split: sum(part.rows.get(split, 0) for part in parts) for split in splits},
        fields=first.fields,
        fingerprint=whole.hexdigest(),
        remote=any(part.remote for part in parts),
    )


def _check_same(first: DataInfo, other: DataInfo, here: str, there: str) -> None:
    for name in sorted({*first.fields, *other.fields}):
        a, b = _words(first.fields, name), _words(other.fields, name)
        if a != b:
            raise DataError(
                f"data.mixture: column {name!r} is {a} in {here} and {b} in {there}; the "
                "datasets of a mixture need the same columns: prepare them with --columns, --rename"
            )
        if a != "missing":
            _check_meaning(name, first.fields[name], other.fields[name], here, there)


def _check_meaning(column: str, first: Field, other: Field, here: str, there: str) -> None:
    """Numbers alike may mean different classes, words or frequencies. Raises DataError."""
    if first.classes and other.classes and first.classes != other.classes:
        at = next(i for i, (a, b) in enumerate(zip(first.classes, other.classes, strict=True)) if a != b)
        raise DataError(
            f"data.mixture: column {column!r} calls class {at} {first.classes[at]!r} in {here} and "
            f"{other.classes[at]!r} in {there}: prepare them from files with the same classes in one order"
        )
    if first.meaning and other.meaning and first.meaning != other.meaning:
        cure = (
            f"--tokenizer and the {TOKENIZER_FILE} of {here}"
            if first.vocabulary
            else "the same --sample-rate"
        )
        raise DataError(
            f"data.mixture: the numbers of column {column!r} mean other things in {here} ({first.meaning}) "
            f"and in {there} ({other.meaning}): prepare {there} anew, with {cure}"
        )


def _words(fields: Mapping[str, Field], name: str) -> str:
    found = fields.get(name)
    if found is None:
        return "missing"
    shape = "".join(f"[{'varying' if n is None else n}]" for n in found.shape)
    tokens = f" of {found.vocabulary} tokens" if found.vocabulary else ""
    classes = f" of {found.num_classes} classes" if found.num_classes else ""
    return f"{found.dtype}{shape}{classes}{tokens}"
