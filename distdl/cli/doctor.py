"""`distdl doctor`: what would make a run fail, here or on the nodes of a job. Imports no torch."""

from __future__ import annotations

import os
import socket
import sys
from typing import Annotated, Literal, Optional

import typer

from distdl import errors
from distdl.cli.arguments import EngineName, NodesAsked, Overrides, Procs, load, overrides_of
from distdl.cli.slurm import doctor_on_slurm
from distdl.errors import PlanError
from distdl.launch.place import Nodes


def doctor_command(
    config: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="A recipe, whose needs are checked too."),
    ] = None,
    overrides: Overrides = None,
    engine: EngineName = None,
    wait: Annotated[
        float, typer.Option(min=1, help="Seconds that the processes of a job wait for each other.")
    ] = 30.0,
    fix: Annotated[
        bool, typer.Option("--fix", help="Mend what can be mended safely: locks that killed builds left.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    on: Annotated[
        Literal["here", "slurm"],
        typer.Option(help="slurm: examine the nodes that the recipe asks Slurm for, all processes on each."),
    ] = "here",
    nodes: NodesAsked = None,
    procs: Procs = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --on slurm: print the command, and stop.")
    ] = False,
) -> int:
    """Say what would make a run fail here, and what to do: alone, or as every process of a job.

    Alone it looks at this machine. Started as a run would be (`torchrun -m distdl doctor`, `srun python -m
    distdl doctor`) the processes also compare with each other. Exit code 3 where something would fail.
    """
    try:
        from distdl.doctor.collect.recipe import Asked
        from distdl.doctor.report import show
        from distdl.doctor.run import examine
    except ImportError as error:
        return _cannot_begin(error)
    if on == "slurm":
        if config is None or fix:
            raise PlanError("doctor --on slurm needs a recipe, which says what to ask for, and mends nothing")
        given, many = overrides_of(overrides, engine), Nodes.parse(nodes) if nodes else None
        return doctor_on_slurm(config, given, many, procs, wait_s=wait, as_json=as_json, dry_run=dry_run)
    asked = Asked(config, load(config, overrides or [], engine)) if config else None
    report = examine(asked, os.environ, wait_s=wait, fix=fix)
    show(report, as_json=as_json)
    return report.code


def _cannot_begin(error: ImportError) -> int:
    """What the doctor itself is made of cannot be loaded: that is the finding."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    label = f"[rank {rank} on {socket.gethostname()}]"
    path = os.environ.get("LD_LIBRARY_PATH")
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    todo = f"install distdl's packages into this environment: {sys.executable} -m pip install distdl"
    if path and ".so" in first:
        first += f"; LD_LIBRARY_PATH={path} comes before the libraries that the packages were built with"
        todo = (
            "unset LD_LIBRARY_PATH (/etc/profile.d, a start-up file, a module: `module purge`), or take its "
            "libstdc++ out"
        )
    print(f"{label} fail    {'packages':<20}a package does not import on {label[1:-1]}: {first}")  # noqa: T201
    print(f"{label} {' ' * 28}do: {todo}", flush=True)  # noqa: T201
    return errors.ENVIRONMENT
