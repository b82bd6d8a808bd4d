"""From a source and options to what is done to each row: columns, classes, images, tokens, splits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distdl.data.huggingface import class_label, class_names, has_type, is_image, is_sound, read_features
from distdl.data.order.kinds import Full
from distdl.data.prepare.convert import (
    Conversion,
    Picture,
    RowName,
    canonical,
    file_bytes,
    require_no_nulls,
    require_text,
)
from distdl.data.prepare.decode import is_grey
from distdl.data.prepare.options import Options
from distdl.data.prepare.readers import Ids, Source, in_tables, read_ids
from distdl.data.prepare.sound import Sound
from distdl.data.prepare.sound import is_sound as sounds_like
from distdl.data.prepare.tokenize import TRAINED, load_tokenizer, train_tokenizer
from distdl.errors import DataError, nearest

_SAMPLE_BLOCKS = 8
_SAMPLE_ROWS = 32
_SCAN_ROWS = 10_000


@dataclass(frozen=True)
class Part:
    """A split of the result: rows `ids` (ascending) of a split of the source."""

    source: str
    ids: Ids | range


def choose_splits(source: Source, keep: tuple[str, ...] | None, options: Options) -> dict[str, Part]:
    """The splits of the result. `keep` names those that are wanted of the source's, if it has any of them.

    Held-out rows are the first of a shuffled order of "train" (seed: `options.seed`); both halves stay in the
    order of the source. Raises DataError.
    """
    names = [s for s in source.splits if keep is None or s in keep] or list(source.splits)
    parts = {name: Part(name, range(source.rows(name))) for name in names}
    if not options.holdout:
        return parts
    if "train" not in parts:
        raise DataError(f"--holdout takes rows from split 'train', and there is none: {', '.join(names)}")
    rows = source.rows("train")
    at = 0
    order = Full(options.seed, rows)
    for name, fraction in options.holdout.items():
        if name in parts:
            raise DataError(f"--holdout {name}={fraction}: the source has a split {name!r} already")
        count = round(rows * fraction)
        parts[name] = Part("train", np.sort(order.ids(0, at, at + count)))
        at += count
    parts["train"] = Part("train", np.sort(order.ids(0, at, rows)))
    empty = [name for name, part in parts.items() if not len(part.ids)]
    if empty:
        raise DataError(f"--holdout leaves no row for split {', '.join(empty)}: 'train' has {rows}")
    return parts


def choose_columns(source: Source, options: Options, numbered: tuple[str, ...] | None) -> Conversion:
    """The columns and their features. `numbered` names the classes of `label` where the source does not.

    Raises DataError for columns that do not exist, or two of one name.
    """
    known = list(source.schema.names)
    for name in (*(options.columns or ()), *options.rename):
        _must_be(name, known, "the source")
    columns = tuple(options.columns or known)
    names = {old: new for old, new in options.rename.items() if old in columns}
    result = [names.get(c, c) for c in columns]
    if len(set(result)) != len(result):
        raise DataError(f"two columns would have one name: {', '.join(result)}; see --rename and --columns")
    if any("/" in name or name.startswith(".") for name in result):
        raise DataError(f"columns {result}: a name may not hold '/' or begin with '.'; use --rename old=new")
    found = read_features(source.schema)
    for column in columns:
        if has_type(found.get(column), "Json"):
            raise DataError(
                f"column {column!r} has values of several types, or objects of several kinds: write them as "
                "one, or leave the column out (--columns)"
            )
    features = {names.get(c, c): found[c] for c in columns if c in found}
    label = source.schema.field(columns[result.index("label")]).type if "label" in result else pa.null()
    if numbered and pa.types.is_integer(label) and not class_names(features.get("label")):
        features["label"] = class_label(numbered)
    for name in (*options.classes, *options.tokenize, *options.masks, *options.boxes):
        _must_be(name, result, "the result")
    twice = {*options.classes} & {*options.tokenize}
    if twice:
        raise DataError(f"--classes and --tokenize both name {', '.join(sorted(twice))}")
    tokenize = () if options.tokenizer == "none" else options.tokenize
    return Conversion(columns, names, features, tokenize=tokenize, max_tokens=options.max_tokens)


def choose_decoding(conversion: Conversion, source: Source, options: Options) -> Conversion:
    """How columns of encoded images and sounds are decoded: images grey only where all of a sample are."""
    if not options.decode:
        return conversion
    pictures: dict[str, Picture] = {}
    sounds: dict[str, Sound] = {}
    for column in conversion.columns:
        name = conversion.names.get(column, column)
        feature = conversion.features.get(name)
        looks = _looks_encoded(source.schema.field(column).type)
        if is_sound(feature) or (looks and not is_image(feature) and _first_is_sound(source, column)):
            sounds[name] = Sound(options.sample_rate, options.mels)
        elif name in options.masks and (is_image(feature) or looks):
            pictures[name] = Picture(True, options.image_size, numbers=True)
        elif is_image(feature) or looks:
            grey = options.grey
            if grey is None:
                grey = all(is_grey(data, where) for data, where in _encoded(source, column))
            pictures[name] = Picture(grey, options.image_size, convert=options.grey is not None)
    if options.image_size is not None and not pictures:
        raise DataError("--image-size is given, and the source has no column of encoded images")
    for name in options.masks:
        if name not in pictures:
            raise DataError(f"--masks {name}: column {name!r} does not hold encoded images (PNG, ...)")
    boxes = _boxes(pictures, options)
    return replace(conversion, pictures=pictures, sounds=sounds, boxes=boxes)


def _boxes(pictures: Mapping[str, Picture], options: Options) -> dict[str, str | None]:
    """Each column of boxes, and that of the images they are in, where those are resized."""
    if options.image_size is None or not options.boxes:
        return dict.fromkeys(options.boxes)
    images = [name for name, picture in pictures.items() if not picture.numbers]
    if len(images) != 1:
        raise DataError(
            f"--boxes {options.boxes[0]}: boxes are resized as the images they are in, and there are "
            f"{len(images)} columns of images{': ' if images else ''}{', '.join(images)}; keep one "
            "(--columns), and name masks (--masks)"
        )
    return dict.fromkeys(options.boxes, images[0])


def _first_is_sound(source: Source, column: str) -> bool:
    return any(sounds_like(data) for data, _ in islice(_encoded(source, column), 1))


def _encoded(source: Source, column: str) -> Iterator[tuple[bytes, str]]:
    """(bytes, what to call it in an error) of a sample of the encoded files in a column."""
    for split in source.splits:
        where = f"column {column!r}, split {split!r}"
        for table in sample(source, split, [column]):
            for value in table.column(0):
                yield file_bytes(value.as_py(), where), where


def choose_classes(
    conversion: Conversion, source: Source, parts: Mapping[str, Part], options: Options
) -> Conversion:
    """The names in each column of `options.classes`, sorted, from the rows of all splits."""
    found: dict[str, tuple[str, ...]] = {}
    for name in options.classes:
        if class_names(conversion.features.get(name)):
            continue  # already numbers with names
        column = _source_name(conversion, name)
        values: set[object] = set()
        for part in parts.values():
            for batch in read_ids(source.splits[part.source], part.ids, [column]):
                array = canonical(batch.column(0))
                if not (
                    pa.types.is_string(array.type)
                    or pa.types.is_large_string(array.type)
                    or pa.types.is_integer(array.type)
                ):
                    raise DataError(
                        f"--classes {name}: the column has type {array.type}; expected text or integers"
                    )
                require_no_nulls(array, name, _in_split(part))
                values.update(pc.unique(array).to_pylist())
        found[name] = _in_order(name, values)
    return replace(conversion, classes=found)


def _in_order(column: str, values: set[Any]) -> tuple[str, ...]:
    """The names of classes, sorted: as numbers where all of them are written as one writes whole numbers, as
    those of other formats are. Raises DataError for fractions.
    """
    texts = [str(value) for value in values]
    if all(re.fullmatch(r"0|-?[1-9]\d*", text) for text in texts):
        return tuple(sorted(texts, key=int))
    if all(re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", text) for text in texts) and any(
        not text.lstrip("-+").isdigit() for text in texts
    ):
        raise DataError(
            f"--classes {column}: the column has numbers such as {min(texts)}; expected text or integers"
        )
    return tuple(sorted(texts))


def choose_tokenizer(
    conversion: Conversion, source: Source, parts: Mapping[str, Part], options: Options, kept: str | None
) -> Conversion:
    """The tokenizer: `kept` from an earlier run, trained on the rows of "train" alone, or an existing one."""
    if not conversion.tokenize:
        return conversion
    if kept is None and options.tokenizer in TRAINED:
        if "train" not in parts:
            raise DataError(
                f"a tokenizer is trained on split 'train', and there is none among {', '.join(parts)}; give "
                "an existing one: --tokenizer FILE"
            )
        texts = _texts(conversion, source, parts["train"])
        kept = train_tokenizer(options.tokenizer, texts, options.vocab_size, options.min_count)
    return replace(conversion, tokenizer=kept or load_tokenizer(options.tokenizer))


def _texts(conversion: Conversion, source: Source, part: Part) -> Iterator[str]:
    for name in conversion.tokenize:
        column = _source_name(conversion, name)
        for batch in read_ids(source.splits[part.source], part.ids, [column]):
            array = canonical(batch.column(0))
            require_text(array, name)
            require_no_nulls(array, name, _in_split(part))
            yield from array.to_pylist()


def _in_split(part: Part) -> RowName:
    return lambda row: f"the rows of split {part.source!r}"


def sample(source: Source, split: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A few rows from evenly spaced places of a split: up to 8 tables of up to 32 rows."""
    for start, stop in sample_ranges(source, split):
        yield from in_tables(read_ids(source.splits[split], range(start, stop), columns), _SAMPLE_ROWS)


def sample_ranges(source: Source, split: str) -> list[tuple[int, int]]:
    """[start, stop) of the places that `sample` reads.

    Of Parquet these are beginnings of row groups, since a row group is decoded from its beginning.
    """
    rows = source.rows(split)
    groups = [n for piece in source.splits[split] for n in (piece.groups or (piece.rows,)) if n]
    starts = [0]
    for count in groups[:-1]:
        starts.append(starts[-1] + count)
    if source.splits[split][0].format == "arrow":
        starts = list(range(0, rows, _SAMPLE_ROWS))
    blocks = min(_SAMPLE_BLOCKS, len(starts))
    chosen = [starts[len(starts) * block // blocks] for block in range(blocks)]
    return [(start, min(start + _SAMPLE_ROWS, rows)) for start in chosen]


def _looks_encoded(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {f.name for f in kind} == {"bytes", "path"}


def _source_name(conversion: Conversion, name: str) -> str:
    return next(c for c in conversion.columns if conversion.names.get(c, c) == name)


def _must_be(name: str, known: list[str], where: str) -> None:
    if name not in known:
        raise DataError(
            f"{where} has no column {name!r}{nearest(name, known) or '.'} Its columns: {', '.join(known)}"
        )
