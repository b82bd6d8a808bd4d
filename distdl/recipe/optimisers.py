"""Sections `optim` and `schedule`: how weights are updated, and the learning rate over time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from distdl.recipe.base import (
    IMPORT_PATTERN,
    Count,
    Factor,
    Fraction,
    NamedSection,
    Natural,
    NotNegative,
    Positive,
    Text,
    problem,
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
