"""Handing a job to Slurm, and finding it again by its run directory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distdl.errors import EnvironmentProblem
from distdl.launch.slurm.client import ask
from distdl.launch.slurm.script import FOLDER, Job, sbatch_text
from distdl.record import RunDirectory, read_lines, write_atomic

_FORMAT = "%i|%T|%M|%l|%D|%R"


def submit(job: Job, directory: RunDirectory) -> str:
    """Write the script into the run directory and hand it to Slurm; returns the job's id.

    Raises EnvironmentProblem.
    """
    directory.create()
    script = directory.path / FOLDER / "job.sbatch"
    script.parent.mkdir(exist_ok=True)
    write_atomic(script, sbatch_text(job))
    number = ask(["sbatch", "--parsable", str(script)]).strip().partition(";")[0]
    directory.event("submitted", job=number, nodes=str(job.nodes), procs=job.procs)
    return number


def ask_when(job: Job) -> str:
    """What the controller says: when the job would start, on which nodes. Raises EnvironmentProblem."""
    return ask(["sbatch", "--test-only"], sbatch_text(job)).strip()


@dataclass(frozen=True)
class Queued:
    """A job, or one task of an array, as Slurm has it now. `where`: its nodes, or why it waits."""

    job: str
    state: str
    elapsed: str
    limit: str
    nodes: str
    where: str


def job_of(run: Path) -> str:
    """What Slurm calls the job of a run, or of a task of an array, that was submitted or began last.

    Raises EnvironmentProblem where there is none.
    """
    task = task_of(run)
    found = []
    for event in events_of(run):
        if event["event"] == "submitted":
            found.append(event["job"] if task is None else f"{event['job']}_{task}")
        elif event["event"] == "followed_by":
            found.append(event["job"])
    if not found:
        raise EnvironmentProblem(
            f"{run}: no job was submitted for this run directory; `distdl launch CONFIG --on slurm` does it"
        )
    return str(found[-1])


def events_of(run: Path) -> list[dict[str, Any]]:
    """The events of a run in the order of time; of a task of an array with those of its submission."""
    events = read_lines(run / "events.jsonl")
    if task_of(run) is None:
        return events
    submitted = [e for e in read_lines(run.parent / "events.jsonl") if e["event"] == "submitted"]
    return sorted([*submitted, *events], key=lambda event: float(event["time"]))


def task_of(run: Path) -> str | None:
    """The number of the task of an array whose run directory this is; None of any other run."""
    found = re.fullmatch(r"task-(\d+)", run.name)
    return found[1] if found and (run.parent / FOLDER).is_dir() else None


def tasks_of(run: Path) -> list[Path]:
    """The run directories of the tasks of an array, as far as they have begun."""
    found = [task for task in run.glob("task-*") if task_of(task) is not None]
    return sorted(found, key=lambda task: int(task_of(task) or 0))


def queued(job: str) -> list[Queued]:
    """The job as it stands in the queue; empty where Slurm does not know it any more."""
    try:
        said = ask(["squeue", "--noheader", "--states=all", f"--format={_FORMAT}", f"--jobs={job}"])
    except EnvironmentProblem as problem:
        if "Invalid job id" in str(problem):
            return []
        raise
    return [Queued(*line.split("|", 5)) for line in said.splitlines() if line]


def logs_of(run: Path) -> list[Path]:
    """The logs of the run's jobs, the newest last."""
    task = task_of(run)
    found = (run / FOLDER).glob("*.log") if task is None else (run.parent / FOLDER).glob(f"*_{task}.log")
    return sorted(found, key=lambda path: path.stat().st_mtime)
