"""The sections that choose by name: task, model, optimiser and schedule, each with its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from distdl.recipe.base import (
    IMPORT_PATTERN,
    Count,
    Factor,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Section,
    Text,
    problem,
)

IMPORT_PATH = "import path"
"""Tag of the union members whose name is `package.module:attribute`."""


class NamedSection(Section):
    """A section that chooses by `name`; its other keys are options of what was chosen."""

    name: str = Field(description="What is chosen.")

    def options(self) -> dict[str, Any]:
        """Every key but `name`, extra keys included, as JSON values: keyword arguments for what is named."""
        return self.model_dump(mode="json", by_alias=True, exclude={"name"})


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
    ignore: Natural = Field(255, description="Mask value of pixels that are not counted.")


class Detection(NamedSection):
    """Boxes and classes of the objects in an image, as centres; the metrics are map, map_50 and map_75."""

    name: Literal["detection"] = Field(description="The task.")
    num_classes: Count = Field(description="Classes of objects, 0 to this - 1; there is none for background.")
    image: Text = Field("image", description="Column of the images.")
    boxes: Text = Field("boxes", description="Column of the boxes: left, top, right, bottom, in pixels.")
    classes: Text = Field("classes", description="Column of the objects' classes.")
    max_objects: Count = Field(128, description="Objects that an image may have.")
    max_detections: Count = Field(100, description="Detections of an image that are measured, best first.")


class Reconstruction(NamedSection):
    """Images from themselves, by squared error; the metrics are squared_error (an image) and pixel_error."""

    name: Literal["reconstruction"] = Field(description="The task.")
    image: Text | None = Field(None, description="Column of the images. Null: the only one.")


class LanguageModelling(NamedSection):
    """The next token at every place of a text; the metrics are perplexity and loss."""

    name: Literal["language_modelling"] = Field(description="The task.")
    vocabulary: Count | None = Field(None, description="Different token ids. Null: as the dataset says.")


class Translation(NamedSection):
    """A column of tokens to another, by cross-entropy; the metrics are bleu, chrf, perplexity and loss."""

    name: Literal["translation"] = Field(description="The task.")
    source: Text = Field(description="Column of tokens to translate from.")
    target: Text = Field(description="Column of tokens to translate to.")
    label_smoothing: Fraction = Field(0.0, description="Share of the target spread over all tokens.")
    beam: Natural = Field(1, description="Sequences kept in evaluation. 1: greedy. 0: the loss alone.")
    max_tokens: Count = Field(80, description="Longest translation in evaluation.")
    length_penalty: NotNegative = Field(1.0, description="How much a longer sequence is favoured.")


class Transcription(NamedSection):
    """Images to strings of symbols, by connectionist temporal classification; the metric is accuracy."""

    name: Literal["transcription"] = Field(description="The task.")


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
    """Token sequences through one vector and back, by cross-entropy; metrics: accuracy and loss a token."""

    name: Literal["sequence_reconstruction"] = Field(description="The task.")


class ImportedTask(NamedSection):
    """A task of your own. Keys beside `name` are passed to it."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=IMPORT_PATTERN, description="Import path, package.module:attribute.")


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
    pooling: Literal["last", "mean", "max"] = Field(
        "last", description="What the head sees of a sequence: its last state, or all states pooled."
    )


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


_Depth = Literal[18, 34, 50, 101, 152, 20, 32, 44, 56, 110]


class ResNet(NamedSection):
    """A residual network (He et al., 2016)."""

    name: Literal["resnet"] = Field(description="The model.")
    depth: _Depth = Field(
        18, description="Layers: 18 to 152 in four stages; 20, 32, 44, 56, 110 in three, for small images."
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
    pooling: Literal["last", "mean", "max"] = Field(
        "last", description="What the code is made of: the encoder's last state, or all states pooled."
    )


class ImportedModel(NamedSection):
    """A model of your own, made by a factory. Keys beside `name` are passed to the factory."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        pattern=IMPORT_PATTERN, description="Import path of its factory, package.module:factory."
    )


class _Optimiser(NamedSection):
    lr: Positive = Field(description="Peak learning rate; the schedule multiplies it.")
    clip_norm: Positive | None = Field(None, description="Largest norm of the gradient; null: no limit.")
    freeze: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        (), description="Parameters that are not trained: names, with * and ? as in file names."
    )
    decay_norms_and_biases: bool = Field(False, description="Also decay normalisation weights and biases.")


class Sgd(_Optimiser):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = Field(description="The optimiser.")
    momentum: Fraction = Field(0.0, description="Share of the last update that is kept.")
    nesterov: bool = Field(False, description="Look ahead by the momentum before the gradient is applied.")
    weight_decay: NotNegative = Field(0.0, description="Multiple of the weights added to the gradient.")


class AdamW(_Optimiser):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    name: Literal["adamw"] = Field(description="The optimiser.")
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = Field(
        (0.9, 0.999), description="Decay of the running mean and of the running mean square."
    )
    eps: Positive = Field(1e-8, description="Added to the denominator.")
    weight_decay: NotNegative = Field(0.01, description="Share of the weights, times lr, lost in a step.")


class Lion(_Optimiser):
    """The sign of a blend of momentum and gradient (Chen et al., 2023); wants a smaller lr than AdamW."""

    name: Literal["lion"] = Field(description="The optimiser.")
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = Field(
        (0.9, 0.99), description="Share of the momentum in an update, and of it that is kept."
    )
    weight_decay: NotNegative = Field(0.0, description="Share of the weights, times lr, lost in a step.")


class Lamb(_Optimiser):
    """AdamW scaled to each parameter's norm, for large batches (You et al., 2020)."""

    name: Literal["lamb"] = Field(description="The optimiser.")
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = Field(
        (0.9, 0.999), description="Decay of the running mean and of the running mean square."
    )
    eps: Positive = Field(1e-6, description="Added to the denominator.")
    weight_decay: NotNegative = Field(0.01, description="Share of the weights in an update's direction.")


class Adafactor(_Optimiser):
    """Running mean squares of rows and columns alone, to save memory (Shazeer and Stern, 2018)."""

    name: Literal["adafactor"] = Field(description="The optimiser.")
    beta2_decay: Annotated[float, Field(le=0)] = Field(
        -0.8, description="Exponent of the step: how soon the mean squares become long-lived."
    )
    d: Annotated[float, Field(ge=1)] = Field(1.0, description="Largest root mean square of an update.")
    weight_decay: NotNegative = Field(0.0, description="Share of the weights, times lr, lost in a step.")


class ImportedOptimiser(_Optimiser):
    """A torch.optim.Optimizer of your own. Keys that are not listed here are passed to it."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=IMPORT_PATTERN, description="Import path of its class, package.module:Class.")
    weight_decay: NotNegative | None = Field(None, description="Its weight_decay. Null: it takes none.")
    elementwise: bool = Field(
        False,
        description="Each weight is updated by its own gradient and state alone, so that engines may hand it "
        "slices of parameters.",
    )


AnyOptimiser = Sgd | AdamW | Lion | Lamb | Adafactor | ImportedOptimiser


class _Warmup(NamedSection):
    warmup_steps: Natural = Field(0, description="Steps over which the learning rate rises to its peak.")


class Constant(_Warmup):
    """The peak learning rate throughout."""

    name: Literal["constant"] = Field(description="The schedule.")


class Cosine(_Warmup):
    """Half a cosine from the peak to `final_factor` times it, over the whole run."""

    name: Literal["cosine"] = Field(description="The schedule.")
    final_factor: Factor = Field(0.0, description="Last learning rate, as a share of the peak.")


class Step(_Warmup):
    """Multiply by `gamma` every so many epochs, or steps."""

    name: Literal["step"] = Field(description="The schedule.")
    every_epochs: Count | None = Field(None, description="Epochs between two drops.")
    every_steps: Count | None = Field(None, description="Steps between two drops.")
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="Factor of one drop.")

    @model_validator(mode="after")
    def _one_period(self) -> Step:
        if (self.every_epochs is None) == (self.every_steps is None):
            given = "neither was given" if self.every_epochs is None else "both were given"
            raise problem(f"give exactly one of every_epochs and every_steps; {given}")
        return self


class OneCycle(NamedSection):
    """Up to the peak, then down far below the start (Smith and Topin, 2018)."""

    name: Literal["one_cycle"] = Field(description="The schedule.")
    peak_at: Annotated[float, Field(gt=0, lt=1)] = Field(0.3, description="Share of the run before the peak.")
    start_factor: Factor = Field(0.04, description="First learning rate, as a share of the peak.")
    final_factor: Factor = Field(1e-4, description="Last learning rate, as a share of the peak.")


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


Task = Annotated[
    Annotated[ImageClassification, Tag("image_classification")]
    | Annotated[TextClassification, Tag("text_classification")]
    | Annotated[Segmentation, Tag("segmentation")]
    | Annotated[Detection, Tag("detection")]
    | Annotated[Reconstruction, Tag("reconstruction")]
    | Annotated[LanguageModelling, Tag("language_modelling")]
    | Annotated[Translation, Tag("translation")]
    | Annotated[Transcription, Tag("transcription")]
    | Annotated[SeriesClassification, Tag("series_classification")]
    | Annotated[Forecasting, Tag("forecasting")]
    | Annotated[SequenceReconstruction, Tag("sequence_reconstruction")]
    | Annotated[ImportedTask, Tag(IMPORT_PATH)],
    Discriminator(_by_name("task")),
]
Model = Annotated[
    Annotated[Cnn5, Tag("cnn5")]
    | Annotated[Recurrent, Tag("lstm")]
    | Annotated[Recurrent, Tag("gru")]
    | Annotated[Recurrent, Tag("rnn")]
    | Annotated[Cnn, Tag("cnn")]
    | Annotated[Crnn, Tag("crnn")]
    | Annotated[ImageRnn, Tag("image_rnn")]
    | Annotated[ResNet, Tag("resnet")]
    | Annotated[UNet, Tag("unet")]
    | Annotated[CenterNet, Tag("centernet")]
    | Annotated[Autoencoder, Tag("autoencoder")]
    | Annotated[ConvAutoencoder, Tag("conv_autoencoder")]
    | Annotated[LstmLm, Tag("lstm_lm")]
    | Annotated[Seq2SeqLstm, Tag("seq2seq_lstm")]
    | Annotated[CrnnCtc, Tag("crnn_ctc")]
    | Annotated[Fcn1d, Tag("fcn1d")]
    | Annotated[Conv1dResnet, Tag("conv1d_resnet")]
    | Annotated[LstmAutoencoder, Tag("lstm_autoencoder")]
    | Annotated[ImportedModel, Tag(IMPORT_PATH)],
    Discriminator(_by_name("model")),
]
Optim = Annotated[
    Annotated[Sgd, Tag("sgd")]
    | Annotated[AdamW, Tag("adamw")]
    | Annotated[Lion, Tag("lion")]
    | Annotated[Lamb, Tag("lamb")]
    | Annotated[Adafactor, Tag("adafactor")]
    | Annotated[ImportedOptimiser, Tag(IMPORT_PATH)],
    Discriminator(_by_name("optim")),
]
Schedule = Annotated[
    Annotated[Constant, Tag("constant")]
    | Annotated[Cosine, Tag("cosine")]
    | Annotated[Step, Tag("step")]
    | Annotated[OneCycle, Tag("one_cycle")],
    Discriminator(_by_name("schedule")),
]
