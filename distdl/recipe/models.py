"""Section `model`: the networks by name, and their options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from distdl.recipe.base import (
    IMPORT_PATTERN,
    Count,
    Fraction,
    NamedSection,
    problem,
)


class Cnn5(NamedSection):
    """Five convolutions with normalisation and pooling, and a fully connected head."""

    name: Literal["cnn5"] = Field(description="The model.")
    width: Count = Field(32, description="Channels of the first convolution.")
    norm: Literal["batch", "group", "none"] = Field("batch", description="Normalisation after convolutions.")
    dropout: Fraction = Field(0.0, description="Probability of dropping an activation before the last layer.")
    hidden: Count = Field(128, description="Units of the hidden fully connected layer.")


class Recurrent(NamedSection):
    """Tokens, series or images (a row a step): embedding, recurrent layers, pooling over time, head."""

    name: Literal["lstm", "gru", "rnn"] = Field(description="The model: its cell.")
    embedding: Count = Field(
        128, description="Size of the vector that stands for a token, or for what a series has at one step."
    )
    hidden: Count = Field(128, description="Units of one direction of one layer.")
    layers: Count = Field(1, description="Recurrent layers.")
    bidirectional: bool = Field(False, description="Also read from the end to the beginning.")
    dropout: Fraction = Field(
        0.0, description="Probability of dropping an activation between embedding, layers and head."
    )
    pooling: Literal["last", "mean", "max", "attention"] = Field(
        "last",
        description="What the head sees of a sequence: its last state, or all states pooled: their mean, the "
        "largest of each unit, or a mean weighed by learnt attention.",
    )
    projection: Count | None = Field(
        None, description="Size to which an LSTM layer brings its outputs. Null: as many as its units."
    )
    layer_norm: bool = Field(False, description="Normalise what each layer hands on.")
    weight_drop: Fraction = Field(0.0, description="Probability of dropping a recurrent weight.")

    @model_validator(mode="after")
    def _only_lstm_projects(self) -> Recurrent:
        if self.projection is not None and self.name != "lstm":
            raise problem(f"model.projection is a key of lstm alone, not of {self.name}: leave it out")
        if self.projection is not None and self.projection >= self.hidden:
            raise problem(
                f"model.projection = {self.projection} is not below model.hidden = {self.hidden}: give a "
                "smaller one, or leave it out"
            )
        return self


class Cnn(NamedSection):
    """A plain stack of convolutions of one width, and a linear head on the whole of the last feature map."""

    name: Literal["cnn"] = Field(description="The model.")
    layers: Count = Field(5, description="Convolutions.")
    kernel: Count = Field(3, description="Pixels of a convolution, down and across.")
    width: Count = Field(32, description="Channels (kernels) of every convolution.")
    padding: bool = Field(False, description="Keep the size of the image, with zeros around it.")
    norm: Literal["batch", "group", "none"] = Field("batch", description="Normalisation after convolutions.")


class Crnn(Cnn):
    """A plain stack of convolutions, and recurrent layers that read the rows of its feature map."""

    name: Literal["crnn"] = Field(description="The model.")  # type: ignore[assignment]
    cell: Literal["lstm", "gru", "rnn"] = Field("lstm", description="What the recurrent layers are made of.")
    hidden: Count = Field(128, description="Units of a recurrent layer.")
    recurrent_layers: Count = Field(1, description="Recurrent layers.")


class ImageRnn(NamedSection):
    """An image as a sequence of rows, read by blocks of recurrent layers with a way around each block."""

    name: Literal["image_rnn"] = Field(description="The model.")
    steps: Count = Field(28, description="Rows to which the image is pooled: inputs of the sequence.")
    features: Count = Field(28, description="Numbers to which each row is pooled.")
    blocks: Count = Field(1, description="Blocks of recurrent layers.")
    layers: Count = Field(1, description="Recurrent layers of a block.")
    hidden: Count = Field(128, description="Units of a recurrent layer.")
    cell: Literal["lstm", "gru", "rnn"] = Field("lstm", description="What the recurrent layers are made of.")
    outputs: Count | None = Field(None, description="Outputs of the head. Null: one for each class.")


_Depth = Literal[18, 34, 50, 101, 152, 8, 14, 20, 32, 44, 56, 110]


class ResNet(NamedSection):
    """A residual network (He et al., 2016)."""

    name: Literal["resnet"] = Field(description="The model.")
    depth: _Depth = Field(
        18,
        description="Layers: 18 to 152 in four stages; 8, 14, 20, 32, 44, 56, 110 in three (small images).",
    )
    stem: Literal["imagenet", "cifar"] | None = Field(
        None, description="First layers: 7x7 and pooling, or one 3x3. Null: as is usual for the depth."
    )
    width: Count | None = Field(
        None, description="Channels of the first stage. Null: 64 in four stages, 16 in three."
    )
    norm: Literal["batch", "group"] = Field("batch", description="Normalisation after convolutions.")
    dropout: Fraction = Field(0.0, description="Probability of dropping an activation before the last layer.")


class UNet(NamedSection):
    """A class for every pixel, seen at several scales (Ronneberger et al., 2015)."""

    name: Literal["unet"] = Field(description="The model.")
    width: Count = Field(64, description="Channels at full size; each halving doubles them.")
    levels: Count = Field(4, description="Halvings of the image.")
    norm: Literal["batch", "group", "none"] = Field("batch", description="Normalisation after convolutions.")


class CenterNet(NamedSection):
    """Objects as points: a score for each cell and class, offset and size (Zhou et al., 2019)."""

    name: Literal["centernet"] = Field(description="The model.")
    depth: _Depth = Field(18, description="Layers of the residual network that sees the image.")
    stem: Literal["imagenet", "cifar"] = Field(
        "imagenet", description="Its first layers: 7x7 and pooling, or one 3x3."
    )
    width: Count = Field(64, description="Channels of its first stage.")
    norm: Literal["batch", "group"] = Field("batch", description="Normalisation after convolutions.")
    hidden: Count = Field(64, description="Channels between the last feature map and each output.")


class Autoencoder(NamedSection):
    """An image through a few numbers and back, fully connected."""

    name: Literal["autoencoder"] = Field(description="The model.")
    hidden: Annotated[tuple[Count, ...], Field(strict=False)] = Field(
        (1000, 500, 250), description="Units of each layer before the code; behind it in reverse order."
    )
    code: Count = Field(30, description="Numbers that stand for an image.")
    norm: Literal["batch", "none"] = Field(
        "none", description="Normalisation between layers. batch: no microbatch may be a single row."
    )


class ConvAutoencoder(NamedSection):
    """An image through a few numbers and back, with convolutions."""

    name: Literal["conv_autoencoder"] = Field(description="The model.")
    width: Count = Field(32, description="Channels of the first convolution; the second has twice as many.")
    code: Count = Field(30, description="Numbers that stand for an image.")
    norm: Literal["batch", "group", "none"] = Field("batch", description="Normalisation after convolutions.")


class LstmLm(NamedSection):
    """A language model: token embedding, LSTM layers whose state goes on, and a layer of logits."""

    name: Literal["lstm_lm"] = Field(description="The model.")
    embedding: Count = Field(200, description="Size of the vector that stands for a token.")
    hidden: Count = Field(200, description="Units of a layer; of the last, as embedding where tied.")
    layers: Count = Field(2, description="Recurrent layers.")
    dropout: Fraction = Field(
        0.0, description="Probability of dropping a channel, for all steps of a sequence, between layers."
    )
    weight_drop: Fraction = Field(0.0, description="Probability of dropping a recurrent weight.")
    tied: bool = Field(True, description="The embedding is also what weighs the outputs.")


class Seq2SeqLstm(NamedSection):
    """A bidirectional LSTM that reads a sequence, and an LSTM with attention that writes another."""

    name: Literal["seq2seq_lstm"] = Field(description="The model.")
    embedding: Count = Field(256, description="Size of the vector that stands for a token.")
    hidden: Count = Field(256, description="Units of one direction of one layer.")
    layers: Count = Field(1, description="Layers of each of the two.")
    dropout: Fraction = Field(0.2, description="Probability of dropping an activation between layers.")
    tied: bool = Field(False, description="Source, target and output weights are one.")


class CrnnCtc(NamedSection):
    """Convolutions that keep the width of an image as time, recurrent layers, and logits at every step."""

    name: Literal["crnn_ctc"] = Field(description="The model.")
    width: Count = Field(32, description="Channels of the first convolution.")
    hidden: Count = Field(128, description="Units of one direction of one recurrent layer.")
    layers: Count = Field(1, description="Recurrent layers.")
    cell: Literal["lstm", "gru", "rnn"] = Field("lstm", description="Their cell.")
    dropout: Fraction = Field(0.0, description="Probability of dropping an activation between layers.")


class Fcn1d(NamedSection):
    """Three convolutions over the steps of a series, and their mean over time (Wang et al., 2017)."""

    name: Literal["fcn1d"] = Field(description="The model.")
    width: Count = Field(
        128, description="Channels of the first and third convolution; half of the second's."
    )
    dropout: Fraction = Field(0.0, description="Probability of dropping an activation before the head.")


class Conv1dResnet(NamedSection):
    """Three residual blocks of three convolutions over the steps of a series (Wang et al., 2017)."""

    name: Literal["conv1d_resnet"] = Field(description="The model.")
    width: Count = Field(64, description="Channels of the first block; half of the others'.")
    dropout: Fraction = Field(0.0, description="Probability of dropping an activation before the head.")


class LstmAutoencoder(NamedSection):
    """An LSTM that makes one vector of a sequence, and another that makes the sequence of it."""

    name: Literal["lstm_autoencoder"] = Field(description="The model.")
    code: Count = Field(128, description="Size of the vector that stands for a sequence.")
    embedding: Count = Field(128, description="Size of the vector that stands for a token.")
    hidden: Count = Field(128, description="Units of one direction of one layer.")
    layers: Count = Field(1, description="Recurrent layers of the encoder, and of the decoder.")
    bidirectional: bool = Field(False, description="The encoder also reads from the end to the beginning.")
    dropout: Fraction = Field(0.0, description="Probability of dropping an activation between layers.")
    pooling: Literal["last", "mean", "max", "attention"] = Field(
        "last", description="What the code is made of: the encoder's last state, or all states pooled."
    )


class ImportedModel(NamedSection):
    """A model of your own, made by a factory. Keys beside `name` are passed to the factory."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        pattern=IMPORT_PATTERN, description="Import path of its factory, package.module:factory."
    )
