"""The recipe: what a run computes, and where and how it runs. Every key, its type, range and default.

The sections task, model, data, batch, optim, schedule, train and eval are the mathematics of a run. The
others (hardware, launch, checkpoint, run, track) decide only where and how fast it runs, and may change at
any restart. Questions that need more than one section, or the machine, are settled in `distdl.plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

IMPORT_PATH = "import path"
"""Tag of the union members whose name is `package.module:attribute`."""

IMPORT_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, no conversion between types, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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


class ImportedModel(NamedSection):
    """A model of your own, made by a factory. Keys beside `name` are passed to the factory."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        pattern=IMPORT_PATTERN, description="Import path of its factory, package.module:factory."
    )


class Augment(Section):
    """Random changes to training samples. Each is keyed by (seed, step, microbatch)."""

    flip: bool = Field(False, description="Mirror images left and right with probability one half.")
    crop_padding: Natural = Field(0, description="Pad images by so many pixels a side, crop back at random.")
    cutout: Natural = Field(0, description="Blank a square of so many pixels a side at random in each image.")
    token_dropout: Fraction = Field(0.0, description="Probability that a token is replaced.")
    token_dropout_id: Natural = Field(1, description="What a dropped token is replaced by (1: unknown).")
    jitter: NotNegative = Field(0.0, description="Standard deviation of the noise added to a series.")


class Data(Section):
    """What to train and evaluate on: a catalogue `name`, a `path` or a `mixture`, exactly one of them."""

    name: Text | None = Field(None, description="Name in the catalogue, such as fashion_mnist.")
    path: Text | None = Field(
        None, description="Folder or URL of a prepared dataset, of Parquet files, or of save_to_disk."
    )
    mixture: dict[Text, float] | None = Field(
        None, description="Name or path of each dataset, and its share of the samples; shares add up to 1."
    )
    columns: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="Columns to read. Null: all of them."
    )
    train_split: Text = Field("train", description="Split to train on.")
    eval_split: Text = Field("test", description="Split to evaluate on.")
    shuffle: bool = Field(True, description="Visit the samples in another random order in each epoch.")
    order: Literal["full", "block", "sequential", "length_bucketed", "packed"] = Field(
        "full", description="How far a shuffle reaches, and what stands together: see docs/order.md."
    )
    block_window: Count = Field(10_000, description="Samples that are shuffled together (order block).")
    bucket_batches: Count = Field(
        200, description="Batches whose samples are sorted by length together (order length_bucketed)."
    )
    sequence: Text | None = Field(
        None, description="Column that order and augmentation look at. Null: the only one of varying length."
    )
    pack_length: Count | None = Field(None, description="Tokens of one row to learn from (order packed).")
    epoch_rows: Count | None = Field(
        None, description="Samples of one epoch of a mixture. Null: as many as its datasets have together."
    )
    drop_last: bool = Field(False, description="Leave out the short last batch of an epoch.")
    transform: str | None = Field(
        None,
        pattern=IMPORT_PATTERN,
        description="Import path of a function (rows, key) -> rows, to train on.",
    )
    augment: Augment = Field(default_factory=Augment, description="Random changes to training samples.")

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        given = [key for key in ("name", "path", "mixture") if getattr(self, key) is not None]
        if len(given) != 1:
            raise _problem(
                "give exactly one of name (a catalogue name), path (a folder) and mixture (several); given: "
                f"{', '.join(given) or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def _packs(self) -> Data:
        if (self.order == "packed") != (self.pack_length is not None):
            raise _problem("order packed and pack_length (tokens of one row) go together: give both or none")
        if self.mixture is not None and self.order != "full":
            raise _problem(f"a mixture has an order of its own; leave out order (given: {self.order})")
        if self.mixture is not None and not self.shuffle:
            raise _problem("a mixture is always shuffled; leave out shuffle: false")
        if self.epoch_rows is not None and self.mixture is None:
            raise _problem("epoch_rows is for a mixture; an epoch of one dataset is each of its samples once")
        return self


class Batch(Section):
    """Samples of one step. `global` / `micro` microbatches make a step, however many processes share them."""

    global_: Count = Field(alias="global", description="Samples of one optimiser step, over all processes.")
    micro: Count = Field(description="Samples of one forward and backward pass.")


class _Optimiser(NamedSection):
    lr: Positive = Field(description="Peak learning rate; the schedule multiplies it.")
    clip_norm: Positive | None = Field(None, description="Largest norm of the gradient; null: no limit.")
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
            raise _problem(f"give exactly one of every_epochs and every_steps; {given}")
        return self


class OneCycle(NamedSection):
    """Up to the peak, then down far below the start (Smith and Topin, 2018)."""

    name: Literal["one_cycle"] = Field(description="The schedule.")
    peak_at: Annotated[float, Field(gt=0, lt=1)] = Field(0.3, description="Share of the run before the peak.")
    start_factor: Factor = Field(0.04, description="First learning rate, as a share of the peak.")
    final_factor: Factor = Field(1e-4, description="Last learning rate, as a share of the peak.")


class Train(Section):
    """How long, from which seed, and in which arithmetic. Give epochs, max_steps, or both."""

    epochs: Count | None = Field(None, description="Passes over the training data.")
    max_steps: Count | None = Field(None, description="Steps. With epochs too, whichever comes first.")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(0, description="Seed of everything random.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Arithmetic of forward and backward.")
    reduction: Literal["fast"] = Field("fast", description="How gradients are summed over processes.")
    max_nonfinite_steps: Count = Field(10, description="Non-finite steps in a row that end the run.")

    @model_validator(mode="after")
    def _ends(self) -> Train:
        if self.epochs is None and self.max_steps is None:
            raise _problem("give epochs, max_steps, or both (whichever comes first); neither was given")
        return self


class _Every(Section):
    every_epochs: Count | None = Field(1, description="Epochs between two. Null where every_steps is given.")
    every_steps: Count | None = Field(None, description="Steps between two; every_epochs is then off.")

    @model_validator(mode="before")
    @classmethod
    def _steps_turn_epochs_off(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("every_steps") is None:
            return given
        return {"every_epochs": None, **given}

    @model_validator(mode="after")
    def _one_period(self) -> _Every:
        if self.every_epochs is not None and self.every_steps is not None:
            raise _problem("every_epochs and every_steps exclude each other; give one of them")
        return self


class Eval(_Every):
    """When to evaluate, and what "best" means. With both periods null, only at the end."""

    metric: Text = Field(
        "accuracy", description="The task's metric whose best value is noted, and that patience watches."
    )
    mode: Literal["max", "min"] = Field("max", description="Whether a larger or a smaller metric is better.")
    patience: Count | None = Field(None, description="Evaluations without improvement that end the run.")
    min_delta: NotNegative = Field(0.0, description="Smallest change of the metric that is an improvement.")


class Hardware(Section):
    """What computes the run. Nothing here changes the mathematics."""

    engine: Literal["ddp"] = Field("ddp", description="Library that shares the work among processes.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    threads: Literal["auto"] | Count = Field("auto", description="CPU threads of one process.")
    channels_last: Literal["auto"] | bool = Field("auto", description="Memory layout of images.")
    unused_parameters: bool = Field(False, description="Some parameters get no gradient in some steps (DDP).")
    workers: Natural = Field(0, description="Processes that run data.transform ahead. 0: in the rank itself.")
    cache_bytes: Count = Field(
        64 * 2**30, description="Disk space of this node for shards that are streamed from a URL."
    )
    retry_s: NotNegative = Field(300.0, description="Seconds to try again where a remote shard fails.")
    prefetch_steps: Literal["auto"] | Natural = Field(
        "auto", description="Steps of data prepared ahead. auto: 2 on cuda; 0 on cpu, where no core is idle."
    )


class Launch(Section):
    """Processes, and what happens when one fails."""

    procs: Literal["auto"] | Count = Field("auto", description="Processes on this machine.")
    max_restarts: Natural = Field(3, description="Failures in a row, with no step gained, that are survived.")
    timeout_s: Positive = Field(600.0, description="Seconds that a process waits for the others.")


class Checkpoint(_Every):
    """When to save. With both periods null, only at the end and on request."""

    keep: Count = Field(3, description="Newest checkpoints that are kept.")


class Run(Section):
    """Where the run's files lie."""

    dir: Text | None = Field(None, description="Run directory. Null: runs/ and the recipe file's stem.")


class Track(Section):
    """What is written down on the way."""

    every_steps: Count = Field(10, description="Steps between two entries in metrics.jsonl.")


NAMED: dict[str, dict[str, type[NamedSection]]] = {
    "task": {"image_classification": ImageClassification, IMPORT_PATH: ImportedTask},
    "model": {"cnn5": Cnn5, IMPORT_PATH: ImportedModel},
    "optim": {"sgd": Sgd, "adamw": AdamW},
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


def _problem(message: str) -> PydanticCustomError:
    return PydanticCustomError("recipe", "{message}", {"message": message})


Task = Annotated[
    Annotated[ImageClassification, Tag("image_classification")] | Annotated[ImportedTask, Tag(IMPORT_PATH)],
    Discriminator(_by_name("task")),
]
Model = Annotated[
    Annotated[Cnn5, Tag("cnn5")] | Annotated[ImportedModel, Tag(IMPORT_PATH)],
    Discriminator(_by_name("model")),
]
Optim = Annotated[
    Annotated[Sgd, Tag("sgd")] | Annotated[AdamW, Tag("adamw")],
    Discriminator(_by_name("optim")),
]
Schedule = Annotated[
    Annotated[Constant, Tag("constant")]
    | Annotated[Cosine, Tag("cosine")]
    | Annotated[Step, Tag("step")]
    | Annotated[OneCycle, Tag("one_cycle")],
    Discriminator(_by_name("schedule")),
]


class Recipe(Section):
    """One training run: its mathematics, and where and how it runs."""

    task: Task = Field(description="What is learnt: loss and metrics.")
    model: Model = Field(description="The network.")
    data: Data = Field(description="What it learns from.")
    batch: Batch = Field(description="Samples of one step.")
    optim: Optim = Field(description="The optimiser.")
    schedule: Schedule = Field(
        default_factory=lambda: Constant(name="constant"), description="The learning rate over time."
    )
    train: Train = Field(description="How long, which seed, which arithmetic.")
    eval: Eval = Field(default_factory=Eval, description="When to evaluate, and what best means.")
    hardware: Hardware = Field(default_factory=Hardware, description="What computes the run.")
    launch: Launch = Field(default_factory=Launch, description="Processes and restarts.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="When to save; how many to keep.")
    run: Run = Field(default_factory=Run, description="Where the run's files lie.")
    track: Track = Field(default_factory=Track, description="What is written down on the way.")
