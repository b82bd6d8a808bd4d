"""Section `task`: what is learnt, by name, and its options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from distdl.recipe.base import (
    IMPORT_PATTERN,
    Count,
    Fraction,
    NamedSection,
    Natural,
    NotNegative,
    Text,
)


class ImageClassification(NamedSection):
    """Images to one of N classes, by cross-entropy; the metric is accuracy."""

    name: Literal["image_classification"] = Field(description="The task.")
    label_smoothing: Fraction = Field(0.0, description="Share of the target spread over all classes.")
    mixup: NotNegative = Field(
        0.0, description="Blend images of a microbatch: both parameters of the Beta distribution. 0: off."
    )
    cutmix: NotNegative = Field(
        0.0, description="Paste a part of one image into another: likewise. With mixup, one or the other."
    )


class TextClassification(NamedSection):
    """Tokens of varying length to one of N classes, by cross-entropy; the metric is accuracy."""

    name: Literal["text_classification"] = Field(description="The task.")
    label_smoothing: Fraction = Field(0.0, description="Share of the target spread over all classes.")
    vocabulary: Count | None = Field(None, description="Different token ids. Null: as the dataset says.")


class Segmentation(NamedSection):
    """A class for every pixel, by cross-entropy; the metrics are miou, dice, accuracy and loss."""

    name: Literal["segmentation"] = Field(description="The task.")
    num_classes: Count = Field(description="Classes in the mask, background included: pixels 0 to this - 1.")
    image: Text = Field("image", description="Column of the images.")
    mask: Text = Field("mask", description="Column of the masks: a class for every pixel (uint8).")
    ignore: int = Field(255, ge=0, le=255, description="Mask value of pixels that are not counted.")


class Detection(NamedSection):
    """Boxes and classes of the objects in an image, as centres; the metrics are map, map_50 and map_75."""

    name: Literal["detection"] = Field(description="The task.")
    num_classes: Count = Field(description="Classes of objects, 0 to this - 1; there is none for background.")
    image: Text = Field("image", description="Column of the images.")
    boxes: Text = Field("boxes", description="Column of the boxes: left, top, right, bottom, in pixels.")
    classes: Text = Field("classes", description="Column of the objects' classes.")
    max_objects: Count = Field(128, description="Objects that an image may have.")
    max_detections: Count = Field(100, description="Detections of an image that are measured, best first.")
    min_score: Fraction = Field(0.3, description="Predictions leave out what has a lower score.")


class Reconstruction(NamedSection):
    """Images from themselves, by squared error; the metrics are squared_error (an image) and pixel_error."""

    name: Literal["reconstruction"] = Field(description="The task.")
    image: Text | None = Field(None, description="Column of the images. Null: the only one.")


class LanguageModelling(NamedSection):
    """The next token at every place of a text; the metrics are perplexity and loss."""

    name: Literal["language_modelling"] = Field(description="The task.")
    vocabulary: Count | None = Field(None, description="Different token ids. Null: as the dataset says.")
    continuation: Count = Field(50, description="Tokens that a prediction adds to its row.")


class Translation(NamedSection):
    """A column of tokens to another, by cross-entropy; the metrics are bleu, chrf, perplexity and loss."""

    name: Literal["translation"] = Field(description="The task.")
    source: Text = Field(description="Column of tokens to translate from.")
    target: Text = Field(description="Column of tokens to translate to.")
    source_vocabulary: Count | None = Field(
        None, description="Different token ids of the source. Null: as the dataset says."
    )
    target_vocabulary: Count | None = Field(
        None, description="Different token ids of the target. Null: as the dataset says."
    )
    label_smoothing: Fraction = Field(0.0, description="Share of the target spread over all tokens.")
    beam: Natural = Field(1, description="Sequences kept in evaluation. 1: greedy. 0: the loss alone.")
    max_tokens: Count = Field(80, description="Longest translation in evaluation.")
    length_penalty: NotNegative = Field(1.0, description="How much a longer sequence is favoured.")


class Transcription(NamedSection):
    """Images or sounds to strings of symbols, by connectionist temporal classification (CTC); the metric is
    accuracy.
    """

    name: Literal["transcription"] = Field(description="The task.")
    standardise: bool = Field(
        True, description="Give each band of each sound mean 0 and deviation 1 over its own steps."
    )
    vocabulary: Count | None = Field(None, description="Different symbols. Null: as the dataset says.")


class SeriesClassification(NamedSection):
    """Numbers over time, of any length, to one of N classes, by cross-entropy; the metric is accuracy."""

    name: Literal["series_classification"] = Field(description="The task.")
    label_smoothing: Fraction = Field(0.0, description="Share of the target spread over all classes.")
    standardise: bool = Field(
        False, description="Give each channel of each series mean 0 and deviation 1 over its own steps."
    )


class Forecasting(NamedSection):
    """The next values of a series from those before; the metrics are MASE and sMAPE, beside baselines."""

    name: Literal["forecasting"] = Field(description="The task.")
    period: Count | None = Field(
        None, description="Steps of a season: measures the seasonal naive forecast too. Null: no season."
    )
    lags: Annotated[tuple[Count, ...], Field(strict=False)] = Field(
        (), description="Measures forecasts that repeat the value so many steps before, too."
    )


class SequenceReconstruction(NamedSection):
    """Tokens, or numbers over time, through one vector and back. Tokens by cross-entropy; metrics: accuracy
    and loss a token. Numbers by squared error; metric: loss a number.
    """

    name: Literal["sequence_reconstruction"] = Field(description="The task.")


class ImportedTask(NamedSection):
    """A task of your own. Keys beside `name` are passed to it."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=IMPORT_PATTERN, description="Import path, package.module:attribute.")
