"""Folders of images or sounds as rows that name the file, decoded later by the workers.

Either CLASS/file, whose folder is its class, or files beside a `metadata.csv` or `metadata.jsonl`, which has
their names in `file_name` and whatever is known of each in other columns (as the image and audio folders of
`datasets` do).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from distdl.data.folders import Splits
from distdl.data.huggingface import class_label, feature_of, with_features
from distdl.data.prepare.sound import SOUNDS
from distdl.errors import DataError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
METADATA = ("metadata.csv", "metadata.jsonl")
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
    """SPLIT/metadata.csv (or .jsonl), or one in `folder` itself, which is all "train"; and the files named
    in it, after it. Raises DataError.
    """
    found: Splits = {}
    for name in METADATA:
        for file in [folder / name, *sorted(folder.glob(f"*/{name}"))]:
            if file.is_file():
                split = "train" if file.parent == folder else file.parent.name
                if split in found:
                    raise DataError(f"split {split!r} has {found[split][0]} and {file}; keep one of them")
                found[split] = [file]
    for files in found.values():
        files.extend(_named(files[0], _read(files[0])))
    return found


def described_tables(splits: Splits) -> tuple[pa.Schema, dict[str, Iterator[pa.Table]]]:
    """Columns `image` or `audio`, and those of the metadata; what CSV has is text."""
    column, feature = medium([file for files in splits.values() for file in files[1:]])
    tables: dict[str, Iterator[pa.Table]] = {}
    schema: pa.Schema | None = None
    for split, (file, *files) in splits.items():
        known = _read(file).drop_columns(["file_name"])
        if column in known.column_names:
            raise DataError(f"{file} has a column {column!r}, which the files themselves are; rename it")
        features = {column: feature} | {f.name: feature_of(f.type) for f in known.schema}
        mine = with_features(pa.schema([pa.field(column, FILE), *known.schema]), features)
        if schema is not None and not mine.equals(schema):
            raise DataError(
                f"{file} has columns {known.column_names}, and another split "
                f"{[n for n in schema.names if n != column]}, or of another type; make them alike"
            )
        schema = mine
        tables[split] = iter([pa.table([paths(files), *known.columns], schema=schema)])
    assert schema is not None, "called where there is metadata"
    return schema, tables


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
            table = pyarrow.json.read_json(file)
        else:
            with pyarrow.csv.open_csv(file) as head:
                text = dict.fromkeys(head.schema.names, pa.string())  # "0042" is no number
            options = pyarrow.csv.ConvertOptions(column_types=text, strings_can_be_null=False)
            parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
            table = pyarrow.csv.read_csv(file, convert_options=options, parse_options=parse)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: {error}") from error
    names = table.column("file_name") if "file_name" in table.column_names else None
    if names is None or not len(names) or not pa.types.is_string(names.type) or names.null_count:
        raise DataError(
            f"{file} needs a column file_name with a name in every row; it has "
            f"{', '.join(table.column_names)} and {table.num_rows} rows"
        )
    return table


def _named(file: Path, table: pa.Table) -> list[Path]:
    folder, found = file.parent.resolve(), []
    for name in table.column("file_name").to_pylist():
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise DataError(f"{file} names {name!r}, which lies outside its folder")
        if path.suffix.lower() not in (*IMAGES, *SOUNDS):
            raise DataError(f"{file} names {name!r}; expected one of {', '.join((*IMAGES, *SOUNDS))}")
        if not path.is_file():
            raise DataError(f"{file} names {name!r}, and there is no such file beside it")
        found.append(path)
    return found
