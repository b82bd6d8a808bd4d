"""Compose scenes of garments for detection and segmentation: Fashion-MNIST -> a prepared dataset.

    python benchmarks/scenes.py                                       the images that come with the package
    python benchmarks/scenes.py --images data/fashion_mnist_full      all 60,000 + 10,000, once prepared

A scene is 96x96 pixels with one to four garments, none overlapping another. Columns: `image` and `mask`
(uint8 [96, 96]; 0 where there is no garment, else its class + 1), `boxes` (float32 [k, 4]: left, top, right,
bottom of its pixels) and `classes` (int64 [k]). Scenes of the training split are made of training images,
those of the test split of test images. Same images, sizes and seed: same scenes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distdl.data import open_split, ready
from distdl.data.huggingface import class_label, with_features
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.errors import DistdlError

SIDE = 96
MOST = 4
_TRIES = 100

Pixels = npt.NDArray[np.uint8]


def scene(garments: list[Pixels], labels: list[int], rng: np.random.Generator) -> dict[str, Any]:
    """One row: each garment (uint8 [h, w], cut to its pixels) at a random place where no other is.

    One that finds no place is left out; the first always does.
    """
    image, mask = np.zeros((2, SIDE, SIDE), np.uint8)
    boxes: list[list[float]] = []
    classes: list[int] = []
    for garment, label in zip(garments, labels, strict=True):
        height, width = garment.shape
        for _ in range(_TRIES):
            top, left = rng.integers(SIDE - height + 1), rng.integers(SIDE - width + 1)
            bottom, right = top + height, left + width
            if all(right <= b[0] or b[2] <= left or bottom <= b[1] or b[3] <= top for b in boxes):
                image[top:bottom, left:right] = garment
                mask[top:bottom, left:right] = (garment > 0) * (label + 1)
                boxes.append([left, top, right, bottom])
                classes.append(label)
                break
    return {"image": image, "mask": mask, "boxes": boxes, "classes": classes}


def cut(image: Pixels) -> Pixels:
    """The part of `image` that holds all pixels above 0; one pixel where there is none."""
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    if not len(rows):
        return image[:1, :1]
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def scenes(
    images: Pixels, labels: npt.NDArray[np.int64], names: Sequence[str], count: int, seed: list[int]
) -> pa.Table:
    """`count` scenes, the i-th drawn from (seed, i) alone; `names` of the classes go along."""
    made = []
    for i in range(count):
        rng = np.random.default_rng([*seed, i])
        ids = rng.choice(len(images), rng.integers(1, MOST + 1), replace=False)
        made.append(scene([cut(images[n]) for n in ids], [int(labels[n]) for n in ids], rng))
    square = pa.list_(pa.list_(pa.uint8(), SIDE), SIDE)
    types = {
        "image": square,
        "mask": square,
        "boxes": pa.list_(pa.list_(pa.float32(), 4)),
        "classes": pa.list_(pa.int64()),
    }
    columns = {
        name: _squares([row[name] for row in made])
        if kind is square
        else pa.array([r[name] for r in made], kind)
        for name, kind in types.items()
    }
    table = pa.table(columns)
    named = {"classes": {"feature": class_label(names), "length": -1, "_type": "Sequence"}}
    return table.cast(with_features(table.schema, named))


def _squares(images: list[Pixels]) -> pa.Array:
    """Without a Python number for each pixel, which would take gigabytes."""
    lines = pa.FixedSizeListArray.from_arrays(pa.array(np.stack(images).reshape(-1)), SIDE)
    return pa.FixedSizeListArray.from_arrays(lines, SIDE)


def compose(source: str, out: Path, counts: dict[str, int], seed: int, overwrite: bool = False) -> None:
    """Scenes of the images of `source`, a catalogue name or a folder, prepared at `out`. Raises DataError."""
    named = Path(source).is_dir()
    data = ready(None if named else source, source if named else None)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (split, count) in enumerate(counts.items()):
            table = open_split(data, split, ("image", "label"))
            rows = table.gather(np.arange(data.info.rows[split]))
            made = scenes(
                rows["image"], rows["label"], data.info.fields["label"].classes, count, [seed, number]
            )
            pq.write_table(made, Path(scratch) / f"{split}.parquet")
        prepare(scratch, out, Options(overwrite=overwrite, name="scenes"))


def main(arguments: list[str] | None = None) -> int:
    """Parse, compose, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--images", default="fashion_mnist", help="prepared Fashion-MNIST: a name or a folder"
    )
    parser.add_argument("--out", type=Path, default=Path("data/scenes"), metavar="FOLDER")
    parser.add_argument("--train", type=int, default=8000, help="scenes of the training split")
    parser.add_argument("--test", type=int, default=2000, help="scenes of the test split")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset made before")
    given = parser.parse_args(arguments)
    if (given.out / "index.json").exists() and not given.overwrite:
        print(f"{given.out} is there already; --overwrite makes it anew")
        return 0
    try:
        compose(
            given.images, given.out, {"train": given.train, "test": given.test}, given.seed, given.overwrite
        )
    except DistdlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{given.out}: {given.train} + {given.test} scenes of {given.images}, seed {given.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
