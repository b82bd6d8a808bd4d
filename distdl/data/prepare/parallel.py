"""Parallel text: files SPLIT.LANG with a sentence a line, line n of each translating the others'."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from distdl.data.huggingface import feature_of, with_features
from distdl.errors import DataError

_NAME = re.compile(r"(?P<split>\w+)\.(?P<language>[a-z]{2,3}(_[A-Z]{2})?)")
_ROWS = 10_000

Pairs = dict[str, dict[str, Path]]
"""Split -> language -> file."""


def find_pairs(files: list[Path]) -> Pairs:
    """The files named SPLIT.LANG whose split has two or more languages; empty where there are none."""
    found: Pairs = {}
    for file in files:
        match = _NAME.fullmatch(file.name)
        if match and file.suffix not in (".ts", ".csv", ".tsv", ".txt", ".md", ".py", ".sh"):
            found.setdefault(match["split"], {})[match["language"]] = file
    return {split: languages for split, languages in found.items() if len(languages) > 1}


def parallel_schema(pairs: Pairs) -> pa.Schema:
    """One string column a language. Raises DataError where the splits have different languages."""
    languages = {split: sorted(files) for split, files in pairs.items()}
    first = next(iter(languages.values()))
    if any(found != first for found in languages.values()):
        raise DataError(f"the splits have different languages: {languages}; expected the same in each")
    schema = pa.schema([pa.field(language, pa.string()) for language in first])
    return with_features(schema, {language: feature_of(pa.string()) for language in first})


def parallel_batches(files: dict[str, Path], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The lines of one split. Raises DataError for other text than UTF-8 or different numbers of lines."""
    lines = [_lines(files[name]) for name in schema.names]
    done = 0
    while True:
        parts = [list(itertools.islice(one, _ROWS)) for one in lines]
        counts = [len(part) for part in parts]
        if len(set(counts)) != 1:
            short = files[schema.names[counts.index(min(counts))]]
            raise DataError(
                f"{short} ends after {done + min(counts)} lines, and the file beside it goes on: "
                f"{', '.join(f.name for f in files.values())} need the same number of lines"
            )
        if not counts[0]:
            return
        yield pa.record_batch([pa.array(part, pa.string()) for part in parts], schema=schema)
        done += counts[0]


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        # Only \n ends a line: the separators of Unicode, which occur inside sentences, do not.
        with path.open(encoding="utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(stream, 1):  # noqa: B007
                yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} after line {number}: {error}; expected UTF-8 text") from error
