"""Make the subset of Fashion-MNIST that lies inside the package, as Parquet, from the four IDX files.

    python benchmarks/fashion_mnist.py --idx FOLDER --out distdl/data/embedded/fashion_mnist

A seeded choice of 10,000 + 2,000 images with every class equally often, in the order of the original. Same
input, same rows. All 70,000 images: distdl data prepare fashion_mnist --from FOLDER --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distdl.data.catalogue import CATALOGUE
from distdl.data.order.kinds import Full
from distdl.data.prepare.idx import read_idx
from distdl.errors import DataError

CLASSES = list(CATALOGUE["fashion_mnist"].class_names or ())
IDX_PREFIX = {"train": "train", "test": "t10k"}
PER_CLASS = (1000, 200)
SUBSET_SEED = 20170825

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.uint8]


def read_split(folder: Path, split: str) -> tuple[Images, Labels]:
    """Images [N, 28, 28] and labels [N] of one split, gzipped or not."""
    arrays = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        plain = folder / f"{IDX_PREFIX[split]}-{kind}"
        arrays.append(read_idx(plain if plain.exists() else plain.with_name(plain.name + ".gz")))
    images, labels = arrays
    if images.shape[1:] != (28, 28) or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise DataError(
            f"{folder}: the {split} files hold images {images.shape} {images.dtype} and labels "
            f"{labels.shape}; expected [N, 28, 28] uint8 and [N]"
        )
    if labels.max(initial=0) >= len(CLASSES):
        raise DataError(
            f"{folder}: the {split} labels reach {labels.max()}; expected 0 to {len(CLASSES) - 1}"
        )
    return images, labels


def balanced(labels: Labels, per_class: int, seed: int) -> npt.NDArray[np.int64]:
    """Sorted indices of `per_class` samples of every class, chosen by `seed`."""
    chosen = []
    for label in range(len(CLASSES)):
        members = np.flatnonzero(labels == label)
        chosen.append(members[Full(seed + label, len(members)).ids(0, 0, per_class)])
    return np.sort(np.concatenate(chosen))


def table(images: Images, labels: Labels) -> pa.Table:
    """An Arrow table with Hugging Face features: image (28 x 28 uint8) and label (ten named classes)."""
    pixels = pa.array(images.reshape(-1))
    rows = pa.FixedSizeListArray.from_arrays(pixels, images.shape[2])
    columns = [pa.FixedSizeListArray.from_arrays(rows, images.shape[1]), pa.array(labels.astype(np.int64))]
    value = {"dtype": "uint8", "_type": "Value"}
    # "Sequence" rather than the newer "List": every version of datasets that we support reads it.
    line = {"feature": value, "length": images.shape[2], "_type": "Sequence"}
    features = {
        "image": {"feature": line, "length": images.shape[1], "_type": "Sequence"},
        "label": {"names": CLASSES, "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns, names=["image", "label"]).replace_schema_metadata(metadata)


def write(data: pa.Table, file: Path) -> None:
    """Write `file` whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        pq.write_table(data, partial, compression="zstd", compression_level=19)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{file}: {data.num_rows} rows, {file.stat().st_size / 1e6:.1f} MB")


def main(arguments: list[str] | None = None) -> int:
    """Parse, convert, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--idx", type=Path, required=True, metavar="FOLDER", help="the four IDX files")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the Parquet files go"
    )
    parser.add_argument(
        "--per-class", type=int, nargs=2, default=PER_CLASS, metavar=("TRAIN", "TEST"), help="images a class"
    )
    given = parser.parse_args(arguments)
    try:
        for split, per_class in zip(("train", "test"), given.per_class, strict=True):
            images, labels = read_split(given.idx, split)
            ids = balanced(labels, per_class, SUBSET_SEED)
            write(table(images[ids], labels[ids]), given.out / f"{split}.parquet")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
