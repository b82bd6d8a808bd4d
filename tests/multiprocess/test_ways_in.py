"""Every way of starting a run ends with the same parameters, to the bit, in exact mode.

Those under Slurm are in tests/slurm/test_under_slurm.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distdl.record import read_lines
from distdl.testing import assert_same_bits
from tests.faults.support import tensors_of, write_recipe
from tests.runs import train_here

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]
ACCELERATE = [PYTHON, "-m", "accelerate.commands.launch", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
DEEPSPEED = [PYTHON, "-m", "deepspeed.launcher.runner"]
TRAIN = ["-m", "distdl", "train"]


PLANS: dict[int, dict[str, Any]] = {}
"""World size -> its plan, the number of machines left out."""


def small(folder: Path) -> Path:
    return write_recipe(
        folder,
        batch={"global": 16, "micro": 8},
        train={"max_steps": 4, "reduction": "exact"},
        eval={"every_steps": 100},
        checkpoint={"every_steps": 2},
    )


def plan_of(run: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((run / "attempts" / "0001" / "plan.json").read_text())
    return plan | {"nodes": 1}


def computed_alone(folder: Path) -> Any:
    """What one process computes; and `PLANS`, without any launcher."""
    for size in (2, 1):
        recipe = small(folder / str(size))
        train_here(recipe, size)
        PLANS[size] = plan_of(recipe.parent / "run")
    return tensors_of(recipe.parent / "run")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return computed_alone(tmp_path_factory.mktemp("alone"))


def check(run: Path, alone: Any, world: int, said: str) -> None:
    events = read_lines(run / "events.jsonl")
    assert [e["world_size"] for e in events if e["event"] == "start"] == [world], said
    plan = plan_of(run)
    assert (plan["world_size"], plan["shares"]) == (world, [2 // world] * world)
    assert plan == PLANS[world]
    assert events[-1]["event"] in ("done", "job_end"), said
    assert_same_bits(tensors_of(run), alone)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


HERE: dict[str, tuple[int, list[str]]] = {
    "bare": (1, [PYTHON, *TRAIN]),
    "distdl launch": (2, [PYTHON, "-m", "distdl", "launch", "--procs", "2"]),
    "torchrun, static": (
        2,
        [*TORCHRUN, "--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port=PORT", *TRAIN],
    ),
    "torchrun, c10d": (
        2,
        [*TORCHRUN, "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *TRAIN],
    ),
    "accelerate": (2, [*ACCELERATE, "--multi_gpu", "--num_processes=2", "--main_process_port=PORT", *TRAIN]),
    "deepspeed": (2, [*DEEPSPEED, "--num_gpus=2", "--master_port=PORT", "--module", "distdl", "train"]),
    "mpirun": (2, ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", PYTHON, *TRAIN]),
}


def started(way: str, recipe: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """What came of starting the recipe this way."""
    words = HERE[way][1]
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    if way in ("accelerate", "deepspeed") and importlib.util.find_spec(way) is None:
        pytest.skip(f"{way} is not installed")
    command = [free_port().join(word.split("PORT")) for word in words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    environment |= {"HF_HOME": str(recipe.parent), **environ}
    environment["PATH"] = os.pathsep.join([str(Path(PYTHON).parent), os.environ["PATH"]])
    return subprocess.run(
        [*command, str(recipe)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("way", HERE)
def test_on_one_machine(way: str, tmp_path: Path, alone: Any) -> None:
    done = started(way, small(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    check(tmp_path / "run", alone, HERE[way][0], done.stdout + done.stderr)


CODE = dict.fromkeys(HERE, 0) | {"bare": 75, "distdl launch": 75, "mpirun": 75}
"""What a run that was asked to stop ends with: others' launchers restart what does not end with 0."""
EVERYDAY = ("torchrun, c10d", "deepspeed")


@pytest.mark.parametrize(
    "way", [w if w in EVERYDAY else pytest.param(w, marks=pytest.mark.campaign) for w in HERE]
)
def test_asked_to_stop_all_save_and_the_code_says_so(way: str, tmp_path: Path, alone: Any) -> None:
    recipe, run = small(tmp_path), tmp_path / "run"
    rank = HERE[way][0] - 1
    done = started(way, recipe, DISTDL_FAIL_AT=f"{rank}:train.step@1:USR1")
    assert done.returncode == CODE[way], done.stdout + done.stderr
    events = read_lines(run / "events.jsonl")
    assert [e["saved"] for e in events if e["event"] == "stop"] in ([1], [2]), done.stdout + done.stderr
    assert len([e for e in events if e["event"] == "start"]) == 1
    done = started(way, recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_bits(tensors_of(run), alone)


SCRIPTS = {
    "torchrun.sh": [["2"]],
    "accelerate.sh": [["2"]],
    "deepspeed.sh": [["2"]],
    "multinode.sh": [["1"], ["1"]],  # on two machines, which are both this one
}


@pytest.mark.campaign
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_of_launch_do_it(script: str, tmp_path: Path, alone: Any) -> None:
    if not (ROOT / ".venv").exists():
        pytest.skip("the scripts want the .venv that tests/run.sh makes")
    recipe, port = small(tmp_path), free_port()
    before = [f"127.0.0.1:{port}", "2"] if script == "multinode.sh" else []
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "HF_HOME": str(tmp_path),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    started = [
        subprocess.Popen(
            ["bash", str(ROOT / "launch" / script), *before, str(recipe), *procs],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for procs in SCRIPTS[script]
    ]  # fmt: skip
    said = "".join(process.communicate(timeout=120)[0] for process in started)
    assert [process.returncode for process in started] == [0] * len(started), said
    check(tmp_path / "run", alone, 2, said)
