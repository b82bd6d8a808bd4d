"""Average precision as COCO defines it, by its reference implementation. The one file that imports it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from distdl.errors import EnvironmentProblem

try:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:
    COCO = COCOeval = None


def require() -> None:
    """Raises EnvironmentProblem where the library is missing."""
    if COCO is None:
        raise EnvironmentProblem(
            "task detection measures with pycocotools, which is not installed here: pip install "
            "'distdl[detection]'"
        )


def average_precision(
    truth: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], most: int
) -> dict[str, float]:
    """`map` (mean over IoU 0.50, 0.55, ... 0.95 and classes), `map_50`, `map_75`, for objects of any size.

    One mapping an image: `boxes` ([x, y, width, height] each), `classes`, and of what was found `scores`. The
    `most` best of an image count. 0 where there is nothing to find.
    Lin et al. (2014), arXiv:1405.0312; https://cocodataset.org/#detection-eval.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how it gets on
        classes = sorted({int(c) for one in (*truth, *found) for c in one["classes"]})
        evaluation = COCOeval(_dataset(truth, classes), _dataset(found, classes), "bbox")
        evaluation.params.maxDets = [most]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # [IoU, recall, class, area, most]; -1: nothing to find
    return {"map": _mean(precision), "map_50": _mean(precision[0]), "map_75": _mean(precision[5])}


def _mean(precision: Any) -> float:
    there = precision[precision > -1]
    return float(np.mean(there)) if there.size else 0.0


def _dataset(images: Sequence[Mapping[str, Any]], classes: Iterable[int]) -> Any:
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        scores = image.get("scores", [1.0] * len(image["boxes"]))
        for box, label, score in zip(image["boxes"], image["classes"], scores, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "score": score,
                    "iscrowd": 0,
                }
            )
    dataset = COCO()
    dataset.dataset = {
        "images": [{"id": number} for number in range(1, len(images) + 1)],
        "categories": [{"id": label} for label in classes],
        "annotations": annotations,
    }
    dataset.createIndex()
    return dataset
