"""Under a real Slurm of two nodes: every way in ends with the parameters that one process computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distdl.record import read_lines
from distdl.testing import assert_same_bits
from tests.faults.support import tensors_of
from tests.multiprocess.test_ways_in import PYTHON, TORCHRUN, TRAIN, check, computed_alone, small
from tests.slurm.conftest import ROOT, TestCluster, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return computed_alone(tmp_path_factory.mktemp("alone"))


TWO = ["srun", "--nodes=2", "--ntasks-per-node=1"]
SRUN: dict[str, list[str]] = {
    "srun train": [*TWO, PYTHON, *TRAIN],
    "srun train, one node": ["srun", "--nodes=1", "--ntasks=2", PYTHON, *TRAIN],
    "srun distdl launch": [*TWO, PYTHON, "-m", "distdl", "launch", "--nodes=2", "--procs=1"],
    "srun torchrun": [
        *TWO, *TORCHRUN, "--nnodes=2", "--nproc-per-node=1",
        "--rdzv-backend=c10d", "--rdzv-endpoint=node1:29511", *TRAIN,
    ],
    "srun torchrun, static": [
        *TWO, "bash", "-c", 'exec "$1" "${@:2:2}" --node-rank="$SLURM_NODEID" "${@:4}"', "bash", *TORCHRUN,
        "--nnodes=2", "--nproc-per-node=1", "--master-addr=node1", "--master-port=29512", *TRAIN,
    ],
    "mpirun in a job": [
        "salloc", "--nodes=2", "--ntasks-per-node=1", "mpirun", "--allow-run-as-root", "-n", "2",
        "--map-by", "node", "-x", "MASTER_ADDR=node1", "-x", "MASTER_PORT=29513", PYTHON, *TRAIN,
    ],
}  # fmt: skip
LONG_RUN = ("srun train, one node", "srun torchrun, static", "mpirun in a job")


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=pytest.mark.campaign) if w in LONG_RUN else w for w in SRUN]
)
def test_under_srun(way: str, cluster: TestCluster, tmp_path: Path, alone: Any) -> None:
    if way == "mpirun in a job" and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed")
    code, said = cluster.say(*SRUN[way], str(small(tmp_path)))
    assert code == 0, said
    check(tmp_path / "run", alone, 2, said)


def test_submitted(cluster: TestCluster, tmp_path: Path, alone: Any) -> None:
    recipe, run = small(tmp_path), tmp_path / "run"
    words = ["launch", str(recipe), "--on", "slurm", "--nodes", "2", "--procs", "1", "launch.slurm.cpus=2"]
    assert "to start at" in cluster.distdl(*words, "--test-only")
    assert not run.exists()
    said = cluster.distdl(*words)
    number = said.splitlines()[0].removeprefix("job: ")
    assert said.splitlines()[1] == f"run directory: {run}"
    wait_until(lambda: not cluster.queue(), 60, "the job ends")
    log = (run / "slurm" / f"{number}.log").read_text()
    check(run, alone, 2, log)
    assert f"job {number}: exit code 0; over" in log
    assert f"job {number}" in cluster.distdl("slurm", "status", str(run))
    assert "exit code 0; over" in cluster.distdl("slurm", "logs", str(run))


@pytest.mark.campaign
def test_asked_to_stop_srun_ends_with_75(cluster: TestCluster, tmp_path: Path, alone: Any) -> None:
    recipe, run = small(tmp_path), tmp_path / "run"
    words = [*SRUN["srun train"], str(recipe)]
    code, said = cluster.say("env", "DISTDL_FAIL_AT=1:train.step@1:USR1", *words)
    assert code == 75, said
    (stop,) = [e for e in read_lines(run / "events.jsonl") if e["event"] == "stop"]
    assert stop["saved"] == stop["step"] < 4
    code, said = cluster.say(*words)
    assert code == 0, said
    assert_same_bits(tensors_of(run), alone)


@pytest.mark.campaign
def test_names_and_values_arrive_as_they_are(cluster: TestCluster, tmp_path: Path, alone: Any) -> None:
    """Through sbatch's directives, bash, srun and Slurm's own patterns for logs."""
    folder = tmp_path / "a 'b' \"c\" 100% $(touch oops) `id` ;é"
    recipe, run = small(folder), folder / "run"
    odd = 'it\'s "so" $(touch oops)\n#SBATCH --nodes=99'
    (tmp_path / "odd").write_text(odd)
    keys = [f"launch.slurm.env={json.dumps({'ODD': odd})}"]
    keys += ["launch.slurm.container=[env, 'X=a b']", f"launch.slurm.python={PYTHON}"]
    keys += [f"launch.slurm.setup=['cmp {tmp_path}/odd <(printf %s \"$ODD\") && echo as it is']"]
    said = cluster.distdl("launch", str(recipe), "--on", "slurm", "--nodes", "2", "--procs", "1", *keys)
    assert said.splitlines()[-1] == f"run directory: {run}"
    wait_until(lambda: not cluster.queue(), 60, "the job ends")
    log = cluster.distdl("slurm", "logs", str(run))
    check(run, alone, 2, log)
    assert "as it is" in log
    assert not [*ROOT.glob("oops"), *tmp_path.rglob("oops")]
    assert "step 4, saved 4" in cluster.distdl("slurm", "status", str(run))


@pytest.mark.campaign
def test_two_jobs_on_the_same_nodes_do_not_meet(cluster: TestCluster, tmp_path: Path, alone: Any) -> None:
    recipes = [small(tmp_path / name) for name in ("one", "two")]
    for recipe in recipes:
        keys = ["launch.slurm.cpus=1", "launch.slurm.setup=['sleep 3']"]  # so that both have begun
        cluster.distdl("launch", str(recipe), "--on", "slurm", "--nodes", "2", "--procs", "1", *keys)
    wait_until(lambda: cluster.queue() == ["RUNNING", "RUNNING"], 30, "both run")
    wait_until(lambda: not cluster.queue(), 90, "the jobs end")
    for recipe in recipes:
        run = recipe.parent / "run"
        check(run, alone, 2, "".join(path.read_text() for path in (run / "slurm").glob("*.log")))


@pytest.mark.campaign
@pytest.mark.parametrize("option", ["gres", "gpus-per-node"])
def test_gpus_are_asked_for_as_the_cluster_wants_it(
    option: str, cluster: TestCluster, tmp_path: Path, alone: Any
) -> None:
    """The nodes have two devices each that Slurm takes for GPUs; training itself is told to use the CPU."""
    recipe, run = small(tmp_path), tmp_path / "run"
    keys = ["launch.slurm.gpus=1", f"launch.slurm.gpu_option={option}", "hardware.device=cpu"]
    keys += ["launch.slurm.setup=['echo \"has $SLURM_GPUS_ON_NODE GPU\"']"]
    cluster.distdl("launch", str(recipe), "--on", "slurm", "--nodes", "2", "--procs", "1", *keys)
    wait_until(lambda: not cluster.queue(), 60, "the job ends")
    log = "".join(path.read_text() for path in sorted((run / "slurm").glob("*.log")))
    check(run, alone, 2, log)
    assert "has 1 GPU" in log


def test_the_doctor_examines_the_nodes_of_a_run(cluster: TestCluster, tmp_path: Path) -> None:
    words = ["doctor", str(small(tmp_path)), "--on", "slurm", "--nodes", "2", "--procs", "2"]
    words += ["launch.slurm.cpus=2", "batch.global=32", "--json"]
    code, said = cluster.say(PYTHON, "-m", "distdl", *words)
    found = json.loads(said[said.index("{") :])
    assert code == 0, said
    processes = next(f["found"] for f in found["findings"] if f["check"] == "processes")
    assert processes.startswith("4 on 2 node(s)"), processes
    # The nodes share the cores of this machine, with whatever else runs on it.
    troubles = [f for f in found["findings"] if f["status"] in ("warn", "fail") and f["check"] != "CPU cores"]
    assert not troubles, said
    code, said = cluster.say(PYTHON, "-m", "distdl", *words[:-1], "data.name=", "data.path=/nowhere")
    assert code == 3, said
    assert "/nowhere" in said


# --- a launcher inside a launcher ---

NESTED = {
    "torchrun in each task": (
        ["srun", "--nodes=1", "--ntasks=2", *TORCHRUN, "--standalone", "--nproc-per-node=1", *TRAIN],
        "srun started torchrun 2 times, and each forms a world of 1 node by itself",
    ),
    "distdl launch in each task": (
        ["srun", "--nodes=1", "--ntasks=2", PYTHON, "-m", "distdl", "launch", "--procs=2"],
        "srun started 2 times `distdl launch` on 1 node",
    ),
    "more nodes than were started": (
        ["srun", "--nodes=1", "--ntasks=1", PYTHON, "-m", "distdl", "launch", "--nodes=2"],
        "2 nodes are asked for and 1 started",
    ),
}


@pytest.mark.parametrize("case", NESTED)
def test_a_launcher_inside_a_launcher_is_explained(case: str, cluster: TestCluster, tmp_path: Path) -> None:
    words, says = NESTED[case]
    code, said = cluster.say(*words, str(small(tmp_path)))
    assert code != 0
    assert says in said
    assert not (tmp_path / "run").exists()
