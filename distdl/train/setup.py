"""From a recipe and a place in the world to a `Session` that is ready to train."""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distdl.checkpoint.read import step_directories
from distdl.checkpoint.store import store_at
from distdl.comm import World, share_problem, together
from distdl.comm.together import alone
from distdl.comm.world import meet
from distdl.data import Feed, Rows
from distdl.data.description import access_of, describe_data, from_anywhere
from distdl.engines import Engine, build_engine
from distdl.engines.compiled import check_compiler
from distdl.errors import DataError, EnvironmentProblem, RecipeError, nearest
from distdl.keys import key, seed_everything
from distdl.models import model_factory
from distdl.observe.console import RunConsole
from distdl.plan import Plan, make_plan
from distdl.recipe import Recipe, mathematics, recipe_hash, to_yaml
from distdl.record import Heartbeat, RunDirectory, rewind_metrics, write_atomic
from distdl.samples import DataInfo
from distdl.tasks import Task, build_task
from distdl.topology import Topology
from distdl.train.alike import alike, code_hash
from distdl.train.arithmetic import fingerprint, settle
from distdl.train.batches import Batches
from distdl.train.carrying import carry_of
from distdl.train.evaluate import fetch, measure, metrics_of
from distdl.train.notices import Notices
from distdl.train.resume import Identity, Resumed, resume
from distdl.train.saving import replicas_of, saver_of
from distdl.train.session import Session, evaluation_due
from distdl.train.state import TrainState
from distdl.train.stop import StopFlag
from distdl.train.warm_start import WarmStart, other_tokens, warm_start
from distdl.version import __version__

if TYPE_CHECKING:
    from distdl.data.stream.remote_rows import Access


@dataclass(frozen=True)
class Opening:
    """What is known before anything is built. `attempt` is this attempt's folder in `directory`."""

    recipe: Recipe
    plan: Plan
    world: World
    topology: Topology
    directory: RunDirectory
    attempt: Path
    stop: StopFlag
    notices: Notices = field(default_factory=Notices)


def open_session(
    o: Opening, *, allow_changed: bool = False, terminal: IO[str] | None = None, quiet: bool = False
) -> tuple[Session, Resumed]:
    """Collective. Prepare the data, build model and engine, load the newest checkpoint if there is one.

    Raises on all ranks together where any of them fails. The session is at a step boundary.
    """
    recipe, plan, world = o.recipe, o.plan, o.world
    access = access_of(recipe, o.notices, lambda: o.stop.requested)
    feed = prepare_data(recipe, world, access)
    start = warm_start(recipe.init, world, lambda: not step_directories(o.directory.checkpoints))
    task, engine = build(recipe, plan, world, o.topology, feed.info, start)
    if start is not None:
        announce(o, start, feed)
    identity = Identity(
        recipe_hash(recipe), mathematics(recipe), feed.info.fingerprint, fingerprint(world, plan)
    )
    replicas = replicas_of(recipe, o.directory.path, world, lambda text: o.notices.say(text))
    carry = carry_of(task, engine.module, plan, world.rank, engine.device)
    resumed = resume(
        store_at(o.directory.checkpoints),
        world,
        engine,
        identity,
        allow_changed=allow_changed,
        replicas=replicas,
        carry=carry,
    )
    begun = together(world, lambda: _begin(o, resumed) if world.is_main else None)
    row, heartbeat = begun if begun else ({}, None)
    take_evaluation(o, resumed.state, world.from_main(row))
    batches, eval_rows = together(world, lambda: open_data(o, feed, task))
    console = RunConsole(plan.total_steps, quiet=quiet, terminal=terminal)
    o.notices.say = console.say
    session = Session(
        recipe=recipe,
        plan=plan,
        world=world,
        task=task,
        engine=engine,
        state=resumed.state,
        directory=o.directory,
        console=console,
        stop=o.stop,
        heartbeat=heartbeat,
        batches=batches,
        eval_rows=eval_rows,
        identity=identity,
        saver=saver_of(recipe, o.directory.checkpoints, world, replicas),
        replicas=replicas,
        carry=carry,
        saved_step=resumed.state.step if resumed.path else None,
        resumed_step=resumed.state.step if resumed.path else None,
        row=row,
    )
    if resumed.path is None:
        check_metric(session)
    session.started_samples = session.clock_samples = resumed.state.samples
    return session, resumed


def enter_world(
    recipe: Recipe, topology: Topology, access: Access | None = None
) -> tuple[World, Plan, DataInfo]:
    """Collective. Plan, set threads and device, join the process group; errors are raised on all ranks."""
    problem: Exception | None = None
    try:
        info = describe_data(recipe.data, access or access_of(recipe))
        plan = make_plan(recipe, topology, info)
        if not info.remote:
            # Before the group exists: no one waits in a collective, and so up to its time-out, for a large
            # dataset to be prepared. Ranks of a node wait for the one that does it, as long as it takes.
            Feed.open(recipe.data)
        settle(plan, recipe.train.reduction)
        if plan.device == "cuda":
            if not torch.cuda.is_available():
                raise EnvironmentProblem(
                    "a GPU is named in the environment but torch cannot use one (a build for CPU, or no "
                    "driver): see torch.cuda.is_available(), or set hardware.device=cpu"
                )
            torch.cuda.set_device(topology.gpu)
    except Exception as error:
        problem = error
    device = "cpu" if problem else plan.device
    if topology.nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing listens beyond this machine
    world = meet(topology, device, recipe.launch.timeout_s)
    share_problem(world, problem)
    alike(world, "another recipe", recipe_hash(recipe), RecipeError, "Give all the same file and overrides")
    alike(world, "other data", info.fingerprint, DataError, _COPY)
    return world, plan, info


_COPY = "Copy the data to the same path on every node, or name a folder that all nodes share (data.path)"


def prepare_data(recipe: Recipe, world: World, access: Access | None = None) -> Feed:
    """Collective. Open the data, which `enter_world` has prepared; remote ones as `access` says."""
    return together(world, lambda: Feed.open(recipe.data, access))


def open_data(o: Opening, feed: Feed, task: Task) -> tuple[Batches, Rows]:
    """This rank's microbatches of the training rows, and the evaluation rows."""
    rows, order = feed.rows(o.recipe.data.train_split), feed.order(o.recipe, o.plan)
    eval_rows = feed.rows(o.recipe.data.eval_split)
    stopped = lambda: o.stop.requested  # noqa: E731
    return Batches(o.recipe, o.plan, task, rows, order, o.world.rank, stopped), eval_rows


def build(
    recipe: Recipe,
    plan: Plan,
    world: World,
    topology: Topology,
    info: DataInfo,
    start: WarmStart | None = None,
) -> tuple[Task, Engine]:
    """Collective. The task, and the engine with a model initialised from (seed, "init"), then from `start`:
    the same on every rank.

    What a machine may lack is looked for first, and is raised on all ranks together. `Engine.setup`
    communicates: what it refuses, it refuses on every rank by itself.
    """
    task, engine, model = together(world, lambda: _make(recipe, plan, world, topology, info))
    code = together(world, lambda: code_hash(task, model))
    alike(world, "other code", code, EnvironmentProblem, "Copy the files of your modules to every node")
    if start is not None:
        together(world, lambda: start(model))
    engine.setup(model)
    return task, engine


def _make(
    recipe: Recipe, plan: Plan, world: World, topology: Topology, info: DataInfo
) -> tuple[Task, Engine, nn.Module]:
    """Local: the task, the engine, not set up, and its model."""
    make_model = model_factory(recipe.model.name, recipe.model.options())
    task = build_task(recipe.task.name, recipe.task.options(), make_model, info)
    device = torch.device("cuda", topology.gpu) if plan.device == "cuda" else torch.device("cpu")
    if recipe.hardware.compile:
        check_compiler(device)
    engine = build_engine(plan, recipe, world, device)
    seed_everything(key(recipe.train.seed, "init"))
    model = task.build_model()
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise RecipeError(f"the model's parameters {', '.join(lazy[:8])} have no shape yet: give the sizes")
    return task, engine, model


def announce(o: Opening, start: WarmStart, feed: Feed) -> None:
    """Rank 0 says, and writes down, which weights the run begins with and which were left out."""
    if o.world.is_main:
        for line in filter(None, [*start.lines(), other_tokens(start, feed)]):
            o.notices.say(line)
        o.directory.event("warm_start", rank=0, **start.facts())


def take_evaluation(o: Opening, state: TrainState, row: dict[str, Any]) -> None:
    """Take in an evaluation that was finished after its step had been saved: it stands in the metrics."""
    name = f"eval_{o.recipe.eval.metric}"
    if evaluation_due(o.plan, state) and name in row:
        state.note_metric(float(row[name]), o.recipe.eval.mode, o.recipe.eval.min_delta)
        state.evaluated_step = state.step


def check_metric(s: Session) -> None:
    """Collective. Measure one row, so that a mistyped `eval.metric`, a broken task, or BatchNorm that cannot
    train on a last row alone, is found before the first step.
    """
    batch = together(s.world, lambda: fetch(s, 0, 1))
    with s.engine.evaluating(), alone(), _single_values(s) as single:  # a forward may communicate
        found = metrics_of(s.task, [measure(s, batch)])
    if single:
        plan = s.plan
        raise RecipeError(
            f"model.name = {s.recipe.model.name!r}: the last microbatch of an epoch has one row "
            f"({plan.train_rows - plan.dropped_rows} rows in microbatches of {plan.micro_batch}), and its "
            f"BatchNorm ({single[0]}) would see one value a channel there, which has no deviation: set "
            "data.drop_last=true, or another batch.micro, or model.norm=group where the model has that key"
        )
    if s.recipe.eval.metric not in found:
        raise RecipeError(
            f"eval.metric = {s.recipe.eval.metric!r}: this task measures {', '.join(found)}"
            f"{nearest(s.recipe.eval.metric, found)}"
        )


@contextmanager
def _single_values(s: Session) -> Iterator[list[str]]:
    """Where some microbatch has one row: which BatchNorms see one value a channel of it, in what is run here.
    In training torch would raise ValueError, at the end of the first epoch.
    """
    found: list[str] = []
    hooks = []
    if (s.plan.train_rows - s.plan.dropped_rows) % s.plan.micro_batch == 1 or s.plan.micro_batch == 1:
        for name, module in s.engine.module.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):

                def note(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                    if args[0].numel() == args[0].shape[1]:
                        found.append(name)

                hooks.append(module.register_forward_pre_hook(note))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _begin(o: Opening, resumed: Resumed) -> tuple[dict[str, Any], Heartbeat]:
    """Rank 0: write down what runs here; returns the row of metrics that the resumed step still adds to."""
    write_atomic(o.directory.recipe, to_yaml(_from_anywhere(o.recipe)))
    write_atomic(o.attempt / "plan.json", json.dumps(o.plan.as_dict(), indent=2) + "\n")
    write_atomic(o.attempt / "environment.json", json.dumps(environment(), indent=2) + "\n")
    row = rewind_metrics(o.directory.metrics, resumed.state.step)
    return row, Heartbeat(o.attempt / "heartbeat")


def _from_anywhere(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths: the copy in the run directory means the same from any folder."""
    directory, kept = RunDirectory.of(recipe), recipe.checkpoint
    run = recipe.run.model_copy(update={"dir": str(directory.path.absolute())})
    if kept.dir is not None and isinstance(directory.checkpoints, Path):
        kept = kept.model_copy(update={"dir": str(directory.checkpoints.absolute())})
    data = from_anywhere(recipe.data)
    return recipe.model_copy(update={"run": run, "data": data, "checkpoint": kept})


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
