"""Turn a source into a sharded, indexed, memory-mappable dataset: all of it or, after a kill, none.

The layout of the result is described in index.py, the folder in which it grows in building.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from distdl.data.catalogue import CATALOGUE, Entry
from distdl.data.index import INDEX_FILE, Index, hash_file, read_index
from distdl.data.prepare.building import Building, building, check_free, check_room, disk_errors
from distdl.data.prepare.draft import Draft, make_draft
from distdl.data.prepare.finish import finish
from distdl.data.prepare.layouts import Found, find
from distdl.data.prepare.options import Options, with_entry
from distdl.data.prepare.readers import Source
from distdl.data.prepare.shards import Record, read_record, run_jobs
from distdl.data.prepare.sources import materialise
from distdl.data.prepare.tokenize import tokenizer_file
from distdl.errors import DistdlError
from distdl.testing.faults import point
from distdl.version import __version__

_CONVERSION = "2"
"""Raised where the same source and options give other rows, so that an older result is not taken for it."""

Progress = Callable[[int, int], None]
"""Told how many rows are done, and how many there are."""
Say = Callable[[str], None]
"""Given a line for a person."""

_SPARE_BYTES = 32 * 2**20


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
    with disk_errors(out):
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
            source = materialise(
                found, made.source, entry.class_names if entry else None, _texts(options, entry)
            )
        merged = with_entry(options, entry, list(source.schema.names))
        draft = make_draft(source, merged, entry, made)
        records = _make_shards(draft, merged, made, progress, say if state == "again" else lambda text: None)
        index = finish(
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
    """All that the result follows from; of a tokenizer that is a file, what stands in it."""
    file = tokenizer_file(options.tokenizer) if options.tokenize else None
    return {
        "source": found.identity(),
        "given": given,
        "options": options.mathematics(),
        "version": _versions(),
        **({"tokenizer": hash_file(file)} if file else {}),
    }


def _name_of(job: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()


def _was_made_by(out: Path, job: dict[str, Any]) -> bool:
    """Whether `out` is whole and the result of this very job, so that the same command can be run again."""
    return (out / INDEX_FILE).is_file() and read_index(out).prepared.get("job") == _name_of(job)


def _texts(options: Options, entry: Entry | None) -> set[str]:
    """The columns that are text, by the names that the source has for them."""
    renamed = {**(entry.rename if entry else {}), **options.rename}
    old = {new: old for old, new in renamed.items()}
    named = {*options.classes, *options.tokenize, *(entry.tokenize if entry else ())}
    return {old.get(name, name) for name in named}


def _make_shards(
    draft: Draft, options: Options, made: Building, progress: Progress | None, say: Say
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


def _prepared(given: str, found: Found, options: Options, records: dict[str, list[Record]]) -> dict[str, Any]:
    """For a person to read. No date: the same source and options give the same bytes."""
    default = Options().mathematics()
    chosen = {k: v for k, v in options.mathematics().items() if v != default.get(k)}
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
    return {"distdl": __version__, "pyarrow": pa.__version__, "conversion": _CONVERSION}


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
