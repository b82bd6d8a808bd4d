"""Cut the rated sentences that come with the package into folds, as files that `distdl data prepare` reads.

    python benchmarks/folds.py --folds 5 --out data/in/sentiment
    distdl data prepare data/in/sentiment/fold0 --tokenize text --classes label --out data/sentiment/fold0

Each sentence is tested on in one fold and trained on in the others; which, a seeded permutation says.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distdl.data.catalogue import locate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    text = locate("sentiment", None) / "text"
    rows = pa.concat_tables([pq.read_table(text / f"{split}.parquet") for split in ("train", "test")])
    places = np.random.default_rng(options.seed).permutation(len(rows))
    for number, tested in enumerate(np.array_split(places, options.folds)):
        folder = options.out / f"fold{number}"
        folder.mkdir(parents=True, exist_ok=True)
        trained = np.setdiff1d(places, tested)
        for split, ids in (("train", trained), ("test", np.sort(tested))):
            pq.write_table(rows.take(ids), folder / f"{split}.parquet")
        print(f"{folder}: {len(trained)} to train on, {len(tested)} to test on")


if __name__ == "__main__":
    main()
