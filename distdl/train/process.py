"""One rank's process, from its place in the world to its exit code."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from distdl import __version__, errors
from distdl.checkpoint.retention import clean_temporary
from distdl.comm import PeerFailed, World, share_problem, together
from distdl.comm.world import join, leave
from distdl.data import Prefetcher, Prepared, describe, open_split
from distdl.data.prepare import prepare
from distdl.engines import Engine, build_engine
from distdl.errors import DistdlError
from distdl.keys import key
from distdl.models import model_factory
from distdl.observe.console import RunConsole
from distdl.observe.failure import report_failure
from distdl.observe.summary import show_summary
from distdl.plan import DataInfo, Plan, make_plan
from distdl.recipe import Recipe, mathematics, recipe_hash, to_yaml
from distdl.record import Heartbeat, RunDirectory, rewind_metrics, write_atomic
from distdl.tasks import Task, build_task
from distdl.testing import faults
from distdl.topology import Topology
from distdl.train.loop import fit
from distdl.train.resume import Identity, Resumed, resume
from distdl.train.session import Session, microbatch_maker
from distdl.train.stop import StopFlag


@dataclass(frozen=True)
class Options:
    """How this process was started. `attempt` and `locked`: a launcher made the folder, holds the lock."""

    allow_changed: bool = False
    attempt: Path | None = None
    locked: bool = False
    terminal: IO[str] | None = None


def train_process(recipe: Recipe, topology: Topology, options: Options) -> int:
    """Train as one rank; all ranks call it. Blocks until the run ends; returns its exit code.

    An error that distdl raises on purpose is reported and becomes its code. Anything else is a crash: it is
    written to the attempt's `failures/`, and the process ends at once with code 70, without a collective.
    """
    stop = StopFlag()
    stop.install(alone=topology.launcher == "none")
    faults.arm_from_environment(topology.rank)
    directory = RunDirectory(recipe.run.dir or "runs/unnamed")
    where = f"[rank {topology.rank}/{topology.world_size} on {socket.gethostname()}] "
    try:
        code = _train(recipe, topology, options, directory, stop)
    except PeerFailed as error:
        _crash(error, directory, topology, where)
    except DistdlError as error:
        if topology.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
            if directory.path.is_dir() and error.exit_code != errors.ENVIRONMENT:
                directory.event("error", rank=0, exit_code=error.exit_code, message=str(error))
        code = error.exit_code
    except Exception as error:
        _crash(error, directory, topology, where)
    leave()
    return code


def _crash(error: Exception, directory: RunDirectory, topology: Topology, where: str) -> None:
    print(f"{where}{''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)  # noqa: T201
    if directory.attempts.is_dir():
        report_failure(directory, topology.rank, error)
    sys.stdout.flush()
    os._exit(errors.RANK_FAILED)


def _train(
    recipe: Recipe, topology: Topology, options: Options, directory: RunDirectory, stop: StopFlag
) -> int:
    world, plan, _ = enter_world(recipe, topology)
    faults.point("start.joined")
    held = together(world, lambda: _open_directory(directory, options) if world.is_main else None)
    attempt = Path(world.from_main(held and str(held[0])))
    prepared = prepare_data(recipe, world, topology)
    task, engine = together(world, lambda: build(recipe, plan, world, topology, prepared.info))
    identity = Identity(recipe_hash(recipe), mathematics(recipe), prepared.info.fingerprint)
    resumed = resume(directory.checkpoints, world, engine, identity, allow_changed=options.allow_changed)
    faults.point("start.loaded")
    row = together(
        world, lambda: _begin(recipe, plan, directory, attempt, resumed) if world.is_main else None
    )
    train_rows, eval_rows = (
        open_split(prepared, s) for s in (recipe.data.train_split, recipe.data.eval_split)
    )
    session = Session(
        recipe=recipe,
        plan=plan,
        world=world,
        task=task,
        engine=engine,
        state=resumed.state,
        directory=directory,
        console=RunConsole(plan.total_steps, quiet=not world.is_main, terminal=options.terminal),
        stop=stop,
        heartbeat=Heartbeat(attempt / "heartbeat") if world.is_main else None,
        batches=Prefetcher(
            microbatch_maker(recipe, plan, task, train_rows, world.rank), recipe.hardware.prefetch_steps
        ),
        eval_rows=eval_rows,
        identity=identity,
        saved_step=resumed.state.step if resumed.path else None,
        row=row or {},
    )
    return _run(session, resumed)


def _run(s: Session, resumed: Resumed) -> int:
    for name, reason in resumed.damaged:
        s.console.say(f"damaged checkpoint passed over: {name}: {reason}")
        s.event("damaged_checkpoint", path=name, reason=reason)
    s.started_samples = s.clock_samples = s.state.samples
    already = s.finished and not s.evaluation_due
    s.event("start", world_size=s.world.size, resumed_from=resumed.path and resumed.path.name)
    if resumed.path:
        s.console.say(f"{'finished already' if already else 'resuming'}: {resumed.path}")
    try:
        code = fit(s)
        if code == errors.DONE and not already:
            s.event("done", **s.results())
    finally:
        s.console.close()
        s.batches.close()
    if code == errors.DONE and s.world.is_main:
        show_summary(s.directory)
    return code


def enter_world(recipe: Recipe, topology: Topology) -> tuple[World, Plan, DataInfo]:
    """Collective. Plan, set threads and device, join the process group; errors are raised on all ranks."""
    problem: Exception | None = None
    try:
        info = describe(recipe.data.name, recipe.data.path)
        plan = make_plan(recipe, topology, info)
        torch.set_num_threads(plan.threads)
        if plan.device == "cuda":
            torch.cuda.set_device(topology.local_rank)
    except Exception as error:
        problem = error
    device = "cpu" if problem else plan.device
    if topology.launcher in ("srun", "mpirun") and topology.world_size > 1:
        os.environ["MASTER_ADDR"] = str(topology.master_addr)
        os.environ["MASTER_PORT"] = str(topology.master_port)
    world = join(topology.rank, topology.world_size, device, recipe.launch.timeout_s)
    share_problem(world, problem)
    return world, plan, info


def prepare_data(recipe: Recipe, world: World, topology: Topology) -> Prepared:
    """Collective. One rank a node prepares the data, then all open them."""
    name, path = recipe.data.name, recipe.data.path
    together(world, lambda: prepare(name, path) if topology.local_rank == 0 else None)
    return together(world, lambda: prepare(name, path))


def build(
    recipe: Recipe, plan: Plan, world: World, topology: Topology, info: DataInfo
) -> tuple[Task, Engine]:
    """The task, and the engine with a model initialised from (seed, "init"): the same on every rank."""
    make_model = model_factory(recipe.model.name, recipe.model.options())
    task = build_task(recipe.task.name, recipe.task.options(), make_model, info)
    device = torch.device("cuda", topology.local_rank) if plan.device == "cuda" else torch.device("cpu")
    engine = build_engine(plan, recipe, world, device)
    torch.manual_seed(key(recipe.train.seed, "init"))
    engine.setup(task.build_model())
    return task, engine


def _open_directory(directory: RunDirectory, options: Options) -> tuple[Path, IO[str] | None]:
    """Rank 0: the folder of this attempt, and the lock on the run where no launcher holds it."""
    directory.create()
    lock = None if options.locked else directory.lock()
    clean_temporary(directory.checkpoints)
    return options.attempt or directory.new_attempt(), lock


def _begin(
    recipe: Recipe, plan: Plan, directory: RunDirectory, attempt: Path, resumed: Resumed
) -> dict[str, Any]:
    """Rank 0: write down what runs here; returns the row of metrics that the resumed step had."""
    write_atomic(directory.recipe, to_yaml(recipe))
    write_atomic(attempt / "plan.json", json.dumps(plan.as_dict(), indent=2) + "\n")
    write_atomic(attempt / "environment.json", json.dumps(environment(), indent=2) + "\n")
    return rewind_metrics(directory.metrics, resumed.state.step)


def environment() -> dict[str, Any]:
    """What this process runs on: versions, host, processor; no environment variables, which hold secrets."""
    return {
        "distdl": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "time": time.time(),
    }


def exit_code_for(topology: Topology) -> Callable[[int], int]:
    """How a code leaves the process. torchrun restarts on any non-zero exit, so a stop it did not cause a
    crash by leaves as 0; events.jsonl says why.
    """
    stops = (errors.STOPPED, errors.STOPPED_BEFORE_START)
    return lambda code: 0 if topology.launcher == "torchrun" and code in stops else code
