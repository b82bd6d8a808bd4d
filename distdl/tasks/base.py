"""`Task`: what a user writes to train something new."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from distdl.errors import DataError, nearest

T = TypeVar("T")

Rows = dict[str, Any]
"""Gathered columns, dtype as stored: a numpy array [n, ...] each, or where rows differ in length a
`distdl.data.Ragged` (flat `values`, int64 `lengths` [n], `padded()`)."""

Prediction = dict[str, Any]
"""What `distdl predict` writes of one row: JSON values by name."""

Batch = dict[str, Tensor]
"""What `collate` makes of rows and the model and loss read; on CPU until the loop moves it."""


class Columns(dict[str, T]):
    """Columns by name, as a task is given them: one that is not there is a DataError, not a KeyError."""

    def __missing__(self, name: str) -> T:
        hint = nearest(name, self) or "."
        raise DataError(
            f"the task asks for column {name!r}, which the dataset does not have{hint} Its columns: "
            f"{', '.join(self)}. Tell the task which one to read (section task of the recipe), or prepare "
            "the data with --rename"
        )


class Task(Protocol):
    """A loss as a sum and a count, and metrics as sums and counts; never a mean.

    Sums are what makes ragged batches, padded tokens and short last batches weigh what one process would
    weigh them, whatever the number of ranks.
    """

    image_field: str | None
    """The column that image augmentations act on, or None."""

    def build_model(self) -> nn.Module:
        """A freshly initialised model. Called once per rank with the same random state on each."""

    def collate(self, rows: Rows) -> Batch:
        """One microbatch of rows -> tensors. Runs in the loader's thread; uses no random state."""

    def count(self, batch: Batch) -> int:
        """What the loss is a mean over: samples, tokens, pixels. Needs no model."""

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum (not the mean) of the loss over what `count` counts; a scalar that can go backward."""

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        """For evaluation: metric name -> (sum, count) over this batch. Gradients are off."""


class Carrying(Protocol):
    """What a task has besides where state goes on from each window of text to the next (order `lanes`)."""

    def state_shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """By name, the shape of what one sample carries."""

    def loss_and_state(
        self, model: nn.Module, batch: Batch, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss_sum` of a batch that goes on from `state` (fp32 [N, ...] by name; zeros where the text
        begins), and the state after it, which is kept without its graph.
        """


class Predicting(Protocol):
    """What a task has besides, for `distdl predict`."""

    inputs: tuple[str, ...]
    """The columns that a prediction is made from. In others that the rows lack `collate` sees zeros."""

    recent: bool
    """May be left out. Whether of series that are longer than the model reads the last steps are taken."""

    def collate_inputs(self, rows: Rows) -> Batch:
        """May be left out. What `predict` is given, where that is not what `collate` makes of rows."""

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """One object for each row of the batch, in order; a class by its name, values in the units of the
        data. Arrays become PNG files: a class for each pixel as uint8 [H, W], a picture as floats 0 to 1,
        [H, W] or [H, W, 3]. Gradients are off and the model is in evaluation mode; draws nothing at random.
        """


class Drawing(Protocol):
    """What a task that can predict has besides, for `distdl predict --plot`."""

    def draw(self, axes: Any, row: dict[str, Any], prediction: Prediction) -> None:
        """Draw a row (its columns, as numpy arrays) and its prediction on matplotlib's `axes`."""


class Measuring(Protocol):
    """What a task has instead of `metric_sums` where a metric is no ratio of sums: BLEU, mAP, mIoU."""

    def measure(self, model: nn.Module, batch: Batch) -> Any:
        """What the metrics need to know of this batch, as JSON: lists and string-keyed dicts of numbers and
        strings. Gradients are off.
        """

    def metrics(self, found: list[Any]) -> dict[str, float]:
        """What `measure` returned of every evaluation batch, once each, in the order of the rows -> metrics
        by name. Called on every rank with the same list, whatever their number; draws nothing at random.
        """
