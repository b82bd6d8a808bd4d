"""How fast loaders hand out shuffled batches of 256 from warm files: ours, others, and what memory allows.

Images: 32 x 32 x 3 uint8. Tokens: int32 sequences, lengths log-normal (mean about 60), padded by every
contestant to the longest of the batch. No decoding, no transform; each hands out torch tensors of the same
content. The contestants take turns, in another order each round; medians of the rounds, and ratios.

    python benchmarks/loaders.py [--quick] [--rounds 3] [--rows 200000] [--only NAME ...]

`limit` is numpy on a memory map with a permutation in memory: a batched take for images; for tokens one file
of values, offsets, one take and one scatter into the padded batch. Contestants slower than that are measured
over fewer rows, for `--seconds` a turn. LitData and WebDataset: pip install litdata webdataset.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from distdl.data import ArrowTable, loader, make_order
from distdl.data.table.ragged import span_index

BATCH = 256
SHARDS = 4
Contestant = Callable[[Path, str], Iterator[int]]
"""(folder, "images" or "tokens") -> an endless iterator of batches, each given as its number of rows."""


def make_rows(rows: int) -> dict[str, Any]:
    """Images [rows, 32, 32, 3] uint8; token values int32 [total] and offsets int64 [rows + 1]."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(3.94, 0.55, rows)), 1, 2000).astype(np.int64)
    return {
        "images": rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8),
        "tokens": rng.integers(1, 30_000, int(lengths.sum()), dtype=np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
    }


def write(folder: Path, data: dict[str, Any]) -> None:
    """The same rows for each contestant."""
    for name, array in data.items():
        np.save(folder / f"{name}.npy", array)
    rows = len(data["images"])
    for shard in range(SHARDS):
        a, b = rows * shard // SHARDS, rows * (shard + 1) // SHARDS
        for file, what in (("images", "images"), ("flat", "images"), ("tokens", "tokens")):
            table = pa.table({what: _column(data, file, a, b)})
            with (
                pa.OSFile(str(folder / f"{file}-{shard}.arrow"), "wb") as sink,
                pa.ipc.new_stream(sink, table.schema) as writer,
            ):
                writer.write_table(table, max_chunksize=4096)


def _column(data: dict[str, Any], what: str, a: int, b: int) -> pa.Array:
    offsets = data["offsets"]
    if what == "tokens":
        values = pa.array(data["tokens"][offsets[a] : offsets[b]])
        return pa.ListArray.from_arrays((offsets[a : b + 1] - offsets[a]).astype(np.int32), values)
    column = pa.array(data["images"][a:b].reshape(-1))
    for size in (3072,) if what == "flat" else (3, 32, 32):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def ours(folder: Path, what: str) -> Iterator[int]:
    """`distdl.data.loader` as it is by default."""
    files = [folder / f"{what}-{shard}.arrow" for shard in range(SHARDS)]
    with loader(ArrowTable(files), BATCH, drop_last=True) as batches:
        while True:
            for batch in batches:
                yield len(batch[what])


def limit(folder: Path, what: str) -> Iterator[int]:
    """numpy alone."""
    values = np.load(folder / f"{what}.npy", mmap_mode="r")
    offsets = np.load(folder / "offsets.npy")
    for epoch in itertools.count():
        ids = np.random.default_rng(epoch).permutation(len(offsets) - 1)
        for start in range(0, len(ids) - BATCH + 1, BATCH):
            chosen = ids[start : start + BATCH]
            images = what == "images"
            found = np.take(values, chosen, axis=0) if images else _padded(values, offsets, chosen)
            yield len(torch.from_numpy(found))


def _padded(values: Any, offsets: Any, ids: Any) -> Any:
    starts = offsets[ids]
    lengths = offsets[ids + 1] - starts
    longest = int(lengths.max())
    out = np.zeros((len(ids), longest), values.dtype)
    target = span_index(np.arange(len(ids)) * longest, lengths)
    out.reshape(-1)[target] = np.take(values, span_index(starts, lengths))
    return out


def _pad_list(rows: list[Any]) -> torch.Tensor:
    parts = [torch.as_tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def _collate(what: str) -> Callable[[list[Any]], torch.Tensor]:
    if what == "tokens":
        return lambda rows: _pad_list([row[what] for row in rows])
    # `datasets` hands out int64 for lists of uint8.
    return lambda rows: (
        torch.stack([torch.as_tensor(r[what]) for r in rows]).to(torch.uint8).view(-1, 32, 32, 3)
    )


def _hugging_face(folder: Path, what: str, kind: str) -> Any:
    import datasets

    parts = [datasets.Dataset.from_file(str(folder / f"{kind}-{shard}.arrow")) for shard in range(SHARDS)]
    return datasets.concatenate_datasets(parts)


def _hugging_face_arrays(folder: Path, what: str) -> Any:
    """Images as the feature that its documentation names for arrays of one shape."""
    import datasets
    from datasets.features.features import Array3DExtensionType

    target = folder / "array3d"
    if what == "images" and not target.exists():
        parts = []
        for shard in range(SHARDS):
            with pa.OSFile(str(folder / f"flat-{shard}.arrow"), "rb") as file:
                flat = pa.ipc.open_stream(file).read_all().column(what).combine_chunks().values
            for size in (3, 32, 32):
                offsets = pa.array(np.arange(0, len(flat) + 1, size, dtype=np.int32))
                flat = pa.ListArray.from_arrays(offsets, flat)
            kind = Array3DExtensionType((32, 32, 3), "uint8")
            parts.append(pa.table({what: pa.ExtensionArray.from_storage(kind, flat)}))
        datasets.Dataset(pa.concat_tables(parts)).save_to_disk(str(target))
    return datasets.load_from_disk(str(target)) if what == "images" else _hugging_face(folder, what, what)


def hf_loader(folder: Path, what: str) -> Iterator[int]:
    """torch's DataLoader on a `datasets.Dataset` in torch format; images as the feature `Array3D`."""
    yield from _loaded(_hugging_face_arrays(folder, what).with_format("torch"), what, shuffle=True)


def hf_flat(folder: Path, what: str) -> Iterator[int]:
    """The same with images flattened by hand to one list of fixed size a row, which suits it best."""
    kind = "flat" if what == "images" else what
    yield from _loaded(_hugging_face(folder, what, kind).with_format("torch"), what, shuffle=True)


def hf_iterable(folder: Path, what: str) -> Iterator[int]:
    """The same as an iterable dataset with a shuffle buffer of 10,000 rows."""
    data = _hugging_face_arrays(folder, what).to_iterable_dataset(SHARDS).shuffle(seed=0, buffer_size=10_000)
    yield from _loaded(data.with_format("torch"), what)


def litdata(folder: Path, what: str) -> Iterator[int]:
    """LitData's StreamingDataset, on its own chunks."""
    import litdata as lit

    target = folder / f"litdata-{what}"
    if not target.exists():
        lit.optimize(
            fn=_Row(folder, what), inputs=list(range(_rows(folder))), output_dir=str(target),
            chunk_bytes="64MB", num_workers=1, verbose=False,
        )  # fmt: skip
    data = lit.StreamingDataset(str(target), shuffle=True, drop_last=False)
    while True:
        for batch in lit.StreamingDataLoader(data, batch_size=BATCH, collate_fn=_collate(what)):
            yield len(batch)


def webdataset(folder: Path, what: str) -> Iterator[int]:
    """WebDataset with tar files of .npy members and a shuffle buffer of 10,000 rows."""
    import webdataset as wds

    target, row = folder / f"webdataset-{what}", _Row(folder, what)
    if not target.exists():
        target.mkdir()
        with wds.ShardWriter(
            str(target / "%04d.tar"), maxcount=_rows(folder) // SHARDS + 1, verbose=0
        ) as sink:
            for number in range(_rows(folder)):
                raw = io.BytesIO()
                np.save(raw, row(number)[what])
                sink.write({"__key__": f"{number:08d}", f"{what}.npy": raw.getvalue()})
    files = sorted(str(file) for file in target.glob("*.tar"))
    data = wds.WebDataset(files, shardshuffle=SHARDS).shuffle(10_000).decode().rename(**{what: f"{what}.npy"})
    yield from _loaded(data, what)


class _Row:
    """One row of the .npy files; picklable, for writers with processes of their own."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what

    def __call__(self, number: int) -> dict[str, Any]:
        values = np.load(self.folder / f"{self.what}.npy", mmap_mode="r")
        if self.what == "images":
            return {self.what: np.array(values[number])}
        offsets = np.load(self.folder / "offsets.npy", mmap_mode="r")
        return {self.what: np.array(values[offsets[number] : offsets[number + 1]])}


def _rows(folder: Path) -> int:
    return len(np.load(folder / "offsets.npy", mmap_mode="r")) - 1


def _loaded(data: Any, what: str, **options: Any) -> Iterator[int]:
    collate = _collate(what)
    while True:
        batches = torch.utils.data.DataLoader(data, BATCH, drop_last=True, collate_fn=collate, **options)
        for batch in batches:
            yield len(batch)


CONTESTANTS: dict[str, Contestant] = {
    "distdl": ours,
    "limit": limit,
    "hf_loader": hf_loader,
    "hf_flat": hf_flat,
    "hf_iterable": hf_iterable,
    "litdata": litdata,
    "webdataset": webdataset,
}


def padding(offsets: Any, kind: str) -> float:
    """Real tokens over padded tokens in an epoch of batches in order `kind`, with its default window."""
    rows = len(offsets) - 1
    order = make_order(kind, seed=0, rows=rows, batch=BATCH, offsets=offsets)
    lengths = np.diff(offsets)[order.ids(0, 0, rows)]
    return float(lengths.sum() / sum(b.max() * len(b) for b in np.split(lengths, range(BATCH, rows, BATCH))))


def rate(batches: Iterator[int], seconds: float, most: int) -> float:
    """Samples a second, over `seconds` or `most` batches, whichever ends first."""
    begin, samples = time.perf_counter(), 0
    for count in itertools.islice(batches, most):
        samples += count
        if time.perf_counter() - begin > seconds:
            break
    return samples / (time.perf_counter() - begin)


def _warm(name: str, folder: Path, what: str, options: argparse.Namespace) -> Iterator[int] | None:
    batches = CONTESTANTS[name](folder, what)
    try:
        rate(batches, options.seconds, 2 * options.rows // BATCH)
    except ImportError as error:
        print(f"{name}: not installed ({error})")
        return None
    return batches


def contest(folder: Path, what: str, names: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Median samples a second of each contestant that runs here."""
    running = {name: found for name in names if (found := _warm(name, folder, what, options))}
    rates: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(options.rounds):
        for name in sorted(running, reverse=bool(turn % 2)):
            rates[name].append(rate(running[name], options.seconds, options.rows // BATCH))
    for batches in running.values():
        batches.close()  # type: ignore[attr-defined]
    return {name: statistics.median(found) for name, found in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--quick", action="store_true", help="20,000 rows, a second a turn")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.seconds = min(options.rows, 20_000), 1.0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), make_rows(options.rows))
        for what in ("images", "tokens"):
            found = contest(Path(folder), what, options.only, options)
            print(f"\n{what}: {options.rows} rows, batch {BATCH}, median of {options.rounds} rounds")
            print(f"{'':14}{'samples/s':>12}{'distdl / it':>14}")
            for name, value in sorted(found.items(), key=lambda pair: -pair[1]):
                ratio = f"{found['distdl'] / value:14.2f}" if "distdl" in found else ""
                print(f"{name:14}{value:12,.0f}{ratio}")
        offsets = np.load(Path(folder) / "offsets.npy")
        found = {kind: padding(offsets, kind) for kind in ("full", "length_bucketed")}
        print("\nreal over padded tokens: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))


if __name__ == "__main__":
    main()
