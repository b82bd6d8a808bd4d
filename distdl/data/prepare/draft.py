"""Everything that is decided before the first shard is written: splits, columns, schema, how many shards."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from distdl.data.catalogue import Entry
from distdl.data.index import TOKENIZER_FILE
from distdl.data.prepare.building import Building
from distdl.data.prepare.choosing import (
    Part,
    choose_classes,
    choose_columns,
    choose_decoding,
    choose_splits,
    choose_tokenizer,
    sample_ranges,
)
from distdl.data.prepare.convert import Conversion
from distdl.data.prepare.options import Options
from distdl.data.prepare.readers import Source, in_tables, read_ids
from distdl.data.prepare.shards import Job
from distdl.data.prepare.sources import unrolled
from distdl.data.prepare.writer import BATCH_BYTES, BATCH_ROWS, write_durable


@dataclass(frozen=True)
class Draft:
    """Everything that is decided before the first shard is written."""

    parts: dict[str, Part]
    conversion: Conversion
    schema: pa.Schema
    jobs: dict[str, list[Job]]
    row_bytes: float


def make_draft(source: Source, options: Options, entry: Entry | None, made: Building) -> Draft:
    parts = choose_splits(source, entry.splits if entry else None, options)
    conversion = choose_columns(source, options, entry.class_names if entry else None)
    conversion = choose_decoding(conversion, source, options)
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
    return Draft(parts, conversion, schema, jobs, row_bytes)


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
