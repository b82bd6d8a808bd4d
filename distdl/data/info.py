"""What a dataset is: rows, fields, and a fingerprint of its contents. A prepared one says so itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from distdl.data.catalogue import is_embedded, locate, title
from distdl.data.folders import parquet_splits
from distdl.data.index import INDEX_FILE, TOKENIZER_FILE, Index, read_index
from distdl.data.saved import is_saved, saved_splits
from distdl.samples import DataInfo, Field

if TYPE_CHECKING:
    from distdl.data.stream.retry import Patience


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
    if is_embedded(folder) and folder.with_suffix(".json").is_file():
        return _described(folder)
    from distdl.data.files_info import info_of
    from distdl.data.prepare.readers import source_of

    files = saved_splits(folder) if is_saved(folder) else parquet_splits(folder)
    source = source_of(files, "arrow" if is_saved(folder) else "parquet")
    return info_of(source, files, title(name, path))


def _described(folder: Path) -> DataInfo:
    """What is said beside a folder of Parquet files that comes with this package, and so does not change."""
    said = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    fields = {
        name: Field(**f | {"shape": tuple(f["shape"]), "classes": tuple(f["classes"])})
        for name, f in said.pop("fields").items()
    }
    return DataInfo(name=folder.name, fields=fields, **said)


def prepared_info(index: Index, folder: Path) -> DataInfo:
    """What the index of the prepared dataset in `folder` says, and how its tokens are read as text."""
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        return index.info()
    return replace(index.info(), decode=partial(_text_of, file), unknown=partial(_unknown_of, file))


def _text_of(tokenizer: Path, tokens: Sequence[int]) -> str:
    from distdl.data.prepare.tokenize import decode

    return decode(_contents(tokenizer), tokens)


def _unknown_of(tokenizer: Path) -> int | None:
    from distdl.data.prepare.tokenize import unknown

    return unknown(_contents(tokenizer))


@lru_cache(maxsize=2)
def _contents(file: Path) -> str:
    return file.read_text(encoding="utf-8")
