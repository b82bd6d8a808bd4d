"""`distdl launch --on slurm` and `distdl slurm ...`: runs as jobs of Slurm. Imports no torch."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from distdl import errors
from distdl.errors import DataError, EnvironmentProblem
from distdl.launch.logs import tail
from distdl.launch.place import Nodes
from distdl.launch.slurm.client import ask
from distdl.launch.slurm.profile import load_with_profile
from distdl.launch.slurm.script import Job, doctor_command, sbatch_text
from distdl.launch.slurm.submit import ask_when, events_of, job_of, logs_of, queued, submit, tasks_of
from distdl.recipe import Recipe
from distdl.record import Heartbeat, RunDirectory
from distdl.topology import Topology

slurm_app = typer.Typer(
    no_args_is_help=True, help="Look at, stop and go on with runs that are jobs of Slurm."
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def launch_on_slurm(
    config: str,
    overrides: list[str],
    asked: Nodes | None,
    procs: int | None,
    *,
    dry_run: bool,
    test_only: bool,
    allow_changed: bool,
) -> int:
    """Print the job's script, ask the controller about it, or submit it."""
    recipe, profile = load_with_profile(config, overrides, os.environ)
    slurm = recipe.launch.slurm
    nodes = asked or Nodes.of(recipe)
    procs = procs or _procs(recipe)
    job = Job.of(recipe, config, overrides, nodes, procs, sys.executable, allow_changed=allow_changed)
    _check_plan(recipe, Topology.of(nodes.most, procs, cpus=slurm.cpus, gpus=slurm.gpus or 0))
    if dry_run:
        _print([sbatch_text(job)[:-1]])
        return errors.DONE
    if profile is not None:
        _print([f"profile: {profile}"])
    if test_only:
        _print([ask_when(job)])
        return errors.DONE
    number = submit(job, RunDirectory.of(recipe))
    _print([f"job: {number}", f"run directory: {job.run_dir}"])
    return errors.DONE


def _procs(recipe: Recipe) -> int:
    """Processes on each node: one a GPU, where the recipe does not say."""
    asked = recipe.launch.procs
    return asked if asked != "auto" else recipe.launch.slurm.gpus or 1


def doctor_on_slurm(
    config: str,
    overrides: list[str],
    asked: Nodes | None,
    procs: int | None,
    *,
    wait_s: float,
    as_json: bool,
    dry_run: bool,
) -> int:
    """Examine the nodes that the recipe asks Slurm for, or print the command; returns the doctor's code.

    Blocks until Slurm has given the nodes. Raises EnvironmentProblem where this machine has no Slurm.
    """
    recipe, _ = load_with_profile(config, overrides, os.environ)
    nodes = asked or Nodes.of(recipe)
    job = Job.of(recipe, config, overrides, nodes, procs or _procs(recipe), sys.executable)
    command = doctor_command(job, wait_s, as_json=as_json)
    if dry_run:
        _print([shlex.join(command)])
        return errors.DONE
    print(f"waiting for {nodes.most} nodes of Slurm; Ctrl-C twice gives up", file=sys.stderr)  # noqa: T201
    try:
        return subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        raise EnvironmentProblem(
            "srun is not here: this machine has no Slurm. Run the command on a login node of the cluster"
        ) from None


def _check_plan(recipe: Recipe, topology: Topology) -> None:
    """What the plan refuses is refused here, and not when the job has waited for its nodes."""
    from distdl.data.description import access_of, describe_data
    from distdl.plan import make_plan

    try:
        info = describe_data(recipe.data, access_of(recipe, lambda _: None))
    except DataError as error:  # data may lie on the nodes alone
        print(f"the plan is not checked: {error}", file=sys.stderr)  # noqa: T201
        return
    make_plan(recipe, topology, info)


@slurm_app.command("status")
def status_command(run: Run, as_json: AsJson = False) -> int:
    """Say how a run's job stands: in the queue, how often it was restarted, which step it has reached."""
    number = job_of(run)
    rows = queued(number)
    tasks = {task.name: _progress(task) for task in tasks_of(run)}
    facts = {"job": number, "run": str(run), "tasks": [vars(row) for row in rows], **_progress(run)}
    if as_json:
        _print([json.dumps(facts | ({"array": tasks} if tasks else {}))])
        return errors.DONE
    _print(
        [
            *(f"job {q.job}: {q.state}, {q.elapsed} of {q.limit}, {q.nodes} nodes, {q.where}" for q in rows),
            *([] if rows else [f"job {number}: no longer in the queue"]),
            *(f"{name}: {_in_words(progress)}" for name, progress in tasks.items()),
            *([] if tasks else [_in_words(facts)]),
        ]
    )
    return errors.DONE


def _progress(run: Path) -> dict[str, Any]:
    """What the run directory tells: attempts after the first, the step, the last save and event."""
    events = events_of(run)
    anew = max((i for i, e in enumerate(events) if e["event"] == "submitted"), default=0)
    starts = sum(e["event"] == "job_start" for e in events[anew:])
    return {
        "restarts": max(0, starts - 1),
        "step": _step_of(run),
        "saved_step": max((e["step"] for e in events if e["event"] == "save"), default=None),
        "last_event": events[-1]["event"] if events else None,
    }


def _in_words(progress: Mapping[str, Any]) -> str:
    return (
        f"restarts {progress['restarts']}, step {progress['step']}, saved {progress['saved_step']}, "
        f"last: {progress['last_event']}"
    )


def _step_of(run: Path) -> int:
    attempts = sorted((run / "attempts").glob("[0-9]*"))
    return Heartbeat.read(attempts[-1] / "heartbeat")[0] if attempts else 0


@slurm_app.command("logs")
def logs_command(
    run: Run, lines: Annotated[int, typer.Option(min=1, help="Lines from the end of each log.")] = 20
) -> int:
    """Print the end of the log of a run's newest job, which all its attempts write to; of each task's."""
    number = job_of(run)
    logs = [log for log in logs_of(run) if log.stem == number or log.stem.split("_")[0] == number]
    for log in logs:
        _print([f"==> {log} <==", tail(log, lines, most_bytes=lines * 400)])
    if not logs:
        raise EnvironmentProblem(
            f"{run}: job {number} has written no log yet; see `distdl slurm status {run}`"
        )
    return errors.DONE


@slurm_app.command("cancel")
def cancel_command(run: Run) -> int:
    """Cancel a run's job, with all tasks of an array. What is saved stays."""
    number = job_of(run)
    ask(["scancel", number])
    _print([f"job {number}: cancelled"])
    return errors.DONE


@slurm_app.command("requeue")
def requeue_command(run: Run) -> int:
    """Have Slurm start a run's job again, running or ended; it goes on from the newest checkpoint."""
    number = job_of(run)
    if shutil.which("scontrol") is None:
        raise EnvironmentProblem(
            "scontrol is not here, and nothing else requeues a job. Submit the run again (`distdl launch "
            "CONFIG --on slurm`): it goes on from its newest checkpoint"
        )
    ask(["scontrol", "requeue", number])
    _print([f"job {number}: to be started again"])
    return errors.DONE


def _print(lines: list[str]) -> None:
    for line in lines:
        print(line)  # noqa: T201
