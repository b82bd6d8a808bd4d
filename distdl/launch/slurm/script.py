"""The text of a job: a pure function of the recipe and of what the user typed.

Every value is data. In a directive it is quoted as sbatch reads quotes, in the script as bash does; a line
break in a directive, which would begin another, is refused by the recipe's schema.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distdl.errors import PlanError
from distdl.launch.place import Nodes
from distdl.recipe import Recipe
from distdl.recipe.slurm import Slurm

FOLDER = "slurm"
"""Inside the run directory: the script, and the logs of its jobs."""


@dataclass(frozen=True)
class Job:
    """A run to be submitted: the recipe's file and overrides as typed, and what was decided about it."""

    config: str
    overrides: tuple[str, ...]
    run_dir: str
    nodes: Nodes
    procs: int
    python: str
    slurm: Slurm
    allow_changed: bool = False

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        config: str,
        overrides: Sequence[str],
        nodes: Nodes,
        procs: int,
        python: str,
        *,
        allow_changed: bool = False,
    ) -> Job:
        """The job that trains `recipe`; `python` is the interpreter where the recipe names none."""
        slurm = recipe.launch.slurm
        found = slurm.python or python
        run_dir = recipe.run.dir or "runs/unnamed"
        _check_run_dir(run_dir)
        return cls(config, tuple(overrides), run_dir, nodes, procs, found, slurm, allow_changed)


def _check_run_dir(run_dir: str) -> None:
    # Slurm takes a backslash in the name of a log for an order to leave its % signs alone.
    if not run_dir.isprintable() or "\\" in run_dir:
        raise PlanError(
            f"run.dir = {run_dir!r}: Slurm cannot write logs there; choose one without backslashes, line "
            "breaks and control characters"
        )


def sbatch_text(job: Job) -> str:
    """The whole script, for sbatch."""
    slurm = job.slurm
    return "\n".join(
        [
            "#!/bin/bash",
            "# Written by `distdl launch --on slurm`. The log's folder has to be there when it is submitted:",
            f"#   mkdir -p {shlex.quote(f'{job.run_dir}/{FOLDER}')}",
            *(f"#SBATCH {d}" for d in directives(job)),
            *preparation(slurm),
            f"exec {shlex.join(program(job))}",
            "",
        ]
    )


def directives(job: Job) -> Iterator[str]:
    """What follows `#SBATCH`, one option each."""
    slurm = job.slurm
    name = job.run_dir.rstrip("/").rpartition("/")[2]
    log = f"{job.run_dir.replace('%', '%%')}/{FOLDER}/{'%A_%a' if slurm.array else '%j'}.log"
    options = {
        "job-name": name,
        "output": log,
        "open-mode": "append",
        "nodes": f"{job.nodes.least}-{job.nodes.most}" if job.nodes.elastic else job.nodes.most,
        # With it, Slurm counts the tasks of the fewest nodes, and gives as many as those need.
        "ntasks-per-node": None if job.nodes.elastic else 1,
        **_asked(slurm),
        "time": slurm.time,
        "mail-user": slurm.mail_user,
        "mail-type": slurm.mail_type,
        "dependency": slurm.dependency,
        "array": slurm.array,
        # To the job's program alone: it passes the signal on, and so knows why the run stopped.
        "signal": f"B:USR1@{slurm.warn_s}",
    }
    yield from (f"--{option}={quoted(str(value))}" for option, value in options.items() if value is not None)
    if job.nodes.elastic:
        yield "--no-kill"  # the job goes on with the nodes that are left
    yield "--requeue"
    yield from slurm.extra


def _asked(slurm: Slurm) -> dict[str, str | int | None]:
    """What each node has to have, and who asks: option -> value."""
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    prefix = "gpu:" if slurm.gpu_option == "gres" else ""
    return {
        "cpus-per-task": slurm.cpus,
        "mem": slurm.memory,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        slurm.gpu_option: f"{prefix}{kind}{slurm.gpus}" if slurm.gpus else None,
    }


def doctor_command(job: Job, wait_s: float, *, as_json: bool) -> list[str]:
    """The srun command that examines the nodes a run would get: a task for each process, which share the CPUs
    of their node, for ten minutes at most.

    No shell but the nodes' own reads it, and there every value is a word.
    """
    slurm = job.slurm
    options = {"job-name": "distdl-doctor", "nodes": job.nodes.most, "ntasks-per-node": job.procs}
    options |= {"time": "00:10:00"}
    options |= {name: value for name, value in _asked(slurm).items() if value is not None}
    if slurm.cpus is not None:  # of a node; Slurm counts them for a task
        options["cpus-per-task"] = max(1, slurm.cpus // job.procs)
    python = slurm.python or "python3" if slurm.container else job.python
    words = [python, "-m", "distdl", "doctor", "--wait", str(wait_s), *(["--json"] if as_json else [])]
    return [
        *("srun", *(f"--{name}={value}" for name, value in options.items())),
        *(word for directive in slurm.extra for word in shlex.split(directive)),
        *("bash", "-c", "\n".join([*preparation(slurm), 'exec "$@"']), "bash"),
        *(*slurm.container, *words, "--", job.config, *job.overrides),
    ]


def preparation(slurm: Slurm) -> list[str]:
    """The lines of shell that make a node's environment that of the run."""
    return [
        "set -e",
        *(f"export {name}={shlex.quote(str(value))}" for name, value in slurm.env.items()),
        *(f"module load {shlex.quote(name)}" for name in slurm.modules),
        *slurm.setup,
    ]


def quoted(value: str) -> str:
    """A value as sbatch reads one in a directive: a backslash takes the meaning of what follows it."""
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./^\[\]&|*()-]+", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def program(job: Job) -> list[str]:
    """The job's program on its first node (launch/slurm/job.py), and after `--` what it starts on each."""
    array = ["--array-key", job.slurm.array_key] if job.slurm.array else []
    words = ["--run", job.run_dir, "--idle-attempts", str(job.slurm.idle_attempts), *array]
    words += ["--elastic"] if job.nodes.elastic else []
    return [job.python, "-m", "distdl.launch.slurm.job", *words, "--", *agent(job)]


def agent(job: Job) -> list[str]:
    """The command that Slurm starts once on each node."""
    python = job.slurm.python or "python3" if job.slurm.container else job.python
    options = ["--nodes", str(job.nodes), "--procs", str(job.procs)]
    changed = ["--allow-changed"] if job.allow_changed else []
    command = [python, "-m", "distdl", "launch", *options, *changed, "--", job.config, *job.overrides]
    return [*job.slurm.container, *command]
