"""What `layouts.find` found -> Arrow or Parquet. The one file that imports Hugging Face `datasets`, lazily.

Formats that pyarrow does not read by row number (CSV, JSON, IDX, ...) first become Arrow streams in a scratch
folder.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from distdl.data.folders import Splits, files_in
from distdl.data.huggingface import canonical_type
from distdl.data.prepare.convert import canonical
from distdl.data.prepare.idx import find_idx, idx_schema, idx_table
from distdl.data.prepare.layouts import Found
from distdl.data.prepare.mediafolder import class_tables, described_tables
from distdl.data.prepare.parallel import find_pairs, parallel_batches, parallel_schema
from distdl.data.prepare.readers import Piece, Source, in_tables, read_ids, source_of
from distdl.data.prepare.ts import read_ts, ts_schema, ts_table
from distdl.data.prepare.writer import write_stream
from distdl.data.stream.hub import cache_only, refusal
from distdl.errors import DataError, EnvironmentProblem

_UNROLLED_ROWS = 1024


def materialise(
    found: Found, scratch: Path, class_names: tuple[str, ...] | None, text: Collection[str] = ()
) -> Source:
    """The rows of `found` as Arrow or Parquet files; what has to be made is made in `scratch`.

    `class_names` are for numbers that have none; columns of CSV that are in `text` are text, whatever they
    look like. Raises DataError.
    """
    if found.kind in ("parquet", "arrow"):
        return source_of(found.files, "parquet" if found.kind == "parquet" else "arrow")
    scratch.mkdir(parents=True, exist_ok=True)
    if found.kind == "hub":
        return _from_hub(found)
    if found.kind in ("csv", "json", "text"):
        return _with_datasets(found, scratch, text)
    schema, splits = _tables(found, class_names)
    files: Splits = {}
    for split, tables in splits.items():
        target = scratch / f"{split}.arrow"
        write_stream(target, schema, tables)
        files[split] = [target]
    return source_of(files, "arrow")


def unrolled(source: Source, shard_rows: int, scratch: Path) -> Source:
    """`source` with Parquet whose row groups are larger than two shards as Arrow streams in `scratch`.

    A row group is decoded from its beginning, so that each of its shards would decode all those before it.
    """
    splits = {}
    for split, pieces in source.splits.items():
        found = []
        for number, piece in enumerate(pieces):
            if max(piece.groups, default=0) > 2 * shard_rows:
                scratch.mkdir(parents=True, exist_ok=True)
                target = scratch / f"{split}-{number:05d}.arrow"
                tables = map(_plain, in_tables(read_ids([piece], range(piece.rows)), _UNROLLED_ROWS))
                fields = [pa.field(f.name, canonical_type(f.type)) for f in source.schema]
                write_stream(target, pa.schema(fields), tables)
                piece = Piece(str(target), "arrow", piece.rows)
            found.append(piece)
        splits[split] = tuple(found)
    return Source(splits, source.schema)


def _plain(table: pa.Table) -> pa.Table:
    """Without dictionaries, which a stream would have to hold beside its rows."""
    return pa.table({name: canonical(table.column(name).combine_chunks()) for name in table.column_names})


def _tables(
    found: Found, class_names: tuple[str, ...] | None
) -> tuple[pa.Schema, Mapping[str, Iterator[pa.Table]]]:
    assert found.folder is not None
    if found.kind == "idx":
        pairs = find_idx(found.folder)
        schema = idx_schema(pairs, class_names)
        return schema, {split: iter([idx_table(pair, schema)]) for split, pair in pairs.items()}
    if found.kind == "ts":
        read = {split: [read_ts(file) for file in files] for split, files in found.files.items()}
        schema = ts_schema([file for files in read.values() for file in files])
        return schema, {s: iter([ts_table(file, schema) for file in files]) for s, files in read.items()}
    if found.kind in ("imagefolder", "soundfolder"):
        return class_tables(found.files)
    if found.kind == "described":
        return described_tables(found.files)
    pairs_of = find_pairs(files_in(found.folder, ("",)))
    schema = parallel_schema(pairs_of)
    return schema, {
        split: (pa.Table.from_batches([batch]) for batch in parallel_batches(files, schema))
        for split, files in pairs_of.items()
    }


def _with_datasets(found: Found, scratch: Path, text: Collection[str]) -> Source:
    """CSV, JSON lines and text through the builders of `datasets`, whose cache is `scratch`."""
    # Escaped, because `datasets` reads `*`, `?` and `[` in a path as patterns.
    files = {s: [glob.escape(str(f.absolute())) for f in members] for s, members in found.files.items()}
    cache = str(scratch / "datasets")
    first = next(iter(found.files.values()))[0]
    tabs = {_has_tabs(file) for members in files.values() for file in members}
    # "007" is a code, and would be read as 7. A mark at the beginning of a text file is no part of its text.
    plain: dict[str, Any] = (
        {"converters": dict.fromkeys(text, _as_text)} if found.kind == "csv" and text else {}
    )
    plain |= {"encoding": "utf-8-sig"} if found.kind == "text" else {}
    if len(tabs) == 1:
        options = plain | ({"sep": "\t"} if tabs == {True} else {})
        loaded = _load(found.kind, str(first), data_files=files, cache_dir=cache, **options)
        return _checked(source_of(_arrow_files(loaded), "arrow"), first)
    made: Splits = {}
    for split, members in files.items():
        for tab, group in groupby(members, _has_tabs):  # one separator a call
            some = {split: list(group)}
            options = plain | ({"sep": "\t"} if tab else {})
            loaded = _load(found.kind, some[split][0], data_files=some, cache_dir=cache, **options)
            made.setdefault(split, []).extend(_arrow_files(loaded)[split])
    return _checked(source_of(made, "arrow"), first)


def _checked(source: Source, first: Path) -> Source:
    """Raises DataError for CSV whose rows do not fit its header: all its columns would move by one."""
    if "__index_level_0__" in source.schema.names:
        raise DataError(
            f"{first} or a file beside it has rows with one field more than its header has names: name the "
            "first column too, or take the last field away"
        )
    return source


def _as_text(field: str) -> str:
    """As it stands, but for spaces around a number: "1, 7"."""
    bare = field.strip()
    return bare if bare.lstrip("+-").replace(".", "", 1).isdigit() else field


def _has_tabs(file: str) -> bool:
    return file.endswith((".tsv", ".tsv.gz"))


def _from_hub(found: Found) -> Source:
    problem = refusal()
    try:
        with _offline() if problem else nullcontext():
            return source_of(_arrow_files(_load(found.hub, found.hub, name=found.config)), "arrow")
    except DataError as error:
        offline = f" The hub does not answer ({problem}), and the cache does not have it." if problem else ""
        raise DataError(
            f"{error}.{offline} Give files you have with --from FOLDER, or prepare it on a machine that "
            "reaches the hub and copy the folder here."
        ) from error


def _offline() -> AbstractContextManager[None]:
    """Have `datasets` look in its cache only, at once, where it would retry for half a minute."""
    import datasets.config
    import huggingface_hub.constants

    return cache_only(datasets.config, huggingface_hub.constants)


def _load(builder: str, what: str, **arguments: Any) -> Any:
    import datasets

    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(builder, **arguments)
    except MemoryError:
        raise
    except Exception as error:  # its builders raise whatever their parsers do
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, ConnectionError):
            raise cause from error
        text = str(cause).strip().splitlines() or [type(cause).__name__]
        if "corresponds to no data" in text[0]:  # its words for a split without rows
            raise DataError(f"{what}: a split of it has no rows; fill it or leave it out") from error
        raise DataError(f"`datasets` {datasets.__version__} cannot read {what}: {text[0]}") from error
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def _arrow_files(loaded: Mapping[str, Any]) -> Splits:
    """The Arrow files in which `datasets` cached what it loaded. A table in memory would have none."""
    files = {
        str(split): [Path(entry["filename"]) for entry in dataset.cache_files]
        for split, dataset in loaded.items()
    }
    if not all(files.values()):
        raise EnvironmentProblem(
            "datasets keeps its tables in memory here; unset HF_DATASETS_IN_MEMORY_MAX_SIZE and try again"
        )
    return files
