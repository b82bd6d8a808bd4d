"""`distdl predict`: what a checkpoint says of rows that it is given, one JSON object a row."""

from __future__ import annotations

import csv
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from distdl.data.inputs import Inputs, Wanted, open_inputs
from distdl.data.prepare.decode import encode_classes, encode_picture
from distdl.engines.precision import autocast, dtype_of
from distdl.errors import DataError, EnvironmentProblem, RecipeError
from distdl.observe.console import show
from distdl.recipe import Recipe
from distdl.record import write_atomic
from distdl.tasks import Columns, Prediction
from distdl.topology import Topology
from distdl.train.eval_process import Loaded, load

SUFFIXES = (".jsonl", ".csv")
PLOTTED = 6
"""Rows that a plot shows."""


def predict_process(
    recipe: Recipe,
    topology: Topology,
    checkpoint: str | None,
    given: Path,
    out: Path,
    split: str | None = None,
    plot: Path | None = None,
) -> None:
    """Write the predictions for the rows of `given` to `out`, and a plot of the first to `plot`. One process.

    Any engine's checkpoint will do; the default engine holds the weights. Raises DistdlError; nothing is
    written then.
    """
    if out.suffix not in SUFFIXES:
        raise DataError(f"--out {out}: the suffix says the format, and is one of {', '.join(SUFFIXES)}")
    if topology.world_size > 1:
        raise RecipeError("distdl predict runs as one process; start it without a launcher")
    loaded = load(_plain(recipe), topology, checkpoint)
    _warn_of_other_data(loaded)
    task: Any = loaded.task
    if not callable(getattr(task, "predict", None)):
        raise RecipeError(f"task.name = {recipe.task.name!r} has no `predict`; see docs/predict.md")
    _check_inputs(task, recipe.task.name, loaded.feed.info.fields)
    draw = getattr(task, "draw", None)
    if plot is not None:
        if draw is None:
            raise RecipeError(
                f"task.name = {recipe.task.name!r} draws nothing: leave out --plot. What there is "
                f"to see is in {out} itself"
            )
        _check_plot(plot)
    with tempfile.TemporaryDirectory() as scratch:
        like, fields = loaded.feed.parts[0], loaded.feed.info.fields
        wanted = Wanted(fields, task.inputs, getattr(task, "recent", False))
        inputs = open_inputs(given, like, wanted, Path(scratch), split)
        found: list[Prediction] = []
        first: list[Prediction] = []
        for prediction in _predictions(loaded, inputs):
            if plot is not None and len(first) < PLOTTED:
                first.append(prediction)
            found.append(_encoded(prediction))
        if plot is not None and first:
            _plot(plot, draw, inputs.gather(np.arange(len(first))), first)
    out.parent.mkdir(parents=True, exist_ok=True)
    found = [_with_pictures(prediction, out) for prediction in found]
    write_atomic(out, _as_csv(found) if out.suffix == ".csv" else _as_lines(found))
    show("predictions", {"rows": len(found)}, {"checkpoint": loaded.path, "written to": out})


def _warn_of_other_data(loaded: Loaded) -> None:
    """Classes and tokens have their names from the dataset, which may have been prepared anew since."""
    ours = loaded.feed.info.fingerprint
    if ours != loaded.data_fingerprint:
        print(  # noqa: T201
            f"warning: dataset {loaded.feed.info.name!r} is not the one that {loaded.path} was trained on "
            f"(fingerprint {ours}, then {loaded.data_fingerprint}): where its classes or its tokenizer are "
            "others, these predictions have wrong names",
            file=sys.stderr,
            flush=True,
        )


def _check_inputs(task: Any, name: str, fields: Mapping[str, Any]) -> None:
    """Raises RecipeError for a task that does not say which columns of the data it predicts from."""
    inputs = getattr(task, "inputs", None)
    if isinstance(inputs, tuple | list) and inputs and all(column in fields for column in inputs):
        return
    raise RecipeError(
        f"task.name = {name!r} has `predict`, and `inputs` {inputs!r}; expected the columns that it predicts "
        f"from, a tuple of some of {', '.join(fields)} (docs/predict.md)"
    )


def _plain(recipe: Recipe) -> Recipe:
    """The same model on one device: nothing of the engine, or of memory that only training needs."""
    kept = {name: getattr(recipe.hardware, name) for name in ("device", "threads", "cache_bytes", "retry_s")}
    return recipe.model_copy(update={"hardware": type(recipe.hardware)(**kept)})


def _predictions(loaded: Loaded, inputs: Inputs) -> Iterator[Prediction]:
    task: Any = loaded.task
    engine, plan, total = loaded.engine, loaded.plan, len(inputs.rows)
    as_text = _as_text(loaded)
    collate = getattr(task, "collate_inputs", task.collate)
    with engine.evaluating(), torch.no_grad(), autocast(engine.device.type, dtype_of(plan.precision)):
        for start in range(0, total, plan.micro_batch):
            # Nothing else is read: where labels are kept secret, they are no classes.
            rows = inputs.gather(np.arange(start, min(start + plan.micro_batch, total)), task.inputs)
            found = task.predict(engine.module, engine.place(collate(Columns(rows))))
            if len(found) != min(plan.micro_batch, total - start):
                raise RecipeError(
                    f"the task's `predict` returned {len(found)} predictions for "
                    f"{min(plan.micro_batch, total - start)} rows: expected one a row, in order"
                )
            for row, prediction in enumerate(found, start):
                name = {"file": inputs.files[row]} if inputs.files is not None else {}
                yield {"row": row, **name, **as_text(rows, row - start), **prediction}


def _as_text(loaded: Loaded) -> Callable[[Mapping[str, Any], int], Prediction]:
    """What a row of gathered columns reads as: `input`, from its tokens, where the dataset has its tokenizer.
    As the model has it: a word that the tokenizer does not know is seen to be none.
    """
    info, task = loaded.feed.info, cast(Any, loaded.task)
    decode, tokens = info.decode, [name for name in task.inputs if info.fields[name].vocabulary]
    if decode is None or len(tokens) != 1:
        return lambda rows, row: {}
    return lambda rows, row: {"input": decode(_row(rows[tokens[0]], row).tolist())}


def _row(column: Any, row: int) -> npt.NDArray[Any]:
    """One row of a gathered column, an array or a Ragged."""
    found: npt.NDArray[Any] = (
        column[row] if isinstance(column, np.ndarray) else column.rows(row, row + 1).values
    )
    return found


def _encoded(prediction: Prediction) -> Prediction:
    """Arrays as the bytes of PNG files: classes (uint8 [H, W]) and pictures (floats [H, W] or [H, W, 3], 0 to
    1). Raises DataError for others.
    """
    return {k: _png(k, v) if isinstance(v, np.ndarray) else v for k, v in prediction.items()}


def _png(name: str, value: npt.NDArray[Any]) -> bytes:
    if value.dtype == np.uint8 and value.ndim == 2:
        return encode_classes(value)
    if np.issubdtype(value.dtype, np.floating) and (value.ndim == 2 or value.shape[2:] == (3,)):
        return encode_picture(value)
    raise DataError(
        f"prediction {name!r} is an array of {value.dtype} {list(value.shape)}; expected classes, uint8 "
        "[H, W], or a picture, floats from 0 to 1, [H, W] or [H, W, 3]. Numbers are written as lists "
        "(.tolist())"
    )


def _with_pictures(prediction: Prediction, out: Path) -> Prediction:
    """PNG files written into a folder beside `out`, and named in their place."""
    folder, named = out.with_suffix(""), dict(prediction)
    for name, value in prediction.items():
        if isinstance(value, bytes):
            folder.mkdir(exist_ok=True)
            file = folder / f"{prediction['row']:06d}_{name}.png"
            file.write_bytes(value)
            named[name] = f"{folder.name}/{file.name}"
    return named


def _as_lines(found: list[Prediction]) -> str:
    return "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in found)


def _as_csv(found: list[Prediction]) -> str:
    """A column for each key, and for each number of a list of numbers (key_1, key_2, ...)."""
    flat = [_flat(prediction) for prediction in found]
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(prediction: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in prediction.items():
        if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
            found.update({f"{name}_{i}": v for i, v in enumerate(value, 1)})
        else:
            found[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
    return found


def _check_plot(file: Path) -> None:
    """Raises EnvironmentProblem without matplotlib, DataError for a suffix that it does not write."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise EnvironmentProblem("--plot needs matplotlib: pip install matplotlib") from error
    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix[1:].lower() not in known:
        kinds = ", ".join(f".{kind}" for kind in sorted(known))
        raise DataError(f"--plot {file}: the suffix says the format, and is one of {kinds}")


def _plot(file: Path, draw: Any, rows: Mapping[str, Any], found: list[Prediction]) -> None:
    from matplotlib.figure import Figure

    lines = -(-len(found) // 2)
    figure = Figure(figsize=(10, 2.5 * lines), layout="constrained")
    for i, prediction in enumerate(found):
        axes = figure.add_subplot(lines, 2, i + 1)
        draw(axes, {name: _row(column, i) for name, column in rows.items()}, prediction)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
