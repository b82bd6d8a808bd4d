"""What a dataset is, read from its Parquet footers: rows, fields, classes and a fingerprint of its bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from distdl.data.catalogue import Sources, sources, title
from distdl.errors import DataError
from distdl.plan import DataInfo, Field

_CHUNK_BYTES = 4 * 2**20


class _Footer(NamedTuple):
    rows: int
    schema: pa.Schema


def describe(name: str | None, path: str | Path | None) -> DataInfo:
    """Rows and fields of the dataset `name` or `path`. Imports neither torch nor datasets.

    The fields are those of the training split, or of the first split where none is called "train".
    Reads every byte once, for the fingerprint. Raises DataError.
    """
    return describe_sources(sources(name, path), title(name, path))


def describe_sources(files: Sources, name: str) -> DataInfo:
    """`describe` for files already found."""
    footers = {split: [_read_footer(f) for f in members] for split, members in files.items()}
    for split, members in files.items():
        _check_same_columns(members, footers[split])
    first = "train" if "train" in footers else sorted(footers)[0]
    return DataInfo(
        name=name,
        rows={split: sum(footer.rows for footer in found) for split, found in footers.items()},
        fields=fields(footers[first][0].schema),
        fingerprint=fingerprint(files),
    )


def fields(schema: pa.Schema) -> dict[str, Field]:
    """The columns of an Arrow schema. Fixed-size lists, nested to any depth, become the shape of a row."""
    features = _features(schema)
    found = {}
    for column in schema:
        shape, leaf = unnest(column.type)
        found[column.name] = Field(str(leaf), shape, _num_classes(features.get(column.name)))
    return found


def unnest(kind: pa.DataType) -> tuple[tuple[int, ...], pa.DataType]:
    """(row shape, element type): (28, 28), uint8 for 28 fixed-size lists of 28 uint8."""
    shape: list[int] = []
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    return tuple(shape), kind


def fingerprint(files: Sources) -> str:
    """A name for the rows: 32 hex digits, from the split names and the bytes of their files in order.

    Where the files lie and what they are called does not enter.
    """
    whole = xxhash.xxh3_128()
    for split in sorted(files):
        whole.update(f"{split}:{len(files[split])}\n".encode())
        for file in files[split]:
            whole.update(_file_hash(file))
    return whole.hexdigest()


def _file_hash(file: Path) -> bytes:
    digest = xxhash.xxh3_128()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
    return digest.digest()


def _read_footer(file: Path) -> _Footer:
    try:
        with pq.ParquetFile(file) as opened:
            return _Footer(opened.metadata.num_rows, opened.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {file} as Parquet: {error}. The file is damaged, cut short or not Parquet; "
            "fetch or write it again."
        ) from error


def _check_same_columns(files: list[Path], footers: list[_Footer]) -> None:
    expected = footers[0].schema
    for file, footer in zip(files, footers, strict=True):
        if not footer.schema.equals(expected):
            raise DataError(
                f"{file.name} has columns {_columns(footer.schema)}, and {files[0].name} beside it has "
                f"{_columns(expected)}; all files of a split need the same"
            )


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{column.name}: {column.type}" for column in schema)


def _num_classes(feature: Any) -> int | None:
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
        return len(feature["names"])
    return None


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    """The columns' Hugging Face features, which name the classes; empty where the writer left none."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        return dict(json.loads(text)["info"]["features"]) if text else {}
    except (ValueError, KeyError, TypeError):
        return {}
