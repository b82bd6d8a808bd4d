"""Turn a source into a sharded, indexed, memory-mappable dataset: all of it or, after a kill, none.

The layout of the result is described in index.py, the folder in which it grows in building.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from distdl import __version__
from distdl.data.catalogue import CATALOGUE, Entry
from distdl.data.huggingface import (
    DICT_FILE,
    INFO_FILE,
    STATE_FILE,
    columns_of,
    dict_json,
    info_json,
    read_features,
    state_json,
)
from distdl.data.index import INDEX_FILE, DataFile, Index, Offsets, Shard, Split, hash_file, read_index
from distdl.data.prepare.building import Building, building, check_free, check_room, disk_errors
from distdl.data.prepare.choosing import (
    Part,
    choose_classes,
    choose_columns,
    choose_pictures,
    choose_splits,
    choose_tokenizer,
    sample_ranges,
)
from distdl.data.prepare.convert import Conversion
from distdl.data.prepare.options import Options, with_entry
from distdl.data.prepare.readers import Source, in_tables, read_ids
from distdl.data.prepare.shards import Job, Record, read_lengths, read_record, run_jobs
from distdl.data.prepare.sources import Found, find, materialise, unrolled
from distdl.data.prepare.writer import BATCH_BYTES, BATCH_ROWS, fsync_path, sequence_columns, write_durable
from distdl.errors import DistdlError
from distdl.testing.faults import point

TOKENIZER_FILE = "tokenizer.json"

Progress = Callable[[int, int], None]
"""Told how many rows are done, and how many there are."""
Say = Callable[[str], None]
"""Given a line for a person."""

_SPARE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class _Draft:
    """Everything that is decided before the first shard is written."""

    parts: dict[str, Part]
    conversion: Conversion
    schema: pa.Schema
    jobs: dict[str, list[Job]]
    row_bytes: float


def prepare(
    given: str,
    out: Path,
    options: Options | None = None,
    *,
    local: Path | None = None,
    source: Source | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Index:
    """Make the dataset `out` of `given`: a catalogue name, a hub id, or a local file or folder.

    `local` names files to read instead of the hub's, `source` files already found. Any process may call it;
    blocks until done, using `options.workers` processes. After a kill the same call goes on with the shards
    that are missing. The result is the same, byte for byte, for any number of workers. Raises DataError for
    bad data, a full disk, a folder that is in the way or being prepared by another process;
    EnvironmentProblem for one that cannot be written.
    """
    options = options or Options()
    options.check()
    out = out.expanduser().absolute()
    if not options.wait and not (out / INDEX_FILE).is_file():
        check_free(out, options.overwrite)
    say = say or (lambda text: None)
    found = find(str(local) if local else _hub_id(given), options.config or _config(given))
    job = _job(given, found, options)
    with building(out, wait=options.wait) as made, disk_errors(out):
        if options.wait and (out / INDEX_FILE).is_file():  # another process made it while we waited
            return read_index(out)
        if _was_made_by(out, job) and not options.overwrite:
            say(f"{out} is there already, made of the same source with the same options")
            made.discard()  # a kill after the rename leaves it
            return read_index(out)
        check_free(out, options.overwrite)
        try:
            return _prepare(given, found, job, made, options, source, progress, say)
        except DistdlError:
            made.discard_unless_begun()
            raise


def _prepare(
    given: str,
    found: Found,
    job: dict[str, Any],
    made: Building,
    options: Options,
    source: Source | None,
    progress: Progress | None,
    say: Say,
) -> Index:
    entry = CATALOGUE.get(given)
    state = made.start(job)
    if state == "changed":
        say("the source or the options have changed since this was begun: starting over")
    if not (made.dataset / INDEX_FILE).is_file():  # else a kill came between the index and the rename
        if source is None:
            point("prepare.source")
            source = materialise(found, made.source, entry.class_names if entry else None)
        merged = with_entry(options, entry, list(source.schema.names))
        draft = _draft(source, merged, entry, made)
        records = _make_shards(draft, merged, made, progress, say if state == "again" else lambda text: None)
        index = _finish(
            draft,
            records,
            made,
            _name(given, options, made),
            _prepared(given, found, merged, records) | {"job": _name_of(job)},
        )
        _say_cut(index, say)
    made.publish(overwrite=options.overwrite)
    return read_index(made.out)


def _job(given: str, found: Found, options: Options) -> dict[str, Any]:
    """All that the result follows from."""
    return {
        "source": found.identity(),
        "given": given,
        "options": options.mathematics(),
        "version": _versions(),
    }


def _name_of(job: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()


def _was_made_by(out: Path, job: dict[str, Any]) -> bool:
    """Whether `out` is whole and the result of this very job, so that the same command can be run again."""
    return (out / INDEX_FILE).is_file() and read_index(out).prepared.get("job") == _name_of(job)


def _draft(source: Source, options: Options, entry: Entry | None, made: Building) -> _Draft:
    parts = choose_splits(source, entry.splits if entry else None, options)
    conversion = choose_columns(source, options, entry.class_names if entry else None)
    conversion = choose_pictures(conversion, source, options)
    conversion = choose_classes(conversion, source, parts, options)
    kept = made.folder / "records" / TOKENIZER_FILE
    before = kept.read_text(encoding="utf-8") if kept.is_file() else None
    conversion = choose_tokenizer(conversion, source, parts, options, before)
    if conversion.tokenizer and before is None:
        write_durable(kept, conversion.tokenizer)
    schema, row_bytes = _look(source, parts, conversion)
    counts = _shard_counts(parts, options, row_bytes)
    source = unrolled(
        source,
        max(source.rows(p.source) // n for p, n in zip(parts.values(), counts, strict=True)),
        made.source,
    )
    jobs = {
        name: _jobs(name, part, source, conversion, schema, shards, row_bytes, made)
        for (name, part), shards in zip(parts.items(), counts, strict=True)
    }
    return _Draft(parts, conversion, schema, jobs, row_bytes)


def _look(source: Source, parts: dict[str, Part], conversion: Conversion) -> tuple[pa.Schema, float]:
    """(schema, bytes a row) of the result, from a sample of converted rows of every split."""
    schema: pa.Schema | None = None
    size = rows = 0
    for name in dict.fromkeys(part.source for part in parts.values()):
        for start, stop in sample_ranges(source, name):
            ids = range(start, stop)
            for table in in_tables(read_ids(source.splits[name], ids, conversion.columns), len(ids)):
                converted, _ = conversion.apply(table, ids, name)
                schema = schema or converted.schema
                size += converted.nbytes
                rows += len(converted)
    assert schema is not None, "a source has rows"
    return schema, max(size / rows, 1 / 8)


def _shard_counts(parts: dict[str, Part], options: Options, row_bytes: float) -> list[int]:
    sizes = [len(part.ids) for part in parts.values()]
    if options.shards is None:
        counts = [-(-int(n * row_bytes) // options.max_shard_bytes) for n in sizes]
    else:
        counts = [-(-options.shards * n // max(sizes)) for n in sizes]
    return [min(max(count, 1), n) for count, n in zip(counts, sizes, strict=True)]


def _jobs(
    split: str,
    part: Part,
    source: Source,
    conversion: Conversion,
    schema: pa.Schema,
    shards: int,
    row_bytes: float,
    made: Building,
) -> list[Job]:
    rows = len(part.ids)
    batch_rows = max(1, min(BATCH_ROWS, int(BATCH_BYTES / row_bytes)))
    (made.dataset / split).mkdir(exist_ok=True)
    return [
        Job(
            number=number,
            target=made.dataset / split / f"data-{number:05d}-of-{shards:05d}.arrow",
            record=made.records / f"{split}-{number:05d}.json",
            pieces=source.splits[part.source],
            source_split=part.source,
            ids=part.ids[rows * number // shards : rows * (number + 1) // shards],
            conversion=conversion,
            schema=schema,
            batch_rows=batch_rows,
        )
        for number in range(shards)
    ]


def _make_shards(
    draft: _Draft, options: Options, made: Building, progress: Progress | None, say: Say
) -> dict[str, list[Record]]:
    jobs = [job for found in draft.jobs.values() for job in found]
    missing = [job for job in jobs if read_record(job) is None]
    total = sum(len(job.ids) for job in jobs)
    left = sum(len(job.ids) for job in missing)
    if len(missing) < len(jobs):
        say(f"going on: {len(jobs) - len(missing)} of {len(jobs)} shards are there already")
    check_room(made.folder, int(left * draft.row_bytes) + _SPARE_BYTES)
    done = total - left

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    count(0)
    run_jobs(missing, options.workers, count)
    records: dict[str, list[Record]] = {}
    for split, found in draft.jobs.items():
        whole = [read_record(job) for job in found]
        assert all(whole), "run_jobs raises for a shard that it cannot make"
        records[split] = [record for record in whole if record]
    return records


def _finish(
    draft: _Draft, records: dict[str, list[Record]], made: Building, name: str, prepared: dict[str, Any]
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
        prepared=prepared,
    )
    point("prepare.before_index")
    write_durable(made.dataset / INDEX_FILE, index.to_json())
    return index


def _shards(made: Building, jobs: list[Job], records: list[Record]) -> tuple[Shard, ...]:
    return tuple(
        Shard(file=_relative(made, job.target), bytes=r.bytes, hash=r.hash, rows=r.rows)
        for job, r in zip(jobs, records, strict=True)
    )


def _offsets(draft: _Draft, made: Building, split: str, records: list[Record]) -> dict[str, Offsets]:
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


def _prepared(given: str, found: Found, options: Options, records: dict[str, list[Record]]) -> dict[str, Any]:
    """For a person to read. No date: the same source and options give the same bytes."""
    default = Options().mathematics()
    chosen = {k: v for k, v in options.mathematics().items() if v != default[k]}
    cut = {split: sum(r.cut for r in found) for split, found in records.items()} if options.max_tokens else {}
    return {
        "source": given,
        "files": str(found.folder.absolute()) if found.folder else found.hub,
        "kind": found.kind,
        "options": chosen,
        **({"rows_cut": cut} if cut else {}),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {"distdl": __version__, "pyarrow": pa.__version__}


def _say_cut(index: Index, say: Say) -> None:
    for split, rows in index.prepared.get("rows_cut", {}).items():
        limit = index.prepared["options"]["max_tokens"]
        say(f"{split}: {rows} of {index.splits[split].rows} rows had more than {limit} tokens and were cut")


def _name(given: str, options: Options, made: Building) -> str:
    if options.name:
        return options.name
    return given if given in CATALOGUE else made.out.name


def _hub_id(given: str) -> str:
    entry = CATALOGUE.get(given)
    return entry.hub if entry else given


def _config(given: str) -> str | None:
    entry = CATALOGUE.get(given)
    return entry.config if entry else None
