"""Read `.ts` files, the text format of the UCR/UEA time-series archive (timeseriesclassification.com).

A header of `@` lines, `@data`, then a series a line: dimensions separated by `:`, values by `,`, and the
class label last where the header has `@classLabel true ...`. `?` and `NaN` are missing values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distdl.data.huggingface import class_label, feature_of, with_features
from distdl.errors import DataError

Series = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TsFile:
    """Series float32 [T, C] (or [T] where there is one channel) and their labels (None: unlabelled)."""

    path: Path
    series: list[Series]
    labels: list[str] | None
    classes: tuple[str, ...]


def read_ts(path: Path) -> TsFile:
    """Raises DataError, naming file and line, for anything that is not whole or has missing values."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    header, start = _header(path, lines)
    classes = _classes(path, header)
    if header.get("timestamps", "false") == "true":
        raise DataError(f"{path} has time stamps, which are not supported; write the values alone")
    series, labels = [], []
    for number, line in enumerate(lines[start:], start + 1):
        if not line.strip():
            continue
        parts = line.strip().split(":")
        where = f"{path}, line {number}"
        if classes:
            labels.append(parts.pop().strip())
            if labels[-1] not in classes:
                raise DataError(f"{where}: class {labels[-1]!r} is not among those named: {list(classes)}")
        series.append(_series(parts, where))
    channels = {s.shape[1:] for s in series}
    if len(channels) > 1:
        raise DataError(f"{path}: the series have different numbers of dimensions: {sorted(channels)}")
    if not series:
        raise DataError(f"{path} holds no series after @data")
    return TsFile(path, series, labels if classes else None, classes)


def ts_schema(files: list[TsFile]) -> pa.Schema:
    """Columns `series` (fixed-size where all lengths agree, in all files) and `label`."""
    shapes = {s.shape for file in files for s in file.series}
    if len({shape[1:] for shape in shapes}) > 1 or len({file.classes for file in files}) > 1:
        raise DataError(f"{', '.join(f.path.name for f in files)} differ in dimensions or classes")
    shape = next(iter(shapes))
    kind: pa.DataType = pa.float32()
    if len(shape) == 2:
        kind = pa.list_(kind, shape[1])
    kind = pa.list_(kind, shape[0]) if len(shapes) == 1 else pa.list_(kind)
    fields, features = [pa.field("series", kind)], {"series": feature_of(kind)}
    if files[0].labels is not None:
        fields.append(pa.field("label", pa.int64()))
        features["label"] = class_label(files[0].classes)
    return with_features(pa.schema(fields), features)


def ts_table(file: TsFile, schema: pa.Schema) -> pa.Table:
    """The rows of `file` in the columns of `ts_schema`."""
    flat = np.concatenate([s.reshape(-1) for s in file.series])
    kind = schema.field("series").type
    values: pa.Array = pa.array(flat)
    if file.series[0].ndim == 2:
        values = pa.FixedSizeListArray.from_arrays(values, file.series[0].shape[1])
    if pa.types.is_fixed_size_list(kind):
        column = pa.FixedSizeListArray.from_arrays(values, kind.list_size)
    else:
        ends = np.cumsum([0] + [len(s) for s in file.series], dtype=np.int64)
        column = pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), values)
    columns = [column]
    if file.labels is not None:
        number = {name: i for i, name in enumerate(file.classes)}
        columns.append(pa.array([number[label] for label in file.labels], pa.int64()))
    return pa.table(columns, schema=schema)


def _header(path: Path, lines: list[str]) -> tuple[dict[str, str], int]:
    found: dict[str, str] = {}
    for number, line in enumerate(lines):
        words = line.strip().split(maxsplit=1)
        if not words or words[0].startswith("#"):
            continue
        if words[0].lower() == "@data":
            return found, number + 1
        if not words[0].startswith("@"):
            break
        found[words[0][1:].lower()] = words[1].strip() if len(words) > 1 else ""
        if words[0].lower() == "@timestamps":
            found["timestamps"] = found["timestamps"].lower()
    raise DataError(f"{path} is not a .ts file: no line '@data' after lines that begin with '@'")


def _classes(path: Path, header: dict[str, str]) -> tuple[str, ...]:
    words = header.get("classlabel", "false").split()
    if not words or words[0].lower() != "true":
        return ()
    if len(words) == 1:
        raise DataError(f"{path}: its @classLabel line names no classes")
    return tuple(words[1:])


def _series(parts: list[str], where: str) -> Series:
    channels: list[Any] = []
    for part in parts:
        try:
            channels.append(np.array(part.split(","), dtype=np.float32))
        except ValueError as error:
            raise DataError(
                f"{where}: {error}; expected numbers separated by commas (a '?' is a missing value: fill it)"
            ) from error
        if not np.isfinite(channels[-1]).all():
            raise DataError(f"{where} has missing or infinite values; fill them in first")
    if len({len(channel) for channel in channels}) != 1:
        raise DataError(f"{where}: its dimensions have lengths {[len(c) for c in channels]}; expected one")
    return np.ascontiguousarray(np.stack(channels, axis=1)) if len(channels) > 1 else channels[0]
