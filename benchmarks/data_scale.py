"""That size costs nothing: opening, memory and order for 10^5, 10^7 and 10^9 rows.

    python benchmarks/data_scale.py [--rows 100000 10000000] [--shards 1000]

Writes generated prepared datasets of small rows, a number and a short list each, and prints for each the time
to open it and the anonymous memory (RssAnon of /proc/self/status; mapped pages do not count) after many
random batches through the loader, in a process of its own; then the time of a batch of 256 ids at 10^9 rows.
Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from distdl.data.index import Column, Index, Offsets, Shard, Split, hash_file
from distdl.data.order.kinds import make_order

BATCHES = 2000
LONGEST = 3
MOST_OPENING_S, MOST_GROWTH_MB, MOST_ORDER_MS = 1.0, 50.0, 1.0


def write(folder: Path, rows: int, shards: int) -> None:
    """A prepared dataset: int64 `x` is the row number, and `t` a list of int32, x % 4 times the row number.

    The hashes of its shards are made up.
    """
    (folder / "train" / "offsets").mkdir(parents=True)
    ends = np.concatenate([[0], np.cumsum(np.arange(rows) % (LONGEST + 1))])
    found = []
    for number in range(shards):
        a, b = rows * number // shards, rows * (number + 1) // shards
        name = f"train/data-{number:05d}-of-{shards:05d}.arrow"
        numbers = np.arange(a, b)
        items = np.repeat(numbers, np.diff(ends[a : b + 1])).astype(np.int32)
        lists = pa.ListArray.from_arrays((ends[a : b + 1] - ends[a]).astype(np.int32), pa.array(items))
        table = pa.table({"x": numbers, "t": lists})
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=4096)
        size = (folder / name).stat().st_size
        found.append(Shard(file=name, bytes=size, hash=f"{number:032x}", rows=b - a))
    path = folder / "train" / "offsets" / "t.npy"
    np.save(path, ends)
    offsets = Offsets(
        file="train/offsets/t.npy",
        bytes=path.stat().st_size,
        hash=hash_file(path),
        total=int(ends[-1]),
        longest=LONGEST,
    )
    split = Split(shards=tuple(found), offsets={"t": offsets})
    columns = {"x": Column(dtype="int64"), "t": Column(dtype="int32", shape=(None,))}
    index = Index(name="generated", columns=columns, splits={"train": split})
    (folder / "index.json").write_text(index.to_json())


def anonymous_mb() -> float:
    """Memory of this process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(folder: Path) -> None:
    """Print seconds to open, and RssAnon in MB after random batches, every one checked."""
    import torch  # its memory and import time are not the dataset's

    from distdl.data import ShardedDataset, loader

    begin = time.perf_counter()
    data = ShardedDataset(folder)
    opened = time.perf_counter() - begin
    with loader(data, 256) as batches:
        done = 0
        while done < BATCHES:
            for batch in batches:
                numbers, lengths = batch["x"], batch["t_lengths"]
                assert torch.equal(lengths, numbers % (LONGEST + 1))
                assert torch.equal(batch["t"].sum(1), numbers * lengths)
                done += 1
                if done == BATCHES:
                    break
    print(opened, anonymous_mb())


def main() -> int:
    """The exit status: 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**7])
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return 0
    memory, opening = [], []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "d", rows, options.shards)
            command = [sys.executable, __file__, "--measure", f"{folder}/d"]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        opened, anonymous = map(float, out.split())
        memory.append(anonymous)
        opening.append(opened)
        print(
            f"{rows:>13,} rows, {options.shards} shards: opened in {opened:.3f} s, RssAnon {anonymous:.0f} MB"
        )
    growth = memory[-1] - memory[0]
    print(f"growth of RssAnon: {growth:.1f} MB (wanted: below {MOST_GROWTH_MB:.0f})")
    print(f"longest opening: {max(opening):.3f} s (wanted: below {MOST_OPENING_S:.0f})")
    order = make_order("full", seed=0, rows=10**9)
    begin = time.perf_counter()
    for number in range(500):
        order.ids(0, number * 256, number * 256 + 256)
    order_ms = (time.perf_counter() - begin) * 2
    print(f"order full at 10^9 rows: {order_ms:.3f} ms a batch (wanted: below {MOST_ORDER_MS:.0f})")
    return int(growth >= MOST_GROWTH_MB or max(opening) >= MOST_OPENING_S or order_ms >= MOST_ORDER_MS)


if __name__ == "__main__":
    sys.exit(main())
