"""What files are that nobody has prepared: their columns, and a fingerprint of a sample of their bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import xxhash

from distdl.data.folders import Splits
from distdl.data.huggingface import array_shape, as_converted, columns_of, fields_of, read_features
from distdl.data.prepare.readers import Source
from distdl.errors import DataError
from distdl.samples import DataInfo

_SAMPLES = 64
_SAMPLE_BYTES = 4096
_TAIL_BYTES = 64 * 1024
"""A Parquet footer, which has the statistics of every column, is read whole up to this size."""


def info_of(source: Source, files: Splits, name: str) -> DataInfo:
    """`describe` for files already found and looked at. Raises DataError for Arrow files whose rows are
    promised one shape and are stored as lists that vary."""
    # Parquet is converted before it is trained on; Arrow files are used as they are.
    if any(piece.format == "arrow" for found in source.splits.values() for piece in found):
        _require_fixed_rows(source.schema, files)
    parquet = any(piece.format == "parquet" for found in source.splits.values() for piece in found)
    return DataInfo(
        name=name,
        rows={split: source.rows(split) for split in source.splits},
        fields=fields_of(as_converted(source.schema) if parquet else source.schema),
        fingerprint=fingerprint(source, files),
    )


def _require_fixed_rows(schema: pa.Schema, files: Splits) -> None:
    """`save_to_disk` stores Array2D .. Array5D as lists of varying length: not gathered as arrays."""
    features, columns = read_features(schema), columns_of(schema)
    for name in schema.names:
        shape = array_shape(features.get(name))
        if shape and None not in shape and name in columns and None in columns[name].shape:
            folder = os.path.commonpath(
                [file.parent.absolute() for found in files.values() for file in found]
            )
            raise DataError(
                f"column {name!r} of {folder} is an array of {' x '.join(map(str, shape))}, and is stored as "
                "lists of varying length, as `datasets` does: it cannot be read by rows of that shape. "
                f"Prepare the folder:  distdl data prepare {folder} --out DIR  and train on DIR."
            )


def fingerprint(source: Source, files: Splits) -> str:
    """A name for the rows, 32 hex digits: of columns, row counts, sizes and evenly spaced bytes of files.

    Where the files lie and what they are called does not enter, and the time to make it does not grow with
    their sizes. An edit that keeps the size of a file and misses all blocks read would go unseen; compressed
    files and their footers change nearly everywhere. `distdl data prepare` hashes every byte.
    """
    whole = xxhash.xxh3_128()
    whole.update(source.schema.remove_metadata().to_string().encode())
    for split in sorted(files):
        whole.update(f"{split}:{len(files[split])}\n".encode())
        for file, piece in zip(files[split], source.splits[split], strict=True):
            whole.update(f"{piece.rows} ".encode())
            whole.update(_sampled(file))
    return whole.hexdigest()


def _sampled(file: Path) -> bytes:
    digest = xxhash.xxh3_128()
    try:
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        step = max((size - _TAIL_BYTES) // _SAMPLES, _SAMPLE_BYTES)
        with file.open("rb") as stream:
            for start in range(0, max(size - _TAIL_BYTES, 0), step):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(size - _TAIL_BYTES, 0))
            digest.update(stream.read())
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
    return digest.digest()
