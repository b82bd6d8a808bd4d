"""`distdl doctor`: what would make a run fail, here or on the nodes of a job. Imports no torch."""

from __future__ import annotations

import os
from typing import Annotated, Literal, Optional

import typer

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
    from distdl.doctor.collect.recipe import Asked
    from distdl.doctor.report import show
    from distdl.doctor.run import examine

    if on == "slurm":
        if config is None or fix:
            raise PlanError("doctor --on slurm needs a recipe, which says what to ask for, and mends nothing")
        given, many = overrides_of(overrides, engine), Nodes.parse(nodes) if nodes else None
        return doctor_on_slurm(config, given, many, procs, wait_s=wait, as_json=as_json, dry_run=dry_run)
    asked = Asked(config, load(config, overrides or [], engine)) if config else None
    report = examine(asked, os.environ, wait_s=wait, fix=fix)
    show(report, as_json=as_json)
    return report.code
