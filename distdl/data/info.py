"""What a dataset is: rows, fields, and a fingerprint of its contents. Imports neither torch nor datasets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import xxhash

from distdl.data.catalogue import locate, title
from distdl.data.folders import Splits, parquet_splits
from distdl.data.huggingface import array_shape, as_converted, columns_of, fields_of, read_features
from distdl.data.index import INDEX_FILE, Index, read_index
from distdl.data.prepare.draft import TOKENIZER_FILE
from distdl.data.prepare.readers import Source, source_of
from distdl.data.saved import is_saved, saved_splits
from distdl.errors import DataError
from distdl.samples import DataInfo

if TYPE_CHECKING:
    from distdl.data.stream.retry import Patience

_SAMPLES = 64
_SAMPLE_BYTES = 4096
_TAIL_BYTES = 64 * 1024
"""A Parquet footer, which has the statistics of every column, is read whole up to this size."""


def is_url(path: str | Path | None) -> bool:
    """Whether `path` is a URL, whose data are streamed. (A `Path` never is: it folds "//" to "/".)"""
    return isinstance(path, str) and "://" in path


def describe(name: str | None, path: str | Path | None, patience: Patience | None = None) -> DataInfo:
    """Rows and fields of the dataset `name` or `path`; any process may call it. Raises DataError.

    Behind a URL the same is read from there; `patience` says how long its server may be away.
    A prepared dataset costs one small file. Of Parquet the footers are read, of a `save_to_disk` folder the
    heads of the record batches, and of both up to 64 + 16 blocks of 4 kB a file for the fingerprint.
    """
    if name is None and is_url(path):
        from distdl.data.stream.remote_dataset import RemoteDataset

        return RemoteDataset.open(str(path), patience=patience).info
    folder = locate(name, path)
    if (folder / INDEX_FILE).is_file():
        return prepared_info(read_index(folder), folder)
    files = saved_splits(folder) if is_saved(folder) else parquet_splits(folder)
    source = source_of(files, "arrow" if is_saved(folder) else "parquet")
    return info_of(source, files, title(name, path))


def prepared_info(index: Index, folder: Path) -> DataInfo:
    """What the index of the prepared dataset in `folder` says, and how its tokens are read as text."""
    file = folder / TOKENIZER_FILE
    return replace(index.info(), decode=partial(_text_of, file) if file.is_file() else None)


def _text_of(tokenizer: Path, tokens: Sequence[int]) -> str:
    from distdl.data.prepare.tokenize import decode

    return decode(_contents(tokenizer), tokens)


@lru_cache(maxsize=2)
def _contents(file: Path) -> str:
    return file.read_text(encoding="utf-8")


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
