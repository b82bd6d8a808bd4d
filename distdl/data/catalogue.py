"""Datasets by name: where each is on the hub, how it is prepared, and which come with the package."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distdl.errors import DataError, nearest

_EMBEDDED = Path(__file__).resolve().parent / "embedded"

DATA_VARIABLE = "DISTDL_DATA"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class Entry:
    """One dataset: where it comes from and the options it is prepared with unless others are given."""

    hub: str
    """Its id on the hub, or a folder inside this package."""
    licence: str
    config: str | None = None
    columns: tuple[str, ...] | None = None
    """Columns that are kept, by the hub's names; None: all."""
    rename: Mapping[str, str] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    tokenize: tuple[str, ...] = ()
    tokenizer: str = "bpe"
    max_tokens: int | None = None
    splits: tuple[str, ...] = ("train", "test")
    class_names: tuple[str, ...] | None = None
    """Names of the classes, for sources that only number them."""
    embedded: Path | None = None
    """A folder inside this package, of Parquet files or prepared: nothing to download, maybe a subset."""


CATALOGUE: dict[str, Entry] = {
    "fashion_mnist": Entry(
        "zalando-datasets/fashion_mnist", "MIT", class_names=_FASHION, embedded=_EMBEDDED / "fashion_mnist"
    ),
    "sentiment": Entry(
        str(_EMBEDDED / "sentiment" / "text"),
        "MIT",
        tokenize=("text",),
        embedded=_EMBEDDED / "sentiment",
    ),
    "mnist": Entry("ylecun/mnist", "not stated by its authors"),
    "cifar10": Entry("uoft-cs/cifar10", "not stated by its authors", rename={"img": "image"}),
    "cifar100": Entry(
        "uoft-cs/cifar100",
        "not stated by its authors",
        columns=("img", "fine_label"),
        rename={"img": "image", "fine_label": "label"},
    ),
    "imagenet-1k": Entry(
        "ILSVRC/imagenet-1k",
        "ImageNet terms of access (research, no redistribution)",
        image_size=(224, 224),
        splits=("train", "validation"),
    ),
    "ag_news": Entry("fancyzhx/ag_news", "not stated by its authors", tokenize=("text",), max_tokens=256),
    "imdb": Entry("stanfordnlp/imdb", "not stated by its authors", tokenize=("text",), max_tokens=512),
    "wikitext-2": Entry(
        "Salesforce/wikitext",
        "CC BY-SA 3.0",
        config="wikitext-2-raw-v1",
        tokenize=("text",),
        splits=("train", "validation", "test"),
    ),
    "wikitext-103": Entry(
        "Salesforce/wikitext",
        "CC BY-SA 3.0",
        config="wikitext-103-raw-v1",
        tokenize=("text",),
        splits=("train", "validation", "test"),
    ),
    "multi30k": Entry(
        "bentrevett/multi30k",
        "not stated; research use",
        tokenize=("en", "de"),
        splits=("train", "validation", "test"),
    ),
    "ptb": Entry(
        "ptb-text-only/ptb_text_only",
        "Linguistic Data Consortium user agreement",
        rename={"sentence": "text"},
        tokenize=("text",),
        tokenizer="space",
        splits=("train", "validation", "test"),
    ),
}
"""Name -> entry."""


def data_folder(environ: Mapping[str, str]) -> Path:
    """Where prepared datasets are looked for by name: `$DISTDL_DATA`, or ./data."""
    return Path(environ.get(DATA_VARIABLE) or "data").expanduser()


def is_embedded(folder: Path) -> bool:
    """Whether it is one of those that come with this package."""
    return folder.is_relative_to(_EMBEDDED)


def locate(name: str | None, path: str | Path | None, environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of the dataset `name` (a catalogue name or hub id) or `path`; give exactly one.

    Never looks at a hub: what is not embedded must have been prepared, at `$DISTDL_DATA/NAME` (default
    ./data/NAME). Raises DataError with the command that prepares it.
    """
    if (name is None) == (path is None):
        raise DataError(
            f"data.name is {name!r} and data.path is {path and str(path)!r}; give exactly one of them"
        )
    if path is not None:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise DataError(
                f"the data folder {folder} {what}; expected a folder made by `distdl data prepare` or by "
                "`save_to_disk` of Hugging Face datasets, or one of Parquet files"
            )
        return folder
    assert name is not None
    entry = CATALOGUE.get(name)
    if entry is None and not _HUB_ID.fullmatch(name):
        raise DataError(
            f"data.name is {name!r}, which is no known dataset{nearest(name, CATALOGUE) or '.'} "
            f"Known names: {', '.join(sorted(CATALOGUE))}; or a hub id, owner/name. For files of your own, "
            "give data.path."
        )
    if entry is not None and entry.embedded is not None:
        return entry.embedded
    folder = data_folder(environ) / name
    if not folder.is_dir():
        raise DataError(
            f"the dataset {name!r} is not prepared: there is no folder {folder}. Run this once, where "
            f"there is a network:  distdl data prepare {name} --out {folder}  (or with --from FOLDER, for "
            f"files you have). It is looked for in ${DATA_VARIABLE}, or ./data."
        )
    return folder


def title(name: str | None, path: str | Path | None) -> str:
    """What to call the dataset: its catalogue name, or the last part of its path."""
    return name or Path(path or "").expanduser().resolve().name
