"""What `distdl data prepare` can be told, and what a catalogue entry adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from distdl.data.catalogue import Entry
from distdl.errors import DataError

MAX_SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Options:
    """Options of `prepare`. Columns are named as the source names them, except after `rename`."""

    config: str | None = None
    """The configuration of a dataset on the hub."""
    shards: int | None = None
    """Shards of the largest split, the others in proportion; None: as `max_shard_bytes` says."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """About how large a shard may be, judged from a sample of rows."""
    columns: tuple[str, ...] | None = None
    """Columns to keep; None: all."""
    rename: Mapping[str, str] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    """Height and width to which images are resized; None: they need one size."""
    masks: tuple[str, ...] = ()
    """Columns (by their new names) of encoded images whose pixels are class numbers."""
    boxes: tuple[str, ...] = ()
    """Columns (by their new names) of lists of four pixel coordinates, resized as the images are."""
    grey: bool | None = None
    """Make all images grey (True) or coloured (False); None: grey only where all of them are."""
    sample_rate: int = 16_000
    """Hz: bands of sound reach up to half of it."""
    mels: int = 80
    """Bands of sound."""
    classes: tuple[str, ...] = ()
    """Columns (by their new names) of text that become class numbers."""
    tokenize: tuple[str, ...] = ()
    """Columns (by their new names) of text that become tokens."""
    tokenizer: str = "bpe"
    vocab_size: int = 16_000
    min_count: int = 2
    max_tokens: int | None = None
    holdout: Mapping[str, float] = field(default_factory=dict)
    """New split -> fraction of the rows of "train" that moves there, chosen by `seed`."""
    seed: int = 0
    decode: bool = True
    """Decode images and sounds; False leaves their encoded bytes as they are."""
    workers: int = 1
    overwrite: bool = False
    wait: bool = False
    """Wait for another process that prepares the same dataset, instead of refusing."""
    name: str | None = None

    def mathematics(self) -> dict[str, Any]:
        """The options that decide what comes out, as JSON; how it is made is left out."""
        how = ["workers", "overwrite", "wait"]
        # Not at their defaults: what was prepared before they were there is to be known again.
        later = ("sample_rate", "mels", "masks", "boxes", "grey")
        how += [name for name in later if getattr(self, name) == getattr(Options, name)]
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in how}
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in found.items()}

    def check(self) -> None:
        """Raises DataError for numbers out of their range."""
        wrong = {
            "--shards": (self.shards is not None and self.shards < 1, self.shards, "1 or more"),
            "--max-shard-bytes": (self.max_shard_bytes < 1, self.max_shard_bytes, "1 or more"),
            "--workers": (self.workers < 1, self.workers, "1 or more"),
            "--sample-rate": (self.sample_rate < 1000, self.sample_rate, "1000 Hz or more"),
            "--mels": (self.mels < 1, self.mels, "1 or more"),
            "--vocab-size": (self.vocab_size < 5, self.vocab_size, "5 or more"),
            "--min-count": (self.min_count < 1, self.min_count, "1 or more"),
            "--max-tokens": (
                self.max_tokens is not None and self.max_tokens < 1,
                self.max_tokens,
                "1 or more",
            ),
            "--image-size": (
                self.image_size is not None and min(self.image_size) < 1,
                self.image_size,
                "1 or more",
            ),
        }
        for name, (bad, value, expected) in wrong.items():
            if bad:
                raise DataError(f"{name} is {value}; expected {expected}")
        total = sum(self.holdout.values())
        if any(not 0 < f < 1 for f in self.holdout.values()) or total >= 1:
            raise DataError(
                f"--holdout {dict(self.holdout)}: expected fractions above 0 that sum to less than 1"
            )


def with_entry(options: Options, entry: Entry | None, columns: list[str]) -> Options:
    """`options`, and where they are silent, what `entry` says of columns that the source has."""
    if entry is None:
        return options
    names = {old: new for old, new in entry.rename.items() if old in columns}
    kept = tuple(c for c in entry.columns or () if c in columns)
    renamed = {names.get(c, c) for c in columns}
    tokenize = tuple(c for c in entry.tokenize if c in renamed)
    return replace(
        options,
        columns=options.columns or kept or None,
        rename={**names, **options.rename},
        image_size=options.image_size or entry.image_size,
        tokenize=options.tokenize or tokenize,
        tokenizer=entry.tokenizer
        if not options.tokenize and options.tokenizer == "bpe"
        else options.tokenizer,
        max_tokens=options.max_tokens or (entry.max_tokens if not options.tokenize else None),
    )
