"""Tasks by name, or a user's own by import path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from distdl.errors import RecipeError
from distdl.imports import call_with_known, import_attribute
from distdl.samples import DataInfo
from distdl.tasks.base import Batch, Carrying, Columns, Prediction, Rows, Task
from distdl.tasks.detection import Detection
from distdl.tasks.forecasting import Forecasting
from distdl.tasks.image_classification import ImageClassification
from distdl.tasks.language_modelling import LanguageModelling
from distdl.tasks.reconstruction import Reconstruction
from distdl.tasks.segmentation import Segmentation
from distdl.tasks.sequence_reconstruction import SequenceReconstruction
from distdl.tasks.series_classification import SeriesClassification
from distdl.tasks.text_classification import TextClassification
from distdl.tasks.transcription import Transcription
from distdl.tasks.translation import Translation

__all__ = ["BUILT_IN", "Batch", "Carrying", "Columns", "Prediction", "Rows", "Task", "build_task"]

BUILT_IN: dict[str, Callable[..., Any]] = {
    "image_classification": ImageClassification,
    "text_classification": TextClassification,
    "segmentation": Segmentation,
    "detection": Detection,
    "reconstruction": Reconstruction,
    "language_modelling": LanguageModelling,
    "translation": Translation,
    "transcription": Transcription,
    "series_classification": SeriesClassification,
    "forecasting": Forecasting,
    "sequence_reconstruction": SequenceReconstruction,
}

_PARTS = ("build_model", "collate", "count", "loss_sum")
_METRICS = (("metric_sums",), ("measure", "metrics"))
"""What a task measures with: ratios of sums, or whatever it makes of all batches."""


def build_task(
    name: str, keys: dict[str, Any], make_model: Callable[..., nn.Module], data_info: DataInfo
) -> Task:
    """The task that recipe section `task` names. Raises RecipeError when it cannot be imported or built, and
    DataError where it asks for a column that the data do not have.

    A user's task is called with the keys of the recipe and those of `make_model` and `data_info` that it
    has parameters for.
    """
    known = replace(data_info, fields=Columns(data_info.fields))
    offered: dict[str, Any] = {"make_model": make_model, "data_info": known}
    if name in BUILT_IN:
        built_in: Task = BUILT_IN[name](**offered, **keys)
        return built_in
    factory = import_attribute(name, "task.name")
    try:
        task = call_with_known(factory, offered, keys, into_any=True)
    except TypeError as error:
        raise RecipeError(
            f"task.name = {name!r}: calling it with {sorted(keys)} of the recipe failed: {error}"
        ) from error
    missing = _missing(task, _PARTS)
    if all(_missing(task, ways) for ways in _METRICS):
        missing.append("metrics" if callable(getattr(task, "measure", None)) else "metric_sums")
    if missing:
        raise RecipeError(
            f"task.name = {name!r}: a task needs {', '.join(missing)}; see docs/bring-your-own.md"
        )
    if not hasattr(task, "image_field"):
        task.image_field = None
    return task  # type: ignore[no-any-return]


def _missing(task: Any, parts: tuple[str, ...]) -> list[str]:
    return [part for part in parts if not callable(getattr(task, part, None))]
