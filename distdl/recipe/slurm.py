"""What a run asks of Slurm: the keys of `launch.slurm`, which are also those of a cluster profile."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from distdl.recipe.base import Count, Line, Natural, Section, Text, problem

Lines = Annotated[tuple[Line, ...], Field(strict=False)]


class Slurm(Section):
    """A job of Slurm. What is null is left to the cluster's own defaults."""

    profile: Line | None = Field(
        None, description="Profile that lies under these keys: a name or a file. Null: default.yaml, if any."
    )
    partition: Line | None = Field(None, description="Partition, or several with commas.")
    account: Line | None = Field(None, description="Account that pays.")
    qos: Line | None = Field(None, description="Quality of service.")
    gpus: Natural | None = Field(None, description="GPUs of each node; also the processes, by default.")
    gpu_type: Line | None = Field(None, description="Kind of GPU, as the cluster names it.")
    gpu_option: Literal["gpus-per-node", "gres"] = Field(
        "gpus-per-node", description="How this cluster is asked for GPUs."
    )
    cpus: Count | None = Field(None, description="CPUs of each node.")
    memory: Line | None = Field(None, description="Memory of each node, such as 64G.")
    time: Line | None = Field(None, description="Time limit, such as 2:00:00 or 1-12:00:00.")
    constraint: Line | None = Field(None, description="Features that nodes must have.")
    exclude: Line | None = Field(None, description="Nodes not to use, such as node[03-05].")
    mail_user: Line | None = Field(None, description="Who is told.")
    mail_type: Line | None = Field(None, description="Of what, such as END,FAIL.")
    dependency: Line | None = Field(None, description="What to wait for, such as afterok:1234.")
    array: Line | None = Field(None, description="Tasks of an array, such as 1-6; each is a run of its own.")
    array_key: Line = Field("train.seed", description="Recipe key that takes the number of the array's task.")
    extra: Lines = Field((), description="Further directives, such as --reservation=night.")
    modules: Lines = Field((), description="Modules to load.")
    setup: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        (), description="Shell commands that are run first, on the job's first node."
    )
    env: dict[Text, str | int] = Field({}, description="Environment variables.")
    container: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        (), description="Words before the command on each node, such as [apptainer, exec, --nv, image.sif]."
    )
    python: Text | None = Field(
        None, description="Python of the job. Null: the one that submits; in a container, python3."
    )
    warn_s: Count = Field(120, description="Seconds before the time limit at which the run is to save.")
    idle_attempts: Count = Field(3, description="Attempts in a row, with no step saved, that end the job.")

    @model_validator(mode="after")
    def _there_is_time(self) -> Slurm:
        limit = seconds_of(self.time) if self.time else None
        if limit is not None and self.warn_s >= limit:
            raise problem(
                f"warn_s = {self.warn_s}: the run would be asked to save {self.warn_s} s before a limit of "
                f"{limit} s (time = {self.time!r}), before it has begun; give less"
            )
        return self

    @field_validator("env")
    @classmethod
    def _variables(cls, env: dict[str, str | int]) -> dict[str, str | int]:
        for name, value in env.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in str(value):
                raise problem(f"{name!r}: expected a name of letters, digits and _, and a value without NUL")
        return env

    @field_validator("extra")
    @classmethod
    def _directives(cls, extra: tuple[str, ...]) -> tuple[str, ...]:
        for text in extra:
            if not text.startswith("-"):
                raise problem(f"{text!r}: expected a directive as sbatch has it, such as --reservation=night")
        return extra

    @field_validator("array")
    @classmethod
    def _tasks(cls, array: str | None) -> str | None:
        if array is not None and not re.fullmatch(r"[0-9]+([-:,%]?[0-9]+)*", array):
            raise problem(f"{array!r}: expected tasks as Slurm writes them, such as 1-6, 0-15%4 or 1,3,7")
        return array

    @field_validator("container")
    @classmethod
    def _words(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if any("\0" in word for word in words):
            raise problem("a word cannot hold NUL")
        return words


def seconds_of(limit: str) -> int | None:
    """A time limit as Slurm reads it: minutes, minutes:seconds, hours:minutes:seconds, days-hours and what
    may follow. None for what it takes besides, such as UNLIMITED.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if found is None:
        return None
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] is None and found[4] is None:
        return first * 60 + second
    return days * 86400 + first * 3600 + second * 60 + third
