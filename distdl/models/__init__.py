"""Models by name. A model knows shapes, never tasks; its keys in the recipe are its arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from torch import nn

from distdl.errors import RecipeError
from distdl.imports import call_with_known, import_attribute
from distdl.models.autoencoder import Autoencoder, ConvAutoencoder
from distdl.models.centernet import CenterNet
from distdl.models.cnn import Cnn, Crnn
from distdl.models.cnn5 import Cnn5
from distdl.models.crnn_ctc import CrnnCtc
from distdl.models.image_rnn import ImageRnn
from distdl.models.lstm import ImageRows, Recurrent
from distdl.models.lstm_lm import LstmLm
from distdl.models.resnet import ResNet
from distdl.models.seq2seq_lstm import Seq2SeqLstm
from distdl.models.sequence_autoencoder import SequenceAutoencoder
from distdl.models.series_cnn import Conv1dResnet, Fcn1d
from distdl.models.unet import UNet

ModelFactory = Callable[..., nn.Module]
"""Called by a task: to classify images ``factory(in_channels=..., num_outputs=..., input_shape=...)``, to
segment them with ``num_pixel_classes``, to detect objects with ``num_object_classes`` and to read strings in
them with ``num_symbols`` in the place of ``num_outputs``, to reconstruct them ``factory(input_shape=...)``;
of tokens ``factory(vocabulary=..., num_outputs=...)``, and without `num_outputs` where the outputs are tokens
too; of series ``factory(features=..., steps=..., num_outputs=...)``, where `steps` is None for series of
different lengths, to read strings in them ``factory(features=..., num_symbols=...)``, and to reconstruct
them ``factory(features=...)``."""


def _of_images(model: ModelFactory) -> ModelFactory:
    def build(in_channels: int, num_outputs: int, input_shape: tuple[int, ...], **keys: Any) -> nn.Module:
        said = {"in_channels": in_channels, "num_outputs": num_outputs, "input_shape": input_shape}
        made: nn.Module = call_with_known(model, said, keys)
        return made

    return build


def _unet(in_channels: int, num_pixel_classes: int, input_shape: tuple[int, ...], **keys: Any) -> nn.Module:
    return UNet(in_channels, num_pixel_classes, **keys)


def _centernet(
    in_channels: int, num_object_classes: int, input_shape: tuple[int, ...], **keys: Any
) -> nn.Module:
    return CenterNet(in_channels, num_object_classes, **keys)


def _autoencoder(input_shape: tuple[int, ...], **keys: Any) -> nn.Module:
    return Autoencoder(input_shape, **keys)


def _conv_autoencoder(input_shape: tuple[int, ...], **keys: Any) -> nn.Module:
    return ConvAutoencoder(input_shape, **keys)


def _recurrent(cell: str) -> ModelFactory:
    def build(
        num_outputs: int,
        vocabulary: int | None = None,
        features: int | None = None,
        steps: int | None = None,
        in_channels: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        **keys: Any,
    ) -> nn.Module:
        if input_shape is not None:
            return ImageRows(input_shape, num_outputs, cell, **keys)
        if vocabulary is None and features is None:
            raise RecipeError(
                f"model.name = {cell!r} reads tokens, series or images, and the task says none of "
                "vocabulary, features and input_shape"
            )
        return Recurrent(vocabulary, num_outputs, cell, features=features, **keys)

    return build


def _lstm_autoencoder(
    features: int | None, vocabulary: int | None = None, steps: int | None = None, **keys: Any
) -> nn.Module:
    if vocabulary is None and features is None:
        raise RecipeError(
            "model.name = 'lstm_autoencoder' reads tokens or series, and the task says neither vocabulary "
            "nor features"
        )
    return SequenceAutoencoder(vocabulary, features, **keys)


def _of_series(name: str, model: Callable[..., nn.Module]) -> ModelFactory:
    def build(features: int, steps: int | None, num_outputs: int, **keys: Any) -> nn.Module:
        if steps is None:
            raise RecipeError(
                f"model.name = {name!r} reads series of one length, since what fills up the short ones would "
                "enter its BatchNorm statistics, and these have different lengths: use lstm, gru or rnn, or "
                "cut or resample the series to one length"
            )
        return model(features, num_outputs, **keys)

    return build


BUILT_IN: dict[str, ModelFactory] = {
    "cnn5": _of_images(Cnn5),
    "lstm": _recurrent("lstm"),
    "gru": _recurrent("gru"),
    "rnn": _recurrent("rnn"),
    "cnn": _of_images(Cnn),
    "crnn": _of_images(Crnn),
    "image_rnn": _of_images(ImageRnn),
    "resnet": _of_images(ResNet),
    "unet": _unet,
    "centernet": _centernet,
    "autoencoder": _autoencoder,
    "conv_autoencoder": _conv_autoencoder,
    "lstm_lm": LstmLm,
    "seq2seq_lstm": Seq2SeqLstm,
    "crnn_ctc": CrnnCtc,
    "fcn1d": _of_series("fcn1d", Fcn1d),
    "conv1d_resnet": _of_series("conv1d_resnet", Conv1dResnet),
    "lstm_autoencoder": _lstm_autoencoder,
}


def model_factory(name: str, keys: dict[str, Any]) -> ModelFactory:
    """The factory that recipe section `model` names, with its keys bound.

    A user's factory ("package.module:attribute") is given those of the task's arguments that it has
    parameters for. Raises RecipeError when it cannot be imported or called, and, when it is called, for a
    built-in model that the task does not give what it reads.
    """
    if name in BUILT_IN:
        return partial(_built_in, name, keys)
    factory = import_attribute(name, "model.name")

    def build(**offered: Any) -> nn.Module:
        try:
            model = call_with_known(factory, offered, keys)
        except TypeError as error:
            raise RecipeError(
                f"model.name = {name!r}: calling it with {sorted(keys)} of the recipe failed: {error}. "
                f"Its parameters are the keys of section `model`, plus any of {', '.join(offered)}"
            ) from error
        if not isinstance(model, nn.Module):
            raise RecipeError(
                f"model.name = {name!r} returned a {type(model).__name__}: expected a torch.nn.Module"
            )
        return model

    return build


def _built_in(name: str, keys: dict[str, Any], **offered: Any) -> nn.Module:
    if not _takes(BUILT_IN[name], offered):
        able = [other for other, factory in BUILT_IN.items() if _takes(factory, offered)]
        raise RecipeError(
            f"model.name = {name!r} does not read what the task has: it reads "
            f"{', '.join(_reads(BUILT_IN[name])[1])}; the task says {', '.join(offered)}. Models that do: "
            f"{', '.join(able)}"
        )
    return BUILT_IN[name](**offered, **keys)


def _takes(factory: ModelFactory, offered: dict[str, Any]) -> bool:
    needed, read = _reads(factory)
    return needed <= set(offered) <= set(read)


def _reads(factory: ModelFactory) -> tuple[set[str], list[str]]:
    """What a task has to say, and what it may say; the rest are keys of the recipe."""
    said = [p for p in signature(factory).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return {p.name for p in said if p.default is p.empty}, [p.name for p in said]
