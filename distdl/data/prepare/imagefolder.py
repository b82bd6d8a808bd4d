"""Image folders: CLASS/image files as rows that name the file, decoded later by the workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from distdl.data.folders import Splits
from distdl.data.huggingface import class_label, with_features

_ROWS = 10_000


def image_tables(splits: Splits) -> tuple[pa.Schema, dict[str, Iterator[pa.Table]]]:
    """Columns `image` (struct<bytes, path>, only the path filled in) and `label`, the folder of an image.

    Classes are the sorted folder names of all splits together.
    """
    names = sorted({file.parent.name for files in splits.values() for file in files})
    image = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    schema = pa.schema([pa.field("image", image), pa.field("label", pa.int64())])
    schema = with_features(schema, {"image": {"_type": "Image"}, "label": class_label(names)})
    return schema, {split: _tables(files, names, schema) for split, files in splits.items()}


def _tables(files: list[Path], names: list[str], schema: pa.Schema) -> Iterator[pa.Table]:
    number = {name: i for i, name in enumerate(names)}
    for start in range(0, len(files), _ROWS):
        part = files[start : start + _ROWS]
        images = pa.array([{"bytes": None, "path": str(f.absolute())} for f in part], schema.field(0).type)
        labels = pa.array([number[f.parent.name] for f in part], pa.int64())
        yield pa.table([images, labels], schema=schema)
