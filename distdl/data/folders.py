"""Which split each file of a folder belongs to, by its name, as on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from distdl.errors import DataError

_SHARD = re.compile(r"(?P<split>\w+)-(?P<number>\d{5})-of-(?P<total>\d{5})(-[0-9a-f]+)?")
_SPLIT = re.compile(r"\w+")
_USUAL = re.compile(r"(?P<split>train|validation|test)(?![a-z]).*")

Splits = dict[str, list[Path]]
"""Split -> its files, in the order of their rows."""


def patterns(suffix: str = ".parquet") -> str:
    """The names that are understood, for a person."""
    return f"train*{suffix}, test*{suffix} or SPLIT-00000-of-0000N{suffix}, there or in its sub-folder data/"


def parquet_splits(folder: Path) -> Splits:
    """The Parquet files in `folder` or its sub-folder data/. Raises DataError where there are none."""
    found = split_files(folder, (".parquet",))
    if not found:
        names = sorted(p.name for p in folder.iterdir())[:8]
        raise DataError(
            f"no Parquet files in {folder}: looked for {patterns()}; found {', '.join(names) or 'nothing'}. "
            "Other formats are prepared first:  distdl data prepare FOLDER --out DIR"
        )
    return found


def split_files(folder: Path, suffixes: tuple[str, ...]) -> Splits:
    """The files of these `suffixes` in `folder`, else in `folder`/data, by split; may be empty.

    A file belongs to the split that its name begins with (`train-00000-of-00002.parquet`); any other name is
    itself a split. Raises DataError for names that give no split and for shards that are missing.
    """
    try:
        files = files_in(folder, suffixes) or files_in(folder / "data", suffixes)
    except OSError as error:
        raise DataError(f"cannot list the data folder {folder}: {error.strerror or error}") from error
    found: Splits = {}
    for file in files:
        found.setdefault(split_of(file), []).append(file)
    for split, members in found.items():
        _check_shards(split, members)
    return found


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of `folder` (not below it) whose name ends with one of `suffixes`, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.name.endswith(suffixes) and not f.name.startswith("."))


def is_litter(part: str) -> bool:
    """What tools leave in folders, and is no class: .ipynb_checkpoints, __MACOSX."""
    return part.startswith(".") or part == "__MACOSX"


def split_of(file: Path) -> str:
    """The split that a file's name gives. Raises DataError where it gives none."""
    stem = _stem(file)
    match = _SHARD.fullmatch(stem) or _USUAL.fullmatch(stem)
    split = match["split"] if match else stem
    if not _SPLIT.fullmatch(split):
        raise DataError(
            f"the name of {file} gives no split: {split!r} holds more than letters, digits and '_'. "
            f"Expected {patterns(file.name.removeprefix(stem))}; rename the file or move it away."
        )
    return split


def _stem(file: Path) -> str:
    """The name without its suffix, which is two where the file is compressed: .csv.gz."""
    return Path(file.name.removesuffix(".gz")).stem


def _check_shards(split: str, files: list[Path]) -> None:
    """A download that stopped half-way leaves complete files, but not all of them."""
    shards = [m for m in (_SHARD.fullmatch(_stem(f)) for f in files) if m]
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
