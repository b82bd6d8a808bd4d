"""The end of a preparation: offsets, the files that `datasets` reads, and last of all the index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from distdl.data.huggingface import (
    INFO_FILE,
    columns_of,
    dict_json,
    info_json,
    read_features,
    state_json,
)
from distdl.data.index import (
    INDEX_FILE,
    TOKENIZER_FILE,
    DataFile,
    Index,
    Offsets,
    Shard,
    Split,
    hash_file,
)
from distdl.data.prepare.building import Building
from distdl.data.prepare.draft import Draft
from distdl.data.prepare.shards import Job, Record, read_lengths
from distdl.data.prepare.tokenize import vocabulary_size
from distdl.data.prepare.writer import fsync_path, sequence_columns, write_durable
from distdl.data.saved import DICT_FILE, STATE_FILE
from distdl.testing.faults import point


def finish(
    draft: Draft, records: dict[str, list[Record]], made: Building, name: str, prepared: dict[str, Any]
) -> Index:
    """Offsets, the files that `datasets` reads, and last of all the index."""
    point("prepare.finish")
    others: list[Path] = []

    def put(path: Path, text: str) -> None:
        write_durable(path, text)
        others.append(path)

    splits = {
        split: Split(
            shards=_shards(made, jobs, records[split]), offsets=_offsets(draft, made, split, records[split])
        )
        for split, jobs in draft.jobs.items()
    }
    features = read_features(draft.schema)
    for split, jobs in draft.jobs.items():
        hashes = "".join(record.hash for record in records[split])
        put(made.dataset / split / STATE_FILE, state_json([j.target.name for j in jobs], split, hashes[:16]))
        put(made.dataset / split / INFO_FILE, info_json(features))
    put(made.dataset / DICT_FILE, dict_json(list(splits)))
    if draft.conversion.tokenizer:
        put(made.dataset / TOKENIZER_FILE, draft.conversion.tokenizer)
    index = Index(
        name=name,
        columns=columns_of(draft.schema),
        splits=splits,
        others=tuple(_data_file(made, path) for path in others),
        vocabulary=_vocabulary(draft),
        prepared=prepared,
    )
    point("prepare.before_index")
    write_durable(made.dataset / INDEX_FILE, index.to_json())
    return index


def _vocabulary(draft: Draft) -> dict[str, int]:
    conversion = draft.conversion
    if not conversion.tokenizer:
        return {}
    return dict.fromkeys(conversion.tokenize, vocabulary_size(conversion.tokenizer))


def _shards(made: Building, jobs: list[Job], records: list[Record]) -> tuple[Shard, ...]:
    return tuple(
        Shard(file=_relative(made, job.target), bytes=r.bytes, hash=r.hash, rows=r.rows)
        for job, r in zip(jobs, records, strict=True)
    )


def _offsets(draft: Draft, made: Building, split: str, records: list[Record]) -> dict[str, Offsets]:
    found = {}
    rows = sum(record.rows for record in records)
    for column in sequence_columns(draft.schema):
        path = made.dataset / split / "offsets" / f"{column}.npy"
        path.parent.mkdir(exist_ok=True)
        offsets = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=(rows + 1,))
        offsets[0] = at = total = longest = 0
        for job, record in zip(draft.jobs[split], records, strict=True):
            lengths = read_lengths(job, record, column)
            offsets[at + 1 : at + 1 + len(lengths)] = total + np.cumsum(lengths)
            at += len(lengths)
            total += int(lengths.sum())
            longest = max(longest, int(lengths.max(initial=0)))
        offsets.flush()
        del offsets
        fsync_path(path)
        file = _data_file(made, path)
        found[column] = Offsets(
            file=file.file, bytes=file.bytes, hash=file.hash, total=total, longest=longest
        )
    return found


def _data_file(made: Building, path: Path) -> DataFile:
    return DataFile(file=_relative(made, path), bytes=path.stat().st_size, hash=hash_file(path))


def _relative(made: Building, path: Path) -> str:
    return path.relative_to(made.dataset).as_posix()
