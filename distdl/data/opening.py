"""From a dataset's name or path to files that can be mapped into memory: what training opens."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distdl.data.catalogue import locate, title
from distdl.data.files_info import info_of
from distdl.data.folders import parquet_splits
from distdl.data.huggingface import columns_of
from distdl.data.index import INDEX_FILE, Column, Index, SplitFiles, read_index, resolve
from distdl.data.info import is_url, prepared_info
from distdl.data.prepare.options import Options
from distdl.data.prepare.readers import source_of
from distdl.data.prepare.run import prepare
from distdl.data.saved import is_saved, saved_splits
from distdl.data.table.arrow import ArrowTable
from distdl.errors import DataError, nearest
from distdl.samples import DataInfo

if TYPE_CHECKING:
    from distdl.data.stream.remote_rows import Access, Remote, RemoteRows

_log = logging.getLogger(__name__)

_WORTH_A_WORD = 64 * 2**20

CACHE_VARIABLE = "DISTDL_CACHE"


@dataclass(frozen=True)
class Ready:
    """A dataset whose splits are Arrow files. `index` is None for a folder that distdl did not prepare.

    With `remote`, it is behind a URL, and `folder` only a name; its shards are fetched while they are read.
    """

    info: DataInfo
    folder: Path
    index: Index | None
    in_place: Mapping[str, SplitFiles]
    remote: Remote | None = None

    def split(self, name: str) -> SplitFiles:
        """The files of one split. Raises DataError where it does not exist or is empty, and, naming it, for
        a local file that is missing or has another size than the index says.

        Of a remote dataset `files` are URLs, and the offsets are fetched only where they are asked for
        (`Remote.offsets`)."""
        if self.remote is not None:
            shards = self.remote.dataset.shards(name)
            return SplitFiles([shard.url for shard in shards], [shard.rows for shard in shards], {})
        if name not in self.info.rows:
            raise DataError(
                f"dataset {self.info.name!r} has no split {name!r}{nearest(name, self.info.rows) or '.'} "
                f"Its splits: {', '.join(sorted(self.info.rows))}."
            )
        if not self.info.rows[name]:
            raise DataError(f"split {name!r} of {self.folder} has no rows")
        if self.index is None:
            return self.in_place[name]
        split = self.index.splits[name]
        folder = self.folder.absolute()
        stored = [s for s in split.shards if s.rows]
        for part in (*stored, *split.offsets.values()):
            _check_size(resolve(folder, part.file), part.bytes, self.folder)
        return SplitFiles(
            files=[resolve(folder, shard.file) for shard in stored],
            rows=[shard.rows for shard in stored],
            offsets={column: Path(resolve(folder, o.file)) for column, o in split.offsets.items()},
        )


def ready(name: str | None, path: str | Path | None, access: Access | None = None) -> Ready:
    """Open the dataset `name` or `path`. Any process may call it, alone.

    A prepared dataset and a `save_to_disk` folder are used where they are; what is behind a URL is streamed,
    as `access` says, and blocks while its server does not answer. Local Parquet is turned into a prepared
    dataset once, in the cache; processes that need it at the same moment wait for the one that does it.
    Raises DataError, also for a full disk; EnvironmentProblem for a cache that cannot be written.
    """
    if name is None and is_url(path):
        from distdl.data.stream.remote_rows import Remote

        remote = Remote.open(str(path), access)
        return Ready(remote.dataset.info, Path(remote.dataset.info.name), remote.dataset.index, {}, remote)
    folder = locate(name, path)
    if (folder / INDEX_FILE).is_file():
        index = read_index(folder)
        return Ready(prepared_info(index, folder), folder, index, {})
    if is_saved(folder):
        files = saved_splits(folder)
        source = source_of(files, "arrow")
        in_place = {
            split: SplitFiles([str(Path(p.path).absolute()) for p in found], [p.rows for p in found], {})
            for split, found in source.splits.items()
        }
        return Ready(info_of(source, files, title(name, path)), folder, None, in_place)
    files = parquet_splits(folder)
    info = info_of(source_of(files, "parquet"), files, title(name, path))
    cached = cache_folder(os.environ) / "datasets" / info.fingerprint
    if not (cached / INDEX_FILE).is_file():
        if sum(file.stat().st_size for found in files.values() for file in found) > _WORTH_A_WORD:
            _log.warning("preparing %s once, in %s: this takes a while", folder, cached)
        options = Options(decode=False, workers=1, wait=True, name=info.name)
        prepare(str(folder), cached, options, source=source_of(files, "parquet"))
    return Ready(info, cached, _cached_index(cached, info), {})


def cache_folder(environ: Mapping[str, str]) -> Path:
    """The folder for everything that can be made again: `$DISTDL_CACHE`, or ~/.cache/distdl."""
    given = environ.get(CACHE_VARIABLE)
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "distdl"


def _cached_index(folder: Path, info: DataInfo) -> Index:
    index = read_index(folder)
    rows = {split: found.rows for split, found in index.splits.items()}
    if rows != dict(info.rows):
        raise DataError(
            f"the prepared dataset {folder} has rows {rows}, and its source {dict(info.rows)}. Delete that "
            "folder, and it is prepared again."
        )
    return index


def _check_size(path: str, expected: int, folder: Path) -> None:
    if "://" in path:
        return
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise DataError(
            f"{folder / INDEX_FILE} names {path}, which cannot be read: {error.strerror or error}. "
            f"`distdl data verify {folder}` lists all that is wrong; prepare the dataset again."
        ) from error
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes, and {folder / INDEX_FILE} says {expected}. `distdl data verify "
            f"{folder}` lists all that is wrong; prepare the dataset again."
        )


def open_split(ready: Ready, split: str, columns: Sequence[str] | None = None) -> ArrowTable | RemoteRows:
    """Map one split of a dataset that is ready, only the `columns` named (None: all).

    Of a remote one nothing is fetched yet; close it. Raises DataError for a split or column that does not
    exist or cannot be gathered, for damaged files, and for an index with other columns than its shards have.
    """
    if ready.remote is not None:
        return ready.remote.rows(split, columns)
    found = ready.split(split)
    table = ArrowTable(found.files, found.rows, columns)
    if ready.index is not None:
        _check_columns(columns_of(table.stored_schema), ready.index.columns, found.files[0])
    return table


def _check_columns(stored: Mapping[str, Column], said: Mapping[str, Column], file: str) -> None:
    """Names of classes are compared where the index has some: an earlier one had none for those in lists."""
    for name in sorted({*stored, *said}):
        there, index = stored.get(name), said.get(name)
        if there is not None and index is not None and not index.classes:
            there = there.model_copy(update={"classes": index.classes})
        if there != index:
            raise DataError(
                f"column {name!r} is {_words(stored.get(name))} in {file}, and {_words(said.get(name))} in "
                "the index: they do not belong together. Prepare the dataset again, or copy it whole."
            )


def _words(column: Column | None) -> str:
    if column is None:
        return "missing"
    shape = "".join(f"[{'varying' if n is None else n}]" for n in column.shape)
    return f"{column.dtype}{shape}" + (f" of {len(column.classes)} classes" if column.classes else "")
