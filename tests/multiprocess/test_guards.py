"""What would tie a run to its number of ranks, or lose a part of it, is refused or handled."""

from __future__ import annotations

import importlib
import re
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from distdl.comm import World
from distdl.data.catalogue import CATALOGUE
from distdl.recipe import Recipe, parse_recipe
from distdl.record import read_lines
from distdl.testing import WorldFailed, run_world, worst
from distdl.train.alike import code_hash
from tests.multiprocess.test_parity import recipe_for, results
from tests.runs import train_rank

pytestmark = pytest.mark.slow

HERE = "tests.multiprocess.own_models"


def with_model(folder: Path, name: str, task: str | None = None, **changes: dict[str, Any]) -> Recipe:
    sections = recipe_for(folder, **changes).model_dump(mode="json", by_alias=True)
    sections["model"] = {"name": f"{HERE}:{name}"}
    if task:
        sections["task"] = {"name": f"{HERE}:{task}"}
    return parse_recipe(sections)


def refusal(world: World, recipe: Recipe) -> str:
    """The error that building and training two steps ends with, on this rank."""
    from distdl.errors import DistdlError
    from distdl.topology import Topology
    from distdl.train import process
    from distdl.train.stop import StopFlag

    topology = Topology(
        rank=world.rank, world_size=world.size, local_rank=world.rank, local_world_size=world.size
    )
    try:
        process._run(*process.open_here(recipe, topology, process.Options(), StopFlag()))
    except (DistdlError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_parameter_without_gradient_is_refused_by_name(tmp_path: Path) -> None:
    errors = run_world(refusal, 2, with_model(tmp_path, "Unused"))
    assert all("got no gradient in this step: spare.weight, spare.bias" in e for e in errors)
    assert all("hardware.unused_parameters=true" in e for e in errors)


@pytest.mark.filterwarnings("ignore")
def test_unused_parameters_can_be_allowed(tmp_path: Path) -> None:
    allowed = {"unused_parameters": True}
    for size in (1, 2):
        recipe = with_model(tmp_path / str(size), "Unused", hardware=allowed)
        assert run_world(train_rank, size, recipe) == [0] * size
    assert worst(results(tmp_path / "2")[1], results(tmp_path / "1")[1])[1] < 1e-5


def test_a_buffer_that_would_drift_is_refused_by_name(tmp_path: Path) -> None:
    errors = run_world(refusal, 2, with_model(tmp_path, "MovingAverage"))
    assert all("changes buffers in its forward: average" in e for e in errors)
    assert run_world(train_rank, 1, with_model(tmp_path / "one", "MovingAverage")) == [0]


def test_python_and_numpy_streams_are_keyed_too(tmp_path: Path) -> None:
    for size in (1, 3):
        assert run_world(train_rank, size, with_model(tmp_path / str(size), "Drops")) == [0] * size
    assert worst(results(tmp_path / "3")[1], results(tmp_path / "1")[1])[1] < 1e-5


def test_a_model_without_shapes_is_refused(tmp_path: Path) -> None:
    errors = run_world(refusal, 2, with_model(tmp_path, "Lazy"))
    assert all("have no shape yet" in e for e in errors)


def test_a_count_is_whole(tmp_path: Path) -> None:
    (error,) = run_world(refusal, 1, with_model(tmp_path, "Linear", task="Fractional"))
    assert "expected a whole number" in error


@pytest.mark.parametrize(
    ("model", "task", "engine", "told"),
    [
        ("Linear", "Raising", "ddp", "DataError: a label that cannot be"),
        ("Linear", "RaisingMetric", "fsdp", "DataError: a label that cannot be"),
        ("UnusedByOne", None, "ddp", "got no gradient in this step: spare.weight, spare.bias"),
    ],
)
def test_an_error_of_one_rank_is_not_taken_for_everybodys(
    model: str, task: str | None, engine: str, told: str, tmp_path: Path
) -> None:
    recipe = with_model(tmp_path, model, task=task, hardware={"engine": engine})
    with pytest.raises(WorldFailed):
        run_world(train_rank, 2, recipe, deadline_s=30)
    assert told in (tmp_path / "attempts" / "0001" / "failures" / "rank-00001.json").read_text()


def test_a_verdict_of_one_rank_on_joint_microbatches_is_everybodys(tmp_path: Path) -> None:
    """No rank begins a forward, which gathers weights here, that another does not enter."""
    recipe = with_model(tmp_path, "Linear", task="Miscounting", hardware={"engine": "fsdp", "fuse": 2})
    assert run_world(train_rank, 2, recipe, deadline_s=60) == [0, 0]
    (event,) = [e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "separate_passes"]
    assert "task.count of two together is 17" in event["reason"]


def unreadable(world: World, recipe: Recipe) -> str:
    """Start again, where rank 1 alone cannot read the checkpoint."""
    from distdl.errors import Corrupt
    from distdl.train import resume

    def broken(*_: Any) -> Any:
        raise Corrupt("a disk that is gone")

    if world.rank == 1:
        resume.open_checkpoint = broken
    return refusal(world, recipe)


def test_a_checkpoint_that_one_rank_cannot_read_is_refused_by_all(tmp_path: Path) -> None:
    recipe = with_model(tmp_path, "Linear", hardware={"engine": "zero3"})
    stop = {"DISTDL_FAIL_AT": "0:train.step@2:USR1"}
    assert run_world(train_rank, 2, recipe, env=stop) == [75, 75]
    errors = run_world(unreadable, 2, recipe, deadline_s=60)
    assert "a disk that is gone" in errors[1]
    assert "[rank 1/2" in errors[0]
    assert "a disk that is gone" in errors[0]


def test_a_mistyped_metric_is_found_before_the_first_step(tmp_path: Path) -> None:
    recipe = with_model(tmp_path, "Linear", eval={"metric": "acuracy", "every_epochs": None})
    errors = run_world(refusal, 2, recipe)
    assert all("did you mean 'accuracy'" in e for e in errors)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_metric_that_is_not_a_number(tmp_path: Path) -> None:
    recipe = with_model(tmp_path, "Linear", task="NanMetric", eval={"metric": "odd", "every_epochs": None})
    assert run_world(train_rank, 2, recipe) == [0, 0]
    assert run_world(train_rank, 2, recipe) == [0, 0]
    assert len([e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "done"]) == 1


def test_no_row_of_metrics_is_lost_by_a_stop_right_after_a_resume(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, eval={"every_steps": 4, "every_epochs": None})
    assert run_world(train_rank, 2, recipe, env={"DISTDL_FAIL_AT": "1:train.step@5:TERM"}) == [75, 75]
    for point in ("start.loaded:TERM", "start.loaded:raise"):
        env = {"DISTDL_FAIL_AT": f"0:{point}"}
        if point.endswith("raise"):
            with pytest.raises(WorldFailed):
                run_world(train_rank, 2, recipe, env=env, deadline_s=30)
        else:
            assert run_world(train_rank, 2, recipe, env=env) == [75, 75]
    assert run_world(train_rank, 2, recipe) == [0, 0]
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert [r["step"] for r in rows if "eval_accuracy" in r] == [4, 8, 12]


def test_a_stop_during_an_evaluation_repeats_it_once(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, eval={"every_steps": 6, "every_epochs": None})
    assert run_world(train_rank, 2, recipe, env={"DISTDL_FAIL_AT": "1:eval.batch@16:USR1"}) == [75, 75]
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert rows[-1]["step"] == 6
    assert "eval_accuracy" not in rows[-1]
    assert run_world(train_rank, 2, recipe) == [0, 0]
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert [r["step"] for r in rows if "eval_accuracy" in r] == [6, 12]


def test_ranks_that_were_given_different_things_are_refused(tmp_path: Path) -> None:
    """As nodes with disks of their own: each would train its share of something else."""
    for name, difference in (("another recipe", "optim"), ("other data", "data"), ("other code", "code")):
        told = run_world(differing, 2, recipe_for(tmp_path / difference), difference)
        assert all(f"[rank 1/2 on {socket.gethostname()}] has {name} than rank 0" in one for one in told), (
            told
        )


def differing(world: World, recipe: Recipe, difference: str) -> str:
    from distdl.data.description import describe_data
    from distdl.train import setup

    if world.rank == 1 and difference == "optim":
        recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": 0.5})})
    if world.rank == 1 and difference == "data":
        setup.describe_data = lambda *args: replace(describe_data(*args), fingerprint="another")
    if world.rank == 1 and difference == "code":
        setup.code_hash = lambda *_: "another"
    return refusal(world, recipe)


def test_code_of_ones_own_is_told_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    told = []
    for number in (1, 1, 2):
        (tmp_path / "my_task.py").write_text(f"class Mine:\n    weight = {number}\n")
        monkeypatch.delitem(sys.modules, "my_task", raising=False)
        importlib.invalidate_caches()
        told.append(code_hash(importlib.import_module("my_task").Mine()))
    assert told[0] == told[1] != told[2]
    assert code_hash(recipe_for(tmp_path)) == code_hash()  # distdl itself is compared elsewhere


@pytest.mark.parametrize(("rows", "refused"), [(33, True), (34, False)])
def test_a_last_row_alone_that_batch_norm_cannot_see_is_found_before_the_first_step(
    rows: int, refused: bool, tmp_path: Path
) -> None:
    """Images of 28x28 become one pixel of the deepest map: BatchNorm needs two rows."""
    embedded = CATALOGUE["fashion_mnist"].embedded
    assert embedded is not None
    for split in ("train", "test"):
        table = pq.read_table(embedded / "test.parquet").slice(0, rows)
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"{split}.parquet")
    recipe = recipe_for(
        tmp_path / "run",
        model={"name": "resnet", "depth": 18, "width": 2},
        data={"name": None, "path": str(tmp_path / "data"), "augment": {}},
        train={"max_steps": 2},
    )
    errors = run_world(refusal, 2, recipe, env={"DISTDL_CACHE": str(tmp_path / "cache")})
    if refused:
        said = r"RecipeError: model.name = 'resnet': the last microbatch of an epoch has one row \(33 rows in"
        assert all(re.match(said, error) and "data.drop_last=true" in error for error in errors)
    else:
        assert errors == ["no error"] * 2
