"""The commands. Heavy imports happen inside them, so that `distdl plan` needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from distdl import errors
from distdl.cli.arguments import (
    AllowChanged,
    CheckpointPath,
    Config,
    EngineName,
    NodesAsked,
    Overrides,
    Procs,
    load,
    overrides_of,
)
from distdl.cli.ckpt import ckpt_app
from distdl.cli.data import data_app
from distdl.cli.doctor import doctor_command
from distdl.cli.slurm import launch_on_slurm, slurm_app
from distdl.cli.ssh import launch_over_ssh
from distdl.errors import DistdlError, PlanError
from distdl.launch.place import Nodes, Place
from distdl.lifeline import die_with_parent
from distdl.memory import Memory
from distdl.plan import Plan, make_plan
from distdl.recipe import Recipe, json_schema, load_recipe, recipe_hash
from distdl.topology import Topology, visible_gpus
from distdl.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Write a training run once; run it on any hardware, through any failure, and get the same run.",
)

app.add_typer(data_app, name="data")
app.add_typer(ckpt_app, name="ckpt")
app.add_typer(slurm_app, name="slurm")


def run() -> int:
    """Run the command line; returns the exit code."""
    try:
        result = app(standalone_mode=False)
    except DistdlError as error:
        _say(f"error: {error}")
        return error.exit_code
    except OSError as error:
        _say(f"error: {error}")
        return errors.ENVIRONMENT
    except ImportError as error:
        if ".so" not in str(error):
            raise
        # A library of C, which another in its place has made useless.
        found = f"; LD_LIBRARY_PATH is {path}" if (path := os.environ.get("LD_LIBRARY_PATH")) else ""
        _say(f"error: on {socket.gethostname()} a package does not import: {error}{found}")
        return errors.ENVIRONMENT
    except typer.Exit as leaving:
        return leaving.exit_code
    except Exception as error:
        return _usage(error)
    return result if isinstance(result, int) else errors.DONE


def _usage(error: Exception) -> int:
    """Errors of the command line itself, in typer's own words. Anything else is ours and keeps its trace."""
    show = getattr(error, "show", None)
    if show is None:
        raise error
    show()
    return errors.USAGE


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


@app.command()
def launch(
    config: Config,
    overrides: Overrides = None,
    procs: Procs = None,
    nodes: NodesAsked = None,
    node_rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Which of the nodes this is; the first is 0."),
    ] = None,
    rendezvous: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="HOST:PORT", help="Where node 0 listens and the other nodes come."),
    ] = None,
    on: Annotated[
        Literal["here", "ssh", "slurm"],
        typer.Option(help="ssh: start it on every host of a file. slurm: submit a job that does it."),
    ] = "here",
    hostfile: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The hosts for --on ssh, lines such as: node01 slots=8"),
    ] = None,
    heed_stdin: Annotated[bool, typer.Option("--heed-stdin", hidden=True)] = False,
    engine: EngineName = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, or the job's script, and stop.")
    ] = False,
    test_only: Annotated[
        bool, typer.Option("--test-only", help="Ask Slurm when the job would start, and stop.")
    ] = False,
    allow_changed: AllowChanged = False,
) -> int:
    """Train with several processes; restart them from the last checkpoint if they fail."""
    asked = Nodes.parse(nodes) if nodes is not None else None
    for option, value, goes_with in (
        ("--hostfile", hostfile, ("ssh",)),
        ("--node-rank", node_rank, ("here",)),
        ("--rendezvous", rendezvous, ("here", "ssh")),
    ):
        if value is not None and on not in goes_with:
            what = " or ".join(f"--on {word}" for word in goes_with)
            raise PlanError(f"{option} goes with {what}, and would mean nothing with --on {on}: leave it out")
    if on == "slurm":
        given = overrides_of(overrides, engine)
        return launch_on_slurm(
            config, given, asked, procs, dry_run=dry_run, test_only=test_only, allow_changed=allow_changed
        )
    if test_only:
        raise PlanError("--test-only asks Slurm's controller; it goes with --on slurm")
    recipe = load(config, overrides, engine)
    if on == "ssh":
        return launch_over_ssh(
            recipe,
            config,
            overrides_of(overrides, engine),
            hostfile=hostfile,
            nodes=asked,
            procs=procs,
            rendezvous=rendezvous,
            dry_run=dry_run,
            allow_changed=allow_changed,
        )
    if heed_stdin:
        from distdl.launch.heed import heed_stdin as heed

        heed()
    if asked is None and recipe.launch.nodes > 1:
        asked = Nodes.of(recipe)
    if dry_run:
        _show_plan(recipe, _plan(recipe, asked.most if asked else 1, procs))
        return errors.DONE
    place = Place.find(asked, node_rank, rendezvous, os.environ)
    return _launch_node(recipe, _plan(recipe, place.nodes, procs), place, allow_changed=allow_changed)


def _launch_node(recipe: Recipe, plan: Plan, place: Place, *, allow_changed: bool) -> int:
    from distdl.data import Feed
    from distdl.data.description import access_of
    from distdl.launch.joining import find_ground
    from distdl.launch.server import start_server
    from distdl.record import RunDirectory

    directory = RunDirectory.of(recipe)
    directory.create()
    # One lock a run, not one a node: on a shared filesystem it is the same file.
    with directory.lock() if place.node == 0 else contextlib.nullcontext():
        ground = find_ground(place, _say)
        start_server(plan, directory, ground.interface)
        Feed.open(recipe.data, access_of(recipe, _say))
        from distdl.launch.local import launch as launch_local

        return launch_local(recipe, plan, directory, ground, _say, allow_changed=allow_changed)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    engine: EngineName = None,
    allow_changed: AllowChanged = False,
) -> int:
    """Train as one process: alone, or as one rank under torchrun, srun or mpirun."""
    recipe, topology = load(config, overrides, engine), Topology.from_env(os.environ)
    if topology.launcher == "torchrun":
        die_with_parent(init_is_fine=True)  # an agent that is killed leaves its workers behind otherwise
    from distdl.train.process import Options, exit_code_for, train_process

    code = train_process(recipe, topology, Options(allow_changed=allow_changed))
    return exit_code_for(topology, code)


@app.command("eval")
def evaluate(
    config: Config,
    overrides: Overrides = None,
    checkpoint: CheckpointPath = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> int:
    """Evaluate a checkpoint on every evaluation row, exactly once, with one process or many."""
    recipe, topology = load_recipe(config, overrides or []), Topology.from_env(os.environ)
    from distdl.train.eval_process import evaluate_process

    return evaluate_process(recipe, topology, checkpoint, as_json=as_json)


@app.command()
def predict(
    config: Config,
    given: Annotated[
        str, typer.Option("--input", help="A file, a folder or a prepared dataset; labels are not needed.")
    ],
    out: Annotated[str, typer.Option(help="The file to write: .jsonl or .csv.")],
    overrides: Overrides = None,
    checkpoint: CheckpointPath = None,
    split: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The split of a prepared dataset; default: its only one."),
    ] = None,
    plot: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Also draw the first rows into this file (.png, .pdf, .svg)."),
    ] = None,
) -> int:
    """Write what a checkpoint predicts of each row of a file, a folder or a dataset. One process."""
    recipe, topology = load_recipe(config, overrides or []), Topology.from_env(os.environ)
    from distdl.train.predicting import predict_process

    drawn = Path(plot) if plot else None
    predict_process(recipe, topology, checkpoint, Path(given), Path(out), split, drawn)
    return errors.DONE


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes.")] = 1,
    procs: Annotated[Optional[int], typer.Option(min=1, help="Processes a node.")] = None,  # noqa: UP045
    engine: EngineName = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also what a process needs: builds the model, imports torch.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> int:
    """Print what would happen, on a machine that need not be able to do it. Imports no torch."""
    recipe = load(config, overrides, engine)
    decided = _plan(recipe, nodes, procs)
    needed = None
    if memory:
        from distdl.train.sizing import measured_memory

        needed = measured_memory(recipe, decided)
    if as_json:
        extra = {"memory_bytes": needed.as_dict()} if needed else {}
        print(json.dumps(decided.as_dict() | extra, indent=2))  # noqa: T201
    else:
        _show_plan(recipe, decided, needed)
    return errors.DONE


app.command("doctor")(doctor_command)


@app.command()
def schema() -> int:
    """Print the JSON Schema of recipes, for editors."""
    print(json.dumps(json_schema(), indent=2))  # noqa: T201
    return errors.DONE


@app.command()
def version() -> int:
    """Print the version."""
    print(__version__)  # noqa: T201
    return errors.DONE


def _plan(recipe: Recipe, nodes: int, procs: int | None) -> Plan:
    from distdl.data.description import access_of, describe_data

    gpus = visible_gpus(os.environ)
    if procs is None:
        procs = max(gpus, 1) if recipe.launch.procs == "auto" else recipe.launch.procs
    info = describe_data(recipe.data, access_of(recipe, _say))
    return make_plan(recipe, Topology.of(nodes, procs, gpus=gpus), info)


def _show_plan(recipe: Recipe, decided: Plan, memory: Memory | None = None) -> None:
    from distdl.observe.console import show
    from distdl.observe.plan_table import plan_rows

    show("plan", {"recipe": recipe_hash(recipe)} | plan_rows(decided))
    if memory is not None:
        show("memory of one process", memory.shown())
