"""The sections that choose by name: task, model, optimiser and schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Discriminator, Tag

from distdl.recipe.base import NamedSection
from distdl.recipe.models import (
    Autoencoder,
    CenterNet,
    Cnn,
    Cnn5,
    Conv1dResnet,
    ConvAutoencoder,
    Crnn,
    CrnnCtc,
    Fcn1d,
    ImageRnn,
    ImportedModel,
    LstmAutoencoder,
    LstmLm,
    Recurrent,
    ResNet,
    Seq2SeqLstm,
    UNet,
)
from distdl.recipe.optimisers import (
    Adafactor,
    AdamW,
    AnyOptimiser,
    Constant,
    Cosine,
    ImportedOptimiser,
    Lamb,
    Lion,
    OneCycle,
    Sgd,
    Step,
)
from distdl.recipe.tasks import (
    Detection,
    Forecasting,
    ImageClassification,
    ImportedTask,
    LanguageModelling,
    Reconstruction,
    Segmentation,
    SequenceReconstruction,
    SeriesClassification,
    TextClassification,
    Transcription,
    Translation,
)

IMPORT_PATH = "import path"
"""Tag of the union members whose name is `package.module:attribute`."""

NAMED: dict[str, dict[str, type[NamedSection]]] = {
    "task": {
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
        IMPORT_PATH: ImportedTask,
    },
    "model": {
        "cnn5": Cnn5,
        "lstm": Recurrent,
        "gru": Recurrent,
        "rnn": Recurrent,
        "cnn": Cnn,
        "crnn": Crnn,
        "image_rnn": ImageRnn,
        "resnet": ResNet,
        "unet": UNet,
        "centernet": CenterNet,
        "autoencoder": Autoencoder,
        "conv_autoencoder": ConvAutoencoder,
        "lstm_lm": LstmLm,
        "seq2seq_lstm": Seq2SeqLstm,
        "crnn_ctc": CrnnCtc,
        "fcn1d": Fcn1d,
        "conv1d_resnet": Conv1dResnet,
        "lstm_autoencoder": LstmAutoencoder,
        IMPORT_PATH: ImportedModel,
    },
    "optim": {
        "sgd": Sgd,
        "adamw": AdamW,
        "lion": Lion,
        "lamb": Lamb,
        "adafactor": Adafactor,
        IMPORT_PATH: ImportedOptimiser,
    },
    "schedule": {"constant": Constant, "cosine": Cosine, "step": Step, "one_cycle": OneCycle},
}
"""Section -> tag -> class, for the sections that choose by `name`."""


def _by_name(section: str) -> Callable[[Any], str | None]:
    def tag(given: Any) -> str | None:
        name = given.get("name") if isinstance(given, Mapping) else getattr(given, "name", None)
        if not isinstance(name, str):
            return None
        known = NAMED[section]
        return name if name in known else IMPORT_PATH if ":" in name and IMPORT_PATH in known else None

    return tag


def _one_of(section: str) -> Any:
    """Any of the classes of `section`, chosen by the name that is given."""
    members = tuple(Annotated[cls, Tag(tag)] for tag, cls in NAMED[section].items())
    return Annotated[Union[members], Discriminator(_by_name(section))]  # noqa: UP007


if TYPE_CHECKING:
    Task = NamedSection
    Model = NamedSection
    Optim = AnyOptimiser
    Schedule = Constant | Cosine | Step | OneCycle
else:
    Task, Model, Optim, Schedule = map(_one_of, ("task", "model", "optim", "schedule"))
