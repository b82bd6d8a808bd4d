"""That size costs nothing: opening, memory and order for 10^5, 10^7 and 10^9 rows.

    python benchmarks/data_scale.py [--rows 100000 10000000] [--shards 1000]

Writes generated prepared datasets of small rows, and prints for each the time to open it and the anonymous
memory (RssAnon of /proc/self/status; mapped pages do not count) after many random batches through the loader,
in a process of its own; then the time of a batch of 256 ids at 10^9 rows.
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

from distdl.data.index import Column, Index, Shard, Split
from distdl.data.order.kinds import make_order

BATCHES = 2000


def write(folder: Path, rows: int, shards: int) -> None:
    """A prepared dataset with one int64 column that is the row number. Its hashes are made up."""
    (folder / "train").mkdir(parents=True)
    found = []
    for number in range(shards):
        a, b = rows * number // shards, rows * (number + 1) // shards
        name = f"train/data-{number:05d}-of-{shards:05d}.arrow"
        table = pa.table({"x": np.arange(a, b)})
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=4096)
        size = (folder / name).stat().st_size
        found.append(Shard(file=name, bytes=size, hash=f"{number:032x}", rows=b - a))
    split = Split(shards=tuple(found))
    index = Index(name="generated", columns={"x": Column(dtype="int64")}, splits={"train": split})
    (folder / "index.json").write_text(index.to_json())


def anonymous_mb() -> float:
    """Memory of this process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(folder: Path) -> None:
    """Print seconds to open, and RssAnon in MB after random batches, every one checked."""
    import torch  # noqa: F401 - its memory and import time are not the dataset's

    from distdl.data import ShardedDataset, loader

    begin = time.perf_counter()
    data = ShardedDataset(folder)
    opened = time.perf_counter() - begin
    with loader(data, 256) as batches:
        done = 0
        while done < BATCHES:
            for batch in batches:
                assert batch["x"].min() >= 0
                done += 1
                if done == BATCHES:
                    break
    print(opened, anonymous_mb())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**7])
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    memory = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "d", rows, options.shards)
            command = [sys.executable, __file__, "--measure", f"{folder}/d"]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        opened, anonymous = map(float, out.split())
        memory.append(anonymous)
        print(
            f"{rows:>13,} rows, {options.shards} shards: opened in {opened:.3f} s, RssAnon {anonymous:.0f} MB"
        )
    print(f"growth of RssAnon: {memory[-1] - memory[0]:.1f} MB (wanted: below 50)")
    order = make_order("full", seed=0, rows=10**9)
    begin = time.perf_counter()
    for number in range(500):
        order.ids(0, number * 256, number * 256 + 256)
    print(f"order full at 10^9 rows: {(time.perf_counter() - begin) * 2:.3f} ms a batch (wanted: below 1)")


if __name__ == "__main__":
    main()
