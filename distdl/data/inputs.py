"""What `distdl predict` reads: rows prepared as those of the dataset that was trained on, labels or not."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distdl.data.folders import is_litter
from distdl.data.huggingface import feature_of, with_features
from distdl.data.index import INDEX_FILE, TOKENIZER_FILE
from distdl.data.opening import Ready, open_split, ready
from distdl.data.prepare.layouts import find
from distdl.data.prepare.mediafolder import IMAGES, medium, paths
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.data.prepare.sound import SOUNDS
from distdl.data.prepare.sources import materialise
from distdl.data.saved import is_saved
from distdl.data.table.ragged import Ragged
from distdl.data.table.rows import Batch, Rows
from distdl.errors import DataError
from distdl.samples import Field


@dataclass(frozen=True)
class Wanted:
    """The columns `fields` of the dataset that was trained on, and those that a prediction is made from.

    `recent`: of series that are longer than the model reads, the last steps are taken.
    """

    fields: Mapping[str, Field]
    inputs: Sequence[str]
    recent: bool = False


@dataclass(frozen=True)
class Inputs:
    """Rows to predict, with the columns `fields` of the dataset that was trained on.

    `files`: the file that each row is, where a row is one.
    """

    rows: Rows
    fields: Mapping[str, Field]
    files: Sequence[str] | None = None

    def gather(self, ids: npt.NDArray[np.int64], only: Sequence[str] | None = None) -> Batch:
        """Rows `ids`. What the input does not have (labels, say), and what is not among `only`, is zeros.
        DataError for another size.
        """
        found = {n: c for n, c in self.rows.gather(ids).items() if only is None or n in only}
        ready = {name: _fitted(name, column, self.fields[name]) for name, column in found.items()}
        absent = {n: f for n, f in self.fields.items() if n not in found}
        return ready | {name: _zeros(field, len(ids)) for name, field in absent.items()}


def open_inputs(given: Path, like: Ready, wanted: Wanted, scratch: Path, split: str | None) -> Inputs:
    """Open `given`: a prepared dataset, or anything that `distdl data prepare` reads, or images or sounds
    without labels, or series as CSV files (a line a step, a column a channel).

    Files are prepared in `scratch` with the options and tokenizer of the dataset `like`. Raises DataError.
    """
    if not given.exists():
        raise DataError(f"--input {given} does not exist; give a file, a folder or a prepared dataset")
    files = None
    if (given / INDEX_FILE).is_file() or is_saved(given):
        opened = ready(None, given)
        _check_tokens(opened, like, wanted.fields)
    else:
        place, files = _place(given, wanted, scratch, split)
        source = materialise(find(str(place), None), scratch / "source", None, _texts(like, wanted))
        options = _options(source.schema, like, wanted)
        prepare(str(place), scratch / "prepared", options, source=source)
        opened = ready(None, scratch / "prepared")
    missing = [name for name in wanted.inputs if name not in opened.info.fields]
    if missing:
        raise DataError(
            f"--input {given} has no column {', '.join(missing)}, which the task reads; it has "
            f"{', '.join(opened.info.fields)}"
        )
    _check_bands(opened, like, wanted)
    there = opened.info.fields
    kept = [n for n, f in there.items() if n in wanted.inputs or wanted.fields.get(n) == f]
    rows: Any = open_split(opened, _split(opened, split, given), kept)
    return Inputs(rows, wanted.fields, files)


def _split(opened: Ready, split: str | None, given: Path) -> str:
    splits = sorted(opened.info.rows)
    if split is None and len(splits) > 1:
        raise DataError(f"--input {given} has splits {', '.join(splits)}: choose one with --split")
    return split or splits[0]


def _place(given: Path, wanted: Wanted, scratch: Path, split: str | None) -> tuple[Path, list[str] | None]:
    """Where `prepare` finds the rows of `given`; of images, sounds, series and texts in a file that is made
    here, together with the file that each row is. Texts in a folder are that unless a split is named.
    """
    found = sorted(p for p in given.rglob("*") if p.is_file()) if given.is_dir() else [given]
    column = wanted.inputs[0]
    field = wanted.fields[column]
    seen = [p for p in found if not any(map(is_litter, p.relative_to(given).parts))] if given.is_dir() else []
    texts = [p for p in seen if p.suffix.lower() == ".txt"]
    if texts and texts == seen and split is None and field.shape == (None,) and "int" in field.dtype:
        values = pa.array([_text(p) for p in texts], pa.string())
        return _written(column, values, feature_of(pa.string()), scratch), [str(p) for p in texts]
    suffixes = SOUNDS if _is_series(field) else IMAGES
    media = [p for p in found if p.suffix.lower() in suffixes]
    if media:
        return _written(column, paths(media), medium(media)[1], scratch), [str(p) for p in media]
    series = [p for p in found if p.suffix == ".csv"] if _is_series(field) else []
    if series and column not in _header(series[0]):
        lists = [_numbers(p, field, wanted.recent) for p in series]
        for file, one in zip(series, lists, strict=True):
            if one.shape[1:] != lists[0].shape[1:]:
                raise DataError(
                    f"{file} has {_columns(one)}, and {series[0]} {_columns(lists[0])}; expected as many in "
                    "each"
                )
        kind = pa.list_(pa.float32() if lists[0].ndim == 1 else pa.list_(pa.float32(), lists[0].shape[1]))
        values = pa.array([one.tolist() for one in lists], kind)
        return _written(column, values, feature_of(kind), scratch), [str(p) for p in series]
    return given, None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except ValueError as error:
        raise DataError(f"{file} is no text in UTF-8: {error}") from error


def _columns(series: npt.NDArray[np.float32]) -> str:
    return f"{series.shape[1] if series.ndim > 1 else 1} columns of numbers"


def _written(column: str, values: pa.Array, feature: Any, scratch: Path) -> Path:
    schema = with_features(pa.schema([pa.field(column, values.type)]), {column: feature})
    scratch.mkdir(parents=True, exist_ok=True)
    file = scratch / "input.parquet"
    pq.write_table(pa.table([values], schema=schema), file)
    return file


def _is_series(field: Field) -> bool:
    return field.dtype in ("halffloat", "float", "double") and bool(field.shape)


def _header(file: Path) -> list[str]:
    with file.open(encoding="utf-8", newline="") as lines:
        return next(csv.reader(lines), [])


def _numbers(file: Path, field: Field, recent: bool) -> npt.NDArray[np.float32]:
    """[T] or [T, C] from a header and a line a step; the last steps that the model reads if `recent`.

    Of one number a step ([T]) the file may have other columns, a date say, that are no numbers.
    """
    with file.open(encoding="utf-8", newline="") as lines:
        header, *rows = [*csv.reader(lines)] or [[]]
    counted = header == [str(i) for i in range(len(header))]  # as pandas names columns without names
    if header and not counted and all(_is_number(name) for name in header):
        raise DataError(f"{file} begins with numbers; expected a header, the names of the columns")
    if len(field.shape) == 1:
        rows = _one_column(file, header, rows)
    try:
        found = np.array(rows, np.float32)
    except ValueError as error:
        raise DataError(f"{file}: {error}; expected a header and numbers, a line a step") from error
    if found.ndim != 2 or not np.isfinite(found).all():
        raise DataError(f"{file} has no rows, or missing values; expected a header, and a line a step")
    found = found[-(field.shape[0] or 0) :] if recent else found
    return found[:, 0] if len(field.shape) == 1 and found.shape[1] == 1 else found


def _one_column(file: Path, header: list[str], rows: list[list[str]]) -> list[list[str]]:
    """The only column of numbers of a file with several, where it has only one. Raises DataError."""
    whole = [row for row in rows if len(row) == len(header)]
    if len(header) < 2 or not rows or len(whole) < len(rows):
        return rows
    numbers = [name for at, name in enumerate(header) if _is_number(rows[0][at])]
    if len(numbers) != 1:
        raise DataError(
            f"{file} has columns {', '.join(header)}, of which {', '.join(numbers) or 'none'} hold numbers, "
            "and the model reads one number a step; leave one column of numbers"
        )
    at = header.index(numbers[0])
    return [[row[at]] for row in rows]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _texts(like: Ready, wanted: Wanted) -> set[str]:
    """What may be called so in the input, and is text that becomes tokens."""
    renamed = like.index.prepared.get("options", {}).get("rename", {}) if like.index is not None else {}
    tokens = {
        n for n in wanted.inputs if "int" in wanted.fields[n].dtype and wanted.fields[n].shape == (None,)
    }
    return tokens | {old for old, new in renamed.items() if new in tokens}


def _options(schema: pa.Schema, like: Ready, wanted: Wanted) -> Options:
    """What makes of columns of `schema` those of the dataset `like`."""
    was = like.index.prepared.get("options", {}) if like.index is not None else {}
    rename = {old: new for old, new in was.get("rename", {}).items() if old in schema.names}
    inputs = wanted.inputs
    if len(inputs) == len(schema.names) == 1 and not rename:
        rename = {schema.names[0]: inputs[0]}
    names = {name: rename.get(name, name) for name in schema.names}
    kept = tuple(old for old, new in names.items() if new in inputs)
    if not kept:
        raise DataError(
            f"the input has columns {', '.join(schema.names)}, and the task reads {', '.join(inputs)}; name "
            "them so"
        )
    texts = tuple(names[old] for old in kept if pa.types.is_string(schema.field(old).type))
    options = Options(
        columns=kept,
        rename={old: new for old, new in rename.items() if old in kept and old != new},
        image_size=was.get("image_size") and tuple(was["image_size"]),
        grey=_grey([wanted.fields[names[old]] for old in kept]),
        **{name: was[name] for name in ("sample_rate", "mels") if name in was},
        max_tokens=was.get("max_tokens"),
    )
    tokenize = tuple(name for name in texts if "int" in wanted.fields[name].dtype)
    if not tokenize:
        return options
    tokenizer = like.folder / TOKENIZER_FILE
    if not tokenizer.is_file():
        raise DataError(f"text is read with the tokenizer of the dataset, and there is no {tokenizer}")
    return replace(options, tokenize=tokenize, tokenizer=str(tokenizer))


def _grey(fields: Sequence[Field]) -> bool | None:
    """Whether the images that were trained on are grey; None where there are none, or both kinds."""
    kinds = {len(f.shape) == 2 for f in fields if f.dtype == "uint8" and f.shape[2:] in ((), (3,))}
    return kinds.pop() if len(kinds) == 1 else None


def _check_tokens(opened: Ready, like: Ready, fields: Mapping[str, Field]) -> None:
    """Ids mean the same words only if both datasets were tokenised alike. Raises DataError."""
    ours, theirs = like.folder / TOKENIZER_FILE, opened.folder / TOKENIZER_FILE
    if not ours.is_file() or not any(f.vocabulary for f in fields.values()):
        return
    if not theirs.is_file() or theirs.read_bytes() != ours.read_bytes():
        raise DataError(
            f"{opened.folder} was not tokenised with {ours}: its numbers mean other tokens. Prepare it with "
            f"--tokenizer {ours}, or give the text itself as --input"
        )


def _check_bands(opened: Ready, like: Ready, wanted: Wanted) -> None:
    """Bands of sound mean the same frequencies only if both were prepared alike. Raises DataError."""
    if like.index is None or opened.index is None or not _is_series(wanted.fields[wanted.inputs[0]]):
        return
    ours, theirs = (index.prepared.get("options", {}) for index in (like.index, opened.index))
    for name in ("sample_rate", "mels"):
        if ours.get(name) != theirs.get(name):
            option = f"--{name.replace('_', '-')}"
            raise DataError(
                f"{opened.folder} was prepared with {option} {theirs.get(name, 'left out')}, and the dataset "
                f"that was trained on with {ours.get(name, 'it left out')}: prepare it alike, or give the "
                "sounds themselves as --input"
            )


def _fitted(name: str, column: npt.NDArray[Any] | Ragged, field: Field) -> npt.NDArray[Any] | Ragged:
    """The column as the dataset stores it: `Ragged` where the rows of the dataset differ in length."""
    varies = field.shape[:1] == (None,)
    if field.dtype == "uint8" and isinstance(column, np.ndarray) and column.dtype != np.uint8:
        fits = column.dtype.kind in "iu" and (not column.size or 0 <= column.min() <= column.max() < 256)
        if not fits:
            raise DataError(
                f"column {name!r} of the input is {column.dtype}; the model was trained on uint8: give it "
                "so, 0 to 255"
            )
        column = column.astype(np.uint8)
    if isinstance(column, np.ndarray) and varies and column.ndim > 1:
        lengths = np.full(len(column), column.shape[1], np.int64)
        column = Ragged(column.reshape(-1, *column.shape[2:]), lengths)
    if isinstance(column, Ragged) and not varies and len(set(column.lengths.tolist())) == 1:
        column = column.padded()
    if isinstance(column, Ragged):
        inner = () if isinstance(column.values, Ragged) else column.values.shape[1:]
        has: list[Any] = [f"{column.lengths.min()} to {column.lengths.max()}", *inner]
    else:
        has = list(column.shape[1:])
    wants = list(field.shape)
    if isinstance(column, Ragged) != varies or has[int(varies) :] != wants[int(varies) :]:
        raise DataError(
            f"column {name!r} of the input has rows of shape {has}, and the model was trained on "
            f"{['any' if n is None else n for n in wants]}: cut, resample or resize them to that"
        )
    return column


def _zeros(field: Field, rows: int) -> npt.NDArray[Any] | Ragged:
    kind = np.dtype(pa.type_for_alias(field.dtype).to_pandas_dtype())
    if None not in field.shape:
        return np.zeros((rows, *(n or 0 for n in field.shape)), kind)
    inner = tuple(n or 0 for n in field.shape[1:])
    return Ragged(np.zeros((0, *inner), kind), np.zeros(rows, np.int64))
