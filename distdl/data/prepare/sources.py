"""What a person names -> Arrow or Parquet files. The one file that imports Hugging Face `datasets`, lazily.

`find` looks at names only, so that it can say at once what is wrong; `materialise` reads. Formats that
pyarrow does not read by row number (CSV, JSON, IDX, ...) first become Arrow streams in a scratch folder.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from distdl.data.folders import Splits, files_in, split_files, split_of
from distdl.data.huggingface import canonical_type
from distdl.data.index import INDEX_FILE, read_index, resolve
from distdl.data.prepare.convert import canonical
from distdl.data.prepare.idx import find_idx, idx_schema, idx_table
from distdl.data.prepare.mediafolder import IMAGES, SPLITS, class_tables, described_tables, find_described
from distdl.data.prepare.parallel import find_pairs, parallel_batches, parallel_schema
from distdl.data.prepare.readers import Piece, Source, in_tables, read_ids, source_of
from distdl.data.prepare.sound import SOUNDS
from distdl.data.prepare.ts import read_ts, ts_schema, ts_table
from distdl.data.prepare.writer import write_stream
from distdl.data.saved import is_saved, saved_splits
from distdl.data.stream.hub import cache_only, refusal
from distdl.errors import DataError, EnvironmentProblem

_SUFFIXES = {
    "parquet": (".parquet",),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "json": (".jsonl", ".json", ".ndjson", ".jsonl.gz"),
    "text": (".txt",),
    "ts": (".ts",),
}
_UNROLLED_ROWS = 1024

ACCEPTED = """a folder made by `distdl data prepare` or by `save_to_disk`;
  train*.parquet, train*.csv, train*.tsv, train*.jsonl or train*.txt (test*, validation* likewise);
  SPLIT/CLASS/*.png or CLASS/*.png (also .jpg, .wav, .flac, ...): images or sounds, a folder for each class;
  SPLIT/metadata.csv or .jsonl with a column file_name: the images or sounds beside it, and what it says;
  train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-... (also .gz): IDX;
  NAME_TRAIN.ts, NAME_TEST.ts: time series;
  train.en, train.de: parallel text, a file for each language"""


@dataclass(frozen=True)
class Found:
    """A source by its layout: kind, the files of each split, and for a hub the id and configuration."""

    kind: str
    files: Splits = field(default_factory=dict)
    folder: Path | None = None
    hub: str = ""
    config: str | None = None

    def identity(self) -> list[Any]:
        """What tells this source from a changed one: names, sizes and times of its files. JSON."""
        if self.kind == "hub":
            return ["hub", self.hub, self.config]
        rows = []
        for split, files in self.files.items():
            for file in files:
                status = file.stat()
                rows.append([split, str(file.absolute()), status.st_size, status.st_mtime_ns])
        return [self.kind, *rows]


def find(given: str, config: str | None) -> Found:
    """A local file or folder, or else a hub id (`owner/name`). Raises DataError."""
    path = Path(given).expanduser()
    if path.is_dir():
        return _find_folder(path)
    if path.is_file():
        return _find_file(path)
    if given.count("/") == 1 and not given.startswith((".", "/", "~")):
        return Found("hub", hub=given, config=config)
    raise DataError(
        f"{given} does not exist, and it is no catalogue name or hub id (owner/name). As a file or folder, "
        f"accepted are\n  {ACCEPTED}"
    )


def _find_file(path: Path) -> Found:
    for kind, suffixes in _SUFFIXES.items():
        if path.name.endswith(suffixes):
            split = _ts_split(path) if kind == "ts" else "train"
            return Found(kind, {split: [path]}, path.parent)
    raise DataError(f"{path}: files of this kind are not read. Accepted are\n  {ACCEPTED}")


def _find_folder(folder: Path) -> Found:
    if (folder / INDEX_FILE).is_file():
        index = read_index(folder)
        files = {
            name: [Path(resolve(folder.absolute(), shard.file)) for shard in split.shards]
            for name, split in index.splits.items()
        }
        return Found("arrow", files, folder)
    if is_saved(folder):
        return Found("arrow", saved_splits(folder), folder)
    candidates = list(_layouts(folder))
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
    what = " and ".join(found.kind for found in candidates)
    problem = (
        f"could be read as {what}; name one file, or move the others away" if what else "has no known layout"
    )
    raise DataError(f"{folder} {problem}. Found {names}. Accepted are\n  {ACCEPTED}")


def _layouts(folder: Path) -> Iterator[Found]:
    described = find_described(folder)
    if described:
        yield Found("described", described, folder)
        return  # the metadata themselves are CSV or JSON
    idx = find_idx(folder)
    if idx:
        yield Found("idx", {split: list(pair) for split, pair in idx.items()}, folder)
    pairs = find_pairs(files_in(folder, ("",)))
    if pairs:
        yield Found("parallel", {split: list(files.values()) for split, files in pairs.items()}, folder)
    series = files_in(folder, _SUFFIXES["ts"])
    if series:
        splits: Splits = {}
        for file in series:
            splits.setdefault(_ts_split(file), []).append(file)
        for split, files in splits.items():
            if len({_problem_of(file) for file in files}) > 1:
                raise DataError(
                    f"{folder} has several series files of split {split!r}: "
                    f"{', '.join(f.name for f in files)}. Each problem needs a folder of its own"
                )
        yield Found("ts", splits, folder)
    tables = False
    for kind in ("parquet", "csv", "json", "text"):
        if files_in(folder, _SUFFIXES[kind]) or files_in(folder / "data", _SUFFIXES[kind]):
            tables = True
            yield Found(kind, split_files(folder, _SUFFIXES[kind]), folder)
    images = _class_splits(folder, IMAGES)
    if images:
        yield Found("imagefolder", images, folder)
    if not tables and (sounds := _class_splits(folder, SOUNDS)):  # a table may name sounds that lie about
        yield Found("soundfolder", sounds, folder)


def _class_splits(folder: Path, suffixes: tuple[str, ...]) -> Splits:
    """SPLIT/CLASS/file where every class folder lies in a split's, else CLASS/file, all "train"."""
    found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in suffixes and f.is_file())
    found = [f for f in found if not any(is_litter(part) for part in f.relative_to(folder).parts)]
    depths = {len(f.relative_to(folder).parts) for f in found}
    if depths == {3}:
        splits: Splits = {}
        for file in found:
            splits.setdefault(file.relative_to(folder).parts[0], []).append(file)
        return splits
    names = {f.relative_to(folder).parts[0] for f in found}
    if depths == {2} and not (len(names) > 1 and names <= set(SPLITS)):
        return {"train": found}
    if depths == {1} or depths == {2}:
        raise DataError(
            f"{folder} holds {found[0].name} and others without a folder for their class: expected "
            "CLASS/file or SPLIT/CLASS/file, or a metadata.csv that names them"
        )
    if depths:
        raise DataError(
            f"{folder} holds images or sounds at different depths ({', '.join(str(f) for f in found[:3])}); "
            "expected CLASS/file or SPLIT/CLASS/file, or a metadata.csv that names them"
        )
    return {}


def _problem_of(file: Path) -> str:
    """NAME of NAME_TRAIN.ts."""
    name, _, end = file.stem.rpartition("_")
    return name if end.lower() in ("train", "test", "validation") else ""


def is_litter(part: str) -> bool:
    """What tools leave in folders, and is no class: .ipynb_checkpoints, __MACOSX."""
    return part.startswith(".") or part == "__MACOSX"


def _ts_split(file: Path) -> str:
    end = file.stem.rpartition("_")[2].lower()
    return end if end in ("train", "test", "validation") else split_of(file)


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
