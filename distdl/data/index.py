"""`index.json`: what a sharded dataset holds, and how each file of it is checked. Pure JSON, no torch.

DIR/
  index.json                              this file, written last: a folder without it is not a dataset
  dataset_dict.json                       for `datasets.load_from_disk(DIR)`
  tokenizer.json                          where text was tokenised
  SPLIT/data-00000-of-00004.arrow         Arrow stream files, memory mapped
  SPLIT/state.json, dataset_info.json     for `datasets.load_from_disk(DIR/SPLIT)`
  SPLIT/offsets/COLUMN.npy                int64 [rows + 1]: where each row of a sequence column begins
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distdl import samples
from distdl.errors import DataError

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
_OWN_HASH = re.compile(r'"index_hash": "([0-9a-f]{32})"')
_NO_HASH = '"index_hash": "' + "0" * 32 + '"'
FORMAT = "distdl-dataset"
VERSION = 1

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Natural = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Column(_Part):
    """One column: element type (Arrow's name), shape of a row (None: varies from row to row), class names."""

    dtype: str
    shape: tuple[Natural | None, ...] = Field(default=(), strict=False)
    classes: tuple[str, ...] | None = Field(default=None, strict=False)


class DataFile(_Part):
    """A file of the dataset. `file` is relative to the index, or an absolute path or URL."""

    file: str
    bytes: Natural
    hash: Hash


class Shard(DataFile):
    """An Arrow stream file with `rows` consecutive rows of its split."""

    rows: Natural


class Offsets(DataFile):
    """Where the rows of a sequence column begin: `total` elements in all, the longest row has `longest`."""

    total: Natural
    longest: Natural


class Split(_Part):
    """One split: its shards in the order of their rows, and the offsets of its sequence columns."""

    shards: tuple[Shard, ...] = Field(strict=False)
    offsets: dict[str, Offsets] = {}

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)


class Index(_Part):
    """A whole dataset. All splits have the same columns."""

    format: Literal["distdl-dataset"] = "distdl-dataset"
    version: Literal[1] = 1
    name: str
    columns: dict[str, Column]
    splits: dict[str, Split]
    others: tuple[DataFile, ...] = Field(default=(), strict=False)
    vocabulary: dict[str, Natural] = {}
    """Column of tokens -> how many different ones its tokenizer has."""
    prepared: dict[str, Any] = {}
    """How it was made: source, options and versions, for a person to read."""

    @property
    def fingerprint(self) -> str:
        """A name for the rows: 32 hex digits, from the shards' hashes. Where they lie does not enter."""
        whole = xxhash.xxh3_128()
        for name in sorted(self.splits):
            shards = self.splits[name].shards
            whole.update(f"{name}:{len(shards)}\n".encode())
            for shard in shards:
                whole.update(f"{shard.rows} {shard.bytes} {shard.hash}\n".encode())
        return whole.hexdigest()

    def info(self) -> samples.DataInfo:
        """What the plan needs to know."""
        fields = {
            name: samples.Field(
                c.dtype,
                c.shape,
                len(c.classes) if c.classes else None,
                self.vocabulary.get(name),
                c.classes or (),
                self._meaning(name, c),
            )
            for name, c in self.columns.items()
        }
        rows = {name: split.rows for name, split in self.splits.items()}
        elements = {s: {c: o.total for c, o in split.offsets.items()} for s, split in self.splits.items()}
        return samples.DataInfo(self.name, rows, fields, self.fingerprint, elements)

    def _meaning(self, name: str, column: Column) -> str:
        if name in self.vocabulary:
            return next((f"tokenizer {f.hash}" for f in self.others if f.file == TOKENIZER_FILE), "")
        options = self.prepared.get("options", {})
        if column.dtype == "halffloat" and len(column.shape) == 2 and column.shape[0] is None:
            return f"bands of sound up to half of {options.get('sample_rate', 16_000)} Hz"
        return ""

    def files(self) -> Iterable[DataFile]:
        """Every file that the index checks."""
        for split in self.splits.values():
            yield from split.shards
            yield from split.offsets.values()
        yield from self.others

    def to_json(self) -> str:
        """The text of the file. It carries a hash of itself, which `parse_index` checks."""
        text = "{\n " + _NO_HASH + "," + self.model_dump_json(indent=1)[1:] + "\n"
        return text.replace(_NO_HASH, f'"index_hash": "{_hash_text(text)}"', 1)


@dataclass(frozen=True)
class SplitFiles:
    """One split as its readers need it: Arrow stream files in order, and how many rows each of them has.

    `files` are absolute paths or URLs; `offsets` gives, for each sequence column, the .npy file (int64
    [rows + 1]) that says where its rows begin. Folders that distdl did not prepare have no offsets.
    """

    files: list[str]
    rows: list[int]
    offsets: dict[str, Path]


def read_index(folder: Path) -> Index:
    """The index of a prepared dataset. Raises DataError where it is missing, damaged or another version."""
    path = folder / INDEX_FILE
    try:
        return parse_index(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"cannot read {path}: {reason}. A dataset made by `distdl data prepare` has this file; where it "
            "was cut short, prepare it again."
        ) from error


def parse_index(text: str, where: str, *, remote: bool = False) -> Index:
    """The index in `text`, which came from `where`; one that is `remote` may name files beside it only.

    Raises DataError.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is damaged: {error}. Prepare the dataset again.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{where} is not the index of a dataset made by `distdl data prepare`")
    if found.get("version") != VERSION:
        raise DataError(
            f"{where} has version {found.get('version')!r}, and this distdl reads version {VERSION}: use the "
            "distdl that wrote it, or prepare the dataset again"
        )
    _check_own_hash(text, where)
    found.pop("index_hash", None)
    try:
        index = Index.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{where} is damaged at {key}: {first['msg']}. Prepare the dataset again.") from error
    _check_places(index, where, remote)
    return index


def _check_places(index: Index, where: str, remote: bool) -> None:
    """A relative path stays in the dataset's folder; whoever can write on a server names no other files."""
    for name in index.splits:
        if "/" in name or name in ("", ".", ".."):
            raise DataError(f"{where} has a split named {name!r}: the name of a folder beside it is expected")
    for file in (each.file for each in index.files()):
        if is_relative(file):
            wrong = not file or file.startswith("~") or ".." in file.split("/")
            expected = "a relative path leads to files below the index, without '..' and '~'"
        else:
            wrong = remote
            expected = "an index behind a URL names files relative to itself only"
        if wrong:
            raise DataError(
                f"{where} names the file {file!r}: {expected}. Copy or prepare the dataset again."
            )


def _check_own_hash(text: str, where: str) -> None:
    own = _OWN_HASH.search(text)
    if own is None or own[1] != _hash_text(text.replace(own[0], _NO_HASH, 1)):
        raise DataError(f"{where} is damaged: its text has another hash than it states. Prepare it again.")


def _hash_text(text: str) -> str:
    return xxhash.xxh3_128(text.encode()).hexdigest()


def resolve(folder: str | os.PathLike[str], file: str) -> str:
    """Where a file of an index in `folder` (a path or a URL) lies: absolute paths and URLs stand as is."""
    if not is_relative(file):
        return file
    return f"{os.fspath(folder).rstrip('/')}/{file}"


def is_relative(file: str) -> bool:
    """Whether a file of an index is named relative to it: neither an absolute path nor a URL."""
    return "://" not in file and not os.path.isabs(file)


def hash_file(path: Path, chunk_bytes: int = 4 * 2**20) -> str:
    """XXH3-128 of a file's bytes, 32 hex digits; finds every flipped bit. Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()
