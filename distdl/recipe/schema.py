"""The recipe: what a run computes, and where and how it runs. Every key, its type, range and default.

The sections task, model, init, data, batch, optim, schedule, train and eval are the mathematics of a run. The
others (hardware, launch, checkpoint, run, track) decide only where and how fast it runs, and may change at
any restart. Questions that need more than one section, or the machine, are settled in `distdl.plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distdl.recipe.base import (
    IMPORT_PATTERN,
    Count,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Section,
    Text,
    problem,
)
from distdl.recipe.named import Model, Optim, Schedule, Task
from distdl.recipe.optimisers import Constant
from distdl.recipe.slurm import Slurm
from distdl.recipe.ssh import Ssh


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
    order: Literal["full", "block", "sequential", "length_bucketed", "packed", "lanes"] = Field(
        "full", description="How far a shuffle reaches, and what stands together: see docs/order.md."
    )
    block_window: Count = Field(10_000, description="Samples that are shuffled together (order block).")
    bucket_batches: Count = Field(
        200, description="Batches whose samples are sorted by length together (order length_bucketed)."
    )
    sequence: Text | None = Field(
        None, description="Column that order and augmentation look at. Null: the only one of varying length."
    )
    pack_length: Count | None = Field(
        None, description="Tokens of one row to learn from (orders packed and lanes)."
    )
    eval_pack_length: Count | None = Field(
        None, description="Tokens of one row to evaluate. Null: as pack_length."
    )
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
            raise problem(
                "give exactly one of name (a catalogue name), path (a folder) and mixture (several); given: "
                f"{', '.join(given) or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def _packs(self) -> Data:
        if (self.order in ("packed", "lanes")) != (self.pack_length is not None):
            raise problem(
                "orders packed and lanes go together with pack_length (tokens of one row): give both or none"
            )
        if self.eval_pack_length is not None and self.pack_length is None:
            raise problem("eval_pack_length is for the orders packed and lanes; give pack_length too")
        if self.mixture is not None and self.order != "full":
            raise problem(f"a mixture has an order of its own; leave out order (given: {self.order})")
        if self.mixture is not None and not self.shuffle:
            raise problem("a mixture is always shuffled; leave out shuffle: false")
        if self.epoch_rows is not None and self.mixture is None:
            raise problem("epoch_rows is for a mixture; an epoch of one dataset is each of its samples once")
        return self


class Init(Section):
    """Weights to begin with, in a run that has no checkpoint to go on from. Null: the model's own."""

    from_: Text | None = Field(
        None, alias="from", description="A checkpoint, a run directory, or a safetensors file."
    )
    strict: bool = Field(True, description="Every tensor of both has to find its match, or be ignored.")
    ignore: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        (), description="Tensors left as the model has them; * stands for any text."
    )
    map: dict[Text, Text] = Field(
        {}, description="Names there to names in the model; each * of the new is what that of the old was."
    )

    @model_validator(mode="after")
    def _stars_agree(self) -> Init:
        for old, new in self.map.items():
            if new.count("*") > old.count("*"):
                raise problem(f"map {old!r}: {new!r} has more * than the name that says what they are")
        return self


class Batch(Section):
    """Samples of one step. `global` / `micro` microbatches make a step, however many processes share them."""

    global_: Count = Field(alias="global", description="Samples of one optimiser step, over all processes.")
    micro: Count = Field(description="Samples of one forward and backward pass.")


class Train(Section):
    """How long, from which seed, and in which arithmetic. Give epochs, max_steps, or both."""

    epochs: Count | None = Field(None, description="Passes over the training data.")
    max_steps: Count | None = Field(None, description="Steps. With epochs too, whichever comes first.")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(0, description="Seed of everything random.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Arithmetic of forward and backward; the weights stay fp32. fp16 scales the loss."
    )
    reduction: Literal["fast", "exact"] = Field(
        "fast", description="How gradients are summed. exact: the same bits at any number of processes."
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Decay, a step, of a moving average of the weights, which is what is evaluated."
    )
    max_nonfinite_steps: Count = Field(10, description="Non-finite steps in a row that end the run.")

    @model_validator(mode="after")
    def _ends(self) -> Train:
        if self.epochs is None and self.max_steps is None:
            raise problem("give epochs, max_steps, or both (whichever comes first); neither was given")
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
            raise problem("every_epochs and every_steps exclude each other; give one of them")
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

    engine: Literal["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3", "accelerate"] = Field(
        "ddp", description="Library that shares the work among processes, and what it shards."
    )
    shard_optimizer: bool = Field(False, description="Each process keeps a part of the optimiser (DDP).")
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="What is kept in CPU memory while a GPU does not need it."
    )
    hybrid_shard: bool = Field(False, description="Shard inside each node, replicate over nodes (FSDP).")
    fuse: Literal["auto"] | Count = Field(
        "auto", description="Microbatches run as one forward and backward, results unchanged. 1: none."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in backward: less memory, more time."
    )
    compile: bool = Field(False, description="Compile the model with torch.compile.")
    deepspeed: dict[str, Any] = Field(
        {},
        description="Further keys of DeepSpeed's configuration (engines zero0 to zero3).",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    threads: Literal["auto"] | Count = Field("auto", description="CPU threads of one process.")
    affinity: Literal["numa", "none"] = Field(
        "numa", description="numa: a process stays on the CPUs of one NUMA node, its GPU's if it has one."
    )
    channels_last: Literal["auto"] | bool = Field(
        "auto", description="Memory layout of images. auto: where there are convolutions that it suits."
    )
    unused_parameters: bool = Field(False, description="Some parameters get no gradient in some steps.")
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

    nodes: Count = Field(1, description="Machines that share the run.")
    min_nodes: Count | None = Field(
        None, description="Fewest of them with which it begins and goes on. Null: all."
    )
    gather_s: Positive = Field(
        30.0, description="Seconds that the first min_nodes wait for the rest before they begin."
    )
    procs: Literal["auto"] | Count = Field("auto", description="Processes on each machine.")
    max_restarts: Natural = Field(3, description="Failures in a row, with no step gained, that are survived.")
    timeout_s: Positive = Field(600.0, description="Seconds that a process waits for the others.")
    ssh: Ssh = Field(default_factory=Ssh, description="How other machines are reached (--on ssh).")
    slurm: Slurm = Field(default_factory=Slurm, description="What is asked of Slurm (--on slurm).")

    @model_validator(mode="after")
    def _range(self) -> Launch:
        if self.min_nodes is not None and self.min_nodes >= self.nodes:
            raise problem(
                f"launch.min_nodes = {self.min_nodes} is not below launch.nodes = {self.nodes}: leave it "
                "out, or say with how many more the run may go on (launch.nodes)"
            )
        return self


class Checkpoint(_Every):
    """When to save. With both periods null, only at the end and on request."""

    keep: Count = Field(3, description="Newest checkpoints that are kept.")
    keep_best: Natural = Field(
        0,
        description="So many of the best by eval.metric are kept too, of those evaluated at their own step.",
    )
    keep_every_steps: Count | None = Field(None, description="Steps divisible by it are kept too.")
    keep_every_s: Positive | None = Field(
        None, description="Kept too: from the oldest on, one in each so many seconds."
    )
    dir: Text | None = Field(
        None,
        description="Where checkpoints go: a folder, or a URL of an object store. Null: the run directory.",
    )
    asynchronous: bool = Field(
        True, description="Write in the background, from a copy in memory, while training goes on."
    )
    replicas: Literal["none", "node"] = Field(
        "none", description="node: the last snapshot is also in the memory of its node and of the next."
    )


class Run(Section):
    """Where the run's files lie."""

    dir: Text | None = Field(None, description="Run directory. Null: runs/ and the recipe file's stem.")


class Track(Section):
    """What is written down on the way."""

    every_steps: Count = Field(10, description="Steps between two entries in metrics.jsonl.")


class Recipe(Section):
    """One training run: its mathematics, and where and how it runs."""

    task: Task = Field(description="What is learnt: loss and metrics.")
    model: Model = Field(description="The network.")
    init: Init = Field(default_factory=Init, description="Weights to begin with.")
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
