"""A small folder of images as ImageNet's, to try the recipe with: colours, several sizes, a folder a class.

python -m examples.image_folder.make_folder FOLDER [--images N]

The pictures are those that come with distdl (Fashion-MNIST), enlarged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from distdl.data import ShardedDataset


def make(folder: Path, images: int) -> None:
    """Write `images` pictures for training and a quarter as many for validation: SPLIT/CLASS/NUMBER.JPEG."""
    for split, of, count in (("train", "train", images), ("val", "test", images // 4)):
        dataset = ShardedDataset("fashion_mnist", of)
        rows = dataset.gather(np.arange(count))
        names = dataset.info.fields["label"].classes
        for number, (pixels, label) in enumerate(zip(rows["image"], rows["label"], strict=True)):
            file = folder / split / names[label].replace("/", " ") / f"{number:05d}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            size = (64 + 8 * (number % 5), 64)
            Image.fromarray(pixels).convert("RGB").resize(size).save(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=400)
    given = parser.parse_args()
    make(given.folder, given.images)
