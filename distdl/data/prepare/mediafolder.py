"""Folders of images or sounds as rows that name the file, decoded later by the workers.

Either CLASS/file, whose folder is its class, or files beside a `metadata.csv` or `metadata.jsonl`, which has
their names in `file_name` and whatever is known of each in other columns (as the image and audio folders of
`datasets` do).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from distdl.data.folders import Splits
from distdl.data.huggingface import class_label, feature_of, with_features
from distdl.data.prepare.sound import SOUNDS
from distdl.errors import DataError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
METADATA = ("metadata.csv", "metadata.jsonl")
SPLITS = ("train", "test", "validation", "valid", "val", "dev")
FILE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
_ROWS = 10_000


def class_tables(splits: Splits) -> tuple[pa.Schema, dict[str, Iterator[pa.Table]]]:
    """Columns `image` or `audio` (struct<bytes, path>, only the path filled in) and `label`, the folder of a
    file. Classes are the sorted folder names of all splits together.
    """
    names = sorted({file.parent.name for files in splits.values() for file in files})
    column, feature = medium([file for files in splits.values() for file in files])
    schema = pa.schema([pa.field(column, FILE), pa.field("label", pa.int64())])
    schema = with_features(schema, {column: feature, "label": class_label(names)})
    number = {name: i for i, name in enumerate(names)}

    def tables(files: list[Path]) -> Iterator[pa.Table]:
        for start in range(0, len(files), _ROWS):
            part = files[start : start + _ROWS]
            labels = pa.array([number[f.parent.name] for f in part], pa.int64())
            yield pa.table([paths(part), labels], schema=schema)

    return schema, {split: tables(files) for split, files in splits.items()}


def find_described(folder: Path) -> Splits:
    """SPLIT/metadata.csv (or .jsonl), or one in `folder` itself, which is all "train" unless all its files
    lie in folders called as splits are; of each split the metadata, and the files named in it. Raises
    DataError.
    """
    found: Splits = {}
    for name in METADATA:
        for file in [folder / name, *sorted(folder.glob(f"[!.]*/{name}"))]:
            if not file.is_file() or not _describes(file):
                continue
            for split, named in _by_split(file, _named(file, _read(file)), file.parent == folder).items():
                if split in found:
                    raise DataError(f"split {split!r} has {found[split][0]} and {file}; keep one of them")
                found[split] = [file, *named]
    for other in sorted(folder.glob("[!.]*/")) if found else ():
        if other.is_dir() and other.name not in found and "train" not in found and _has_media(other):
            raise DataError(f"{other} holds images or sounds and has no metadata, which other splits have")
    return found


def _describes(file: Path) -> bool:
    """Whether it is about files; a table of another kind is left to who reads tables. Raises DataError where
    it lies among images or sounds and does not name them.
    """
    media = _has_media(file.parent)
    try:
        columns = _read(file).column_names
    except DataError:
        if media:
            raise
        return False
    if media and "file_name" not in columns:
        raise DataError(
            f"{file} lies among images or sounds, and has no column file_name with their names; it has "
            f"{', '.join(columns)}"
        )
    return "file_name" in columns


def _has_media(folder: Path) -> bool:
    return any(file.suffix.lower() in (*IMAGES, *SOUNDS) for file in folder.rglob("*"))


def _by_split(file: Path, paths: list[Path], root: bool) -> Splits:
    if not root:
        return {file.parent.name: paths}
    first = [path.relative_to(file.parent).parts[0] for path in paths]
    if not set(first) <= set(SPLITS):
        return {"train": paths}
    splits: Splits = {}
    for split, path in zip(first, paths, strict=True):
        splits.setdefault(split, []).append(path)
    return splits


def described_tables(splits: Splits) -> tuple[pa.Schema, dict[str, Iterator[pa.Table]]]:
    """Columns `image` or `audio`, and those of the metadata; what CSV has is text."""
    column, feature = medium([file for files in splits.values() for file in files[1:]])
    known: dict[str, pa.Table] = {}
    kinds: dict[str, pa.DataType] = {}
    for split, (file, *files) in splits.items():
        table = _read(file)
        chosen = set(files)
        mine = pa.array([path in chosen for path in _named(file, table)])
        known[split] = table.filter(mine).drop_columns(["file_name"])
        if column in known[split].column_names:
            raise DataError(f"{file} has a column {column!r}, which the files themselves are; rename it")
        for field in known[split].schema:
            if pa.types.is_null(kinds.get(field.name, pa.null())):
                kinds[field.name] = field.type
    features = {column: feature} | {name: feature_of(kind) for name, kind in kinds.items()}
    schema = with_features(pa.schema({column: FILE, **kinds}), features)
    tables = {}
    for split, (file, *files) in splits.items():
        columns = [paths(files), *(_as(known[split], name, kind, file) for name, kind in kinds.items())]
        tables[split] = iter([pa.table(columns, schema=schema)])
    return schema, tables


def _as(table: pa.Table, name: str, kind: pa.DataType, file: Path) -> pa.Array:
    """Nulls where this split does not have the column: whoever keeps it is told of the first."""
    if name not in table.column_names:
        return pa.nulls(table.num_rows, kind)
    own = table.column(name).type
    try:
        if pa.types.is_boolean(kind) != pa.types.is_boolean(own) and not pa.types.is_null(own):
            raise pa.ArrowInvalid(f"it is {own}")  # 2 would become true
        return table.column(name).cast(kind)
    except pa.ArrowException as error:
        raise DataError(f"{file}, column {name!r}: {error}; it is {kind} in another split") from error


def medium(files: list[Path]) -> tuple[str, Any]:
    """(column, feature) of files that are all images, or all sounds. Raises DataError for both."""
    sounds = [file for file in files if file.suffix.lower() in SOUNDS]
    if sounds and len(sounds) < len(files):
        other = next(file for file in files if file.suffix.lower() not in SOUNDS)
        raise DataError(f"{sounds[0]} is a sound and {other} is none; a dataset has one kind of files")
    return ("audio", {"_type": "Audio"}) if sounds else ("image", {"_type": "Image"})


def paths(files: list[Path]) -> pa.Array:
    """A column of encoded files, of which only the paths are there."""
    return pa.array([{"bytes": None, "path": str(f.absolute())} for f in files], FILE)


def _read(file: Path) -> pa.Table:
    try:
        if file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8").splitlines()
            # Not Arrow's reader, which makes times of text that looks like one.
            rows = [json.loads(line) for line in lines if line.strip()]
            names = dict.fromkeys(name for row in rows for name in row)
            return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
        with pyarrow.csv.open_csv(file) as head:
            text = dict.fromkeys(head.schema.names, pa.string())  # "0042" is no number
        options = pyarrow.csv.ConvertOptions(column_types=text, strings_can_be_null=False)
        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        return pyarrow.csv.read_csv(file, convert_options=options, parse_options=parse)
    except (pa.ArrowException, UnicodeDecodeError, ValueError, AttributeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _named(file: Path, table: pa.Table) -> list[Path]:
    if table.column_names.count("file_name") != 1:
        raise DataError(f"{file} has two columns file_name")
    names = table.column("file_name")
    if not len(names) or not pa.types.is_string(names.type) or names.null_count:
        raise DataError(f"{file} needs a name in file_name in every row; it has {table.num_rows} rows")
    found = []
    for name in names.to_pylist():
        # By its words alone: a file may be a link to wherever a cache keeps it.
        path = Path(os.path.normpath(name))
        if path.is_absolute() or path.parts[:1] == ("..",):
            raise DataError(f"{file} names {name!r}, which lies outside its folder")
        if path.suffix.lower() not in (*IMAGES, *SOUNDS):
            raise DataError(f"{file} names {name!r}; expected one of {', '.join((*IMAGES, *SOUNDS))}")
        path = file.parent / path
        if not _is_file(path):
            raise DataError(f"{file} names {name!r}, and there is no such file beside it")
        found.append(path)
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        return False
