"""Which files a dataset is made of: a catalogue name or a folder -> the Parquet files of each split."""

from __future__ import annotations

import re
from pathlib import Path

from distdl.errors import DataError, nearest

_EMBEDDED = Path(__file__).resolve().parent / "embedded"

CATALOGUE: dict[str, Path] = {"fashion_mnist": _EMBEDDED / "fashion_mnist"}
"""Datasets that need no download: name -> folder of Parquet files inside this package."""

_PATTERNS = "train*.parquet, test*.parquet or SPLIT-00000-of-0000N.parquet, there or in its sub-folder data/"
_SHARD = re.compile(r"(?P<split>\w+)-(?P<number>\d{5})-of-(?P<total>\d{5})(-[0-9a-f]+)?")
_SPLIT = re.compile(r"\w+")
_USUAL = re.compile(r"(?P<split>train|validation|test)(?![a-z]).*")

Sources = dict[str, list[Path]]
"""Split -> its Parquet files, in the order of their rows."""


def sources(name: str | None, path: str | Path | None) -> Sources:
    """The Parquet files of the dataset `name` (a catalogue name) or `path` (a folder); give exactly one.

    A folder's files belong to the split that their name begins with, as on the Hugging Face hub
    (`train-00000-of-00002.parquet`); any other name is itself a split. Raises DataError.
    """
    if (name is None) == (path is None):
        raise DataError(
            f"data.name is {name!r} and data.path is {path and str(path)!r}; give exactly one of them"
        )
    if path is not None:
        return _folder_sources(Path(path).expanduser())
    assert name is not None
    if name not in CATALOGUE:
        raise DataError(
            f"data.name is {name!r}, which is no known dataset{nearest(name, CATALOGUE) or '.'} "
            f"Known names: {', '.join(sorted(CATALOGUE))}. For files of your own, give data.path: a folder "
            f"with {_PATTERNS}."
        )
    return _folder_sources(CATALOGUE[name])


def title(name: str | None, path: str | Path | None) -> str:
    """What to call the dataset: its catalogue name, or the last part of its path."""
    return name or Path(path or "").expanduser().resolve().name


def _folder_sources(folder: Path) -> Sources:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"the data folder {folder} {what}; expected a folder with {_PATTERNS}")
    try:
        files = _parquet_files(folder) or _parquet_files(folder / "data")
    except OSError as error:
        raise DataError(f"cannot list the data folder {folder}: {error.strerror or error}") from error
    if not files:
        names = sorted(p.name for p in folder.iterdir())[:8]
        raise DataError(
            f"no Parquet files in {folder}: looked for {_PATTERNS}; found {', '.join(names) or 'nothing'}"
        )
    found: Sources = {}
    for file in files:
        found.setdefault(_split_of(file), []).append(file)
    for split, members in found.items():
        _check_shards(split, members)
    return found


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("*.parquet") if not f.name.startswith("."))


def _split_of(file: Path) -> str:
    match = _SHARD.fullmatch(file.stem) or _USUAL.fullmatch(file.stem)
    split = match["split"] if match else file.stem
    if not _SPLIT.fullmatch(split):
        raise DataError(
            f"the name of {file} gives no split: {split!r} holds more than letters, digits and '_'. "
            f"Expected {_PATTERNS}; rename the file or move it away."
        )
    return split


def _check_shards(split: str, files: list[Path]) -> None:
    """A download that stopped half-way leaves complete files, but not all of them."""
    shards = [m for m in (_SHARD.fullmatch(f.stem) for f in files) if m]
    present = sorted(int(m["number"]) for m in shards)
    totals = sorted({int(m["total"]) for m in shards})
    if not shards or (len(shards) == len(files) and present == list(range(totals[0])) and len(totals) == 1):
        return
    missing = sorted(set(range(totals[-1])) - set(present))
    problem = f"shards {missing[:8]} are missing" if missing else "files of several writings are mixed"
    raise DataError(
        f"split {split!r} in {files[0].parent} is not complete: its file names promise {totals[-1]} shards, "
        f"and {problem}. Found {', '.join(f.name for f in files[:8])}."
    )
