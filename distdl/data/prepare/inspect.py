"""Look at a prepared dataset: what is in it, whether it is whole, its first rows. For people."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distdl.data.huggingface import columns_of, unnest
from distdl.data.index import (
    TOKENIZER_FILE,
    DataFile,
    Index,
    Offsets,
    Shard,
    hash_file,
    read_index,
    resolve,
)
from distdl.data.prepare.tokenize import decode
from distdl.errors import DataError

_THREADS = 4
_SHOWN_VALUES = 12


def summary(folder: Path) -> dict[str, Any]:
    """What the index says, as JSON: rows, columns, shards, bytes, lengths. Raises DataError."""
    index = read_index(folder)
    return {
        "name": index.name,
        "fingerprint": index.fingerprint,
        "bytes": sum(file.bytes for file in index.files()),
        "columns": {
            name: {
                "dtype": c.dtype,
                "shape": list(c.shape),
                "classes": list(c.classes) if c.classes else None,
            }
            for name, c in index.columns.items()
        },
        "splits": {
            name: {
                "rows": split.rows,
                "shards": len(split.shards),
                "bytes": sum(shard.bytes for shard in split.shards),
                "lengths": {
                    column: {"mean": o.total / max(split.rows, 1), "longest": o.longest, "total": o.total}
                    for column, o in split.offsets.items()
                },
            }
            for name, split in index.splits.items()
        },
        "prepared": index.prepared,
    }


def summary_lines(found: dict[str, Any]) -> Iterator[str]:
    """`summary` as lines of text."""
    yield f"{found['name']}  {found['bytes'] / 1e6:,.1f} MB  fingerprint {found['fingerprint']}"
    for name, split in found["splits"].items():
        shards = f"{split['shards']} shard{'s' if split['shards'] != 1 else ''}"
        yield f"split {name}: {split['rows']:,} rows, {shards}, {split['bytes'] / 1e6:,.1f} MB"
        for column, lengths in split["lengths"].items():
            yield f"  {column}: length {lengths['mean']:.1f} on average, {lengths['longest']} at most"
    for name, column in found["columns"].items():
        shape = " x ".join("varies" if n is None else str(n) for n in column["shape"])
        classes = column["classes"]
        few = f", {len(classes)} classes: {', '.join(classes[:10])}" if classes else ""
        more = ", ..." if classes and len(classes) > 10 else ""
        yield f"column {name}: {column['dtype']}{f' [{shape}]' if shape else ''}{few}{more}"
    for name, value in found["prepared"].items():
        yield f"{name}: {value}"


def verify(folder: Path) -> Index:
    """Read every byte of the dataset that lies on disks, and compare it with the index.

    Raises DataError that lists all files that are missing, of another size or hash, or hold other rows or
    columns than the index says.
    """
    index = read_index(folder)
    files = list({file.file: file for file in index.files()}.values())
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:  # hashing releases Python's lock
        problems = [p for p in pool.map(lambda file: _problem(folder, index, file), files) if p]
    problems += _offset_problems(folder, index) if not problems else []
    if problems:
        lines = "\n  ".join(problems)
        raise DataError(
            f"{folder} is damaged, {len(problems)} of {len(files)} files:\n  {lines}\n"
            "Prepare or copy it again."
        )
    return index


def unchecked(folder: Path, index: Index) -> int:
    """How many files of `index` lie behind URLs, which `verify` does not read."""
    return len({file.file for file in index.files() if "://" in resolve(folder, file.file)})


def _problem(folder: Path, index: Index, file: DataFile) -> str | None:
    path = resolve(folder, file.file)
    if "://" in path:
        return None
    try:
        size = os.stat(path).st_size
        if size != file.bytes:
            return f"{path}: {size} bytes, and the index says {file.bytes}"
        if hash_file(Path(path)) != file.hash:
            return f"{path}: its bytes are not those that were written (other hash)"
        return _shard_problem(path, index, file) if isinstance(file, Shard) else None
    except OSError as error:
        return f"{path}: {error.strerror or error}"


def _shard_problem(path: str, index: Index, shard: Shard) -> str | None:
    try:
        with pa.memory_map(path) as mapped, pa.ipc.open_stream(mapped) as reader:
            rows, columns = sum(batch.num_rows for batch in reader), columns_of(reader.schema)
    except (pa.ArrowException, OSError) as error:
        return f"{path}: no whole Arrow stream: {error}"
    if rows != shard.rows:
        return f"{path}: {rows} rows, and the index says {shard.rows}"
    if columns != index.columns:
        return f"{path}: columns {_names(columns)}, and the index says {_names(index.columns)}"
    return None


def _names(columns: Any) -> str:
    return ", ".join(f"{name}: {c.dtype} {list(c.shape)}" for name, c in columns.items())


def _offset_problems(folder: Path, index: Index) -> list[str]:
    problems = []
    for split in index.splits.values():
        for offsets in split.offsets.values():
            path = resolve(folder, offsets.file)
            if "://" not in path and not _offsets_agree(path, split.rows, offsets):
                problems.append(f"{path}: offsets that disagree with the index (rows, total or longest)")
    return problems


def _offsets_agree(path: str, rows: int, offsets: Offsets) -> bool:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return False
    if found.shape != (rows + 1,) or found.dtype != np.int64 or found[0] or found[-1] != offsets.total:
        return False
    lengths = np.diff(found)
    return bool(lengths.min(initial=0) >= 0 and lengths.max(initial=0) == offsets.longest)


def head(folder: Path, split: str, rows: int) -> Iterator[str]:
    """The first `rows` rows of `split`, a line for each column. Raises DataError."""
    index = read_index(folder)
    if split not in index.splits:
        raise DataError(f"{folder} has no split {split!r}. Its splits: {', '.join(index.splits)}")
    tokenizer = folder / TOKENIZER_FILE
    text = tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else None
    tokenized = index.prepared.get("options", {}).get("tokenize", ())
    left = rows
    for shard in index.splits[split].shards:
        path = resolve(folder, shard.file)
        try:
            with pa.memory_map(path) as mapped, pa.ipc.open_stream(mapped) as reader:
                for batch in reader:
                    for row in range(min(left, batch.num_rows)):
                        yield f"row {rows - left + row}"
                        for name, column in zip(batch.schema.names, batch.columns, strict=True):
                            classes = index.columns[name].classes if name in index.columns else None
                            tokens = text if name in tokenized else None
                            yield f"  {name}: {_shown(column[row], classes, tokens)}"
                    left -= min(left, batch.num_rows)
                    if not left:
                        return
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot read {path}: {error}. `distdl data verify {folder}`") from error


def _shown(value: pa.Scalar, classes: tuple[str, ...] | None, tokenizer: str | None) -> str:
    shape, leaf = unnest(value.type)
    if len(shape) > 1:
        return f"{leaf} {' x '.join(map(str, shape))}"
    found = value.as_py()
    if classes and isinstance(found, int):
        return f"{found} ({classes[found] if 0 <= found < len(classes) else 'no such class'})"
    if isinstance(found, list):
        few = ", ".join(map(str, found[:_SHOWN_VALUES])) + (", ..." if len(found) > _SHOWN_VALUES else "")
        words = f"  {decode(tokenizer, found)!r}" if tokenizer else ""
        return f"[{few}] ({len(found)}){words}"
    if isinstance(found, dict) and "bytes" in found:
        return f"encoded image, {len(found['bytes'] or b'')} bytes"
    return repr(found)
