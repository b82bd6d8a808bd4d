"""What a person names -> its kind and its files, by names alone, so that what is wrong is said at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distdl.data.folders import Splits, files_in, is_litter, split_files, split_of
from distdl.data.index import INDEX_FILE, read_index, resolve
from distdl.data.prepare.idx import find_idx
from distdl.data.prepare.mediafolder import IMAGES, SPLITS, find_described
from distdl.data.prepare.parallel import find_pairs
from distdl.data.prepare.sound import SOUNDS
from distdl.data.saved import is_saved, saved_splits
from distdl.errors import DataError

_SUFFIXES = {
    "parquet": (".parquet",),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "json": (".jsonl", ".json", ".ndjson", ".jsonl.gz"),
    "text": (".txt",),
    "ts": (".ts",),
}

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
    if depths in ({1}, {2}):
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


def _ts_split(file: Path) -> str:
    end = file.stem.rpartition("_")[2].lower()
    return end if end in ("train", "test", "validation") else split_of(file)
