"""Every launcher's environment is read as what it is; a contradiction is refused, never guessed at."""

from __future__ import annotations

from typing import Any

import pytest

from distdl import topology
from distdl.errors import EnvironmentProblem
from distdl.topology import Agents, Topology, first_host, visible_gpus

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "5",
    "ROLE_WORLD_SIZE": "8",
    "MASTER_ADDR": "node01",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}
# As Slurm 23 sets them for task 5 of `srun --nodes 3 --ntasks 6`, the variables that matter and some others.
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
# Inside `sbatch`, outside any step: the batch script is not a task.
SBATCH = {"SLURM_JOB_ID": "1234", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_NODE_RANK": "3",
    "PMIX_NAMESPACE": "prterun-7",
}


RANK_3_OF_4: dict[str, Any] = {
    "rank": 3,
    "world_size": 4,
    "local_rank": 3,
    "local_world_size": 4,
    "launcher": "mpirun",
    "master_addr": "127.0.0.1",
    "master_port": 28964,
}


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "usable_cpus", lambda: 6)


def read(env: dict[str, str]) -> Topology:
    return Topology.from_env({"CUDA_VISIBLE_DEVICES": "", **env})


GOLDEN: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "nothing": ({"HOME": "/home/u", "PATH": "/bin"}, {"launcher": "none"}),
    "torchrun on two nodes": (
        TORCHRUN,
        {
            "rank": 5,
            "world_size": 8,
            "local_rank": 1,
            "local_world_size": 4,
            "node_rank": 1,
            "launcher": "torchrun",
            "master_addr": "node01",
            "master_port": 29400,
        },
    ),
    "distdl launch": (
        {
            **TORCHRUN,
            "LOCAL_WORLD_SIZE": "8",
            "LOCAL_RANK": "5",
            "GROUP_RANK": "0",
            "DISTDL_LAUNCHER_PID": "42",
        },
        {
            "rank": 5,
            "world_size": 8,
            "local_rank": 5,
            "local_world_size": 8,
            "launcher": "distdl",
            "master_addr": "node01",
            "master_port": 29400,
        },
    ),
    "by hand, one process": ({"RANK": "0", "WORLD_SIZE": "1"}, {"launcher": "torchrun"}),
    "torchrun inside srun": (
        {**SRUN, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "2"},
        {
            "rank": 5,
            "world_size": 8,
            "local_rank": 1,
            "local_world_size": 4,
            "node_rank": 1,
            "launcher": "torchrun",
            "master_addr": "node01",
            "master_port": 29400,
        },
    ),
    "srun on three nodes": (
        SRUN,
        {
            "rank": 5,
            "world_size": 6,
            "local_rank": 1,
            "local_world_size": 2,
            "node_rank": 2,
            "launcher": "srun",
            "master_addr": "gpu07",
            "master_port": 15000 + (1234 * 16 + 2) % 16000,
        },
    ),
    "srun, told where to meet": (
        {**SRUN, "MASTER_ADDR": "head-ib", "MASTER_PORT": "4000"},
        {
            "rank": 5,
            "world_size": 6,
            "local_rank": 1,
            "local_world_size": 2,
            "node_rank": 2,
            "launcher": "srun",
            "master_addr": "head-ib",
            "master_port": 4000,
        },
    ),
    "srun on one node": (
        {
            **SRUN,
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_NODEID": "0",
            "SLURM_LOCALID": "5",
            "SLURM_STEP_NODELIST": "gpu07",
        },
        {
            "rank": 5,
            "world_size": 6,
            "local_rank": 5,
            "local_world_size": 6,
            "launcher": "srun",
            "master_addr": "127.0.0.1",
            "master_port": 15000 + (1234 * 16 + 2) % 16000,
        },
    ),
    "a batch script, before any srun": (SBATCH, {"launcher": "none"}),
    "mpirun on one node": (
        MPIRUN,
        RANK_3_OF_4,
    ),
    "mpirun in a job of Slurm, started by its daemon": (
        {**SRUN, **MPIRUN},
        RANK_3_OF_4,
    ),
    "mpirun on two nodes": (
        {
            **MPIRUN,
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "OMPI_COMM_WORLD_NODE_RANK": "1",  # counts processes on the node; not a node's number
            "MASTER_ADDR": "a1",
            "MASTER_PORT": "4000",
        },
        {
            "rank": 3,
            "world_size": 4,
            "local_rank": 1,
            "local_world_size": 2,
            "node_rank": 1,
            "launcher": "mpirun",
            "master_addr": "a1",
            "master_port": 4000,
        },
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    env, expected = GOLDEN[name]
    assert read(env) == Topology(**expected, cpus=6, gpus=0)


def test_nodes_are_derived() -> None:
    assert [
        read(GOLDEN[n][0]).nodes for n in ("nothing", "torchrun on two nodes", "srun on three nodes")
    ] == [
        1,
        2,
        3,
    ]
    assert Topology.of(3, 4).nodes == 3


@pytest.mark.parametrize(
    ("base", "changes", "says"),
    [
        (TORCHRUN, {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN, {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        (TORCHRUN, {"RANK": "-1"}, "RANK is '-1'"),
        (TORCHRUN, {"WORLD_SIZE": "eight"}, "WORLD_SIZE is 'eight'"),
        (TORCHRUN, {"RANK": None}, "RANK is None"),
        (TORCHRUN, {"WORLD_SIZE": None}, "WORLD_SIZE is None"),
        (TORCHRUN, {"LOCAL_RANK": None}, "LOCAL_RANK is None"),
        (TORCHRUN, {"MASTER_ADDR": None}, "MASTER_ADDR and MASTER_PORT must both be set"),
        (TORCHRUN, {"MASTER_PORT": None}, "MASTER_ADDR and MASTER_PORT must both be set"),
        (TORCHRUN, {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (SRUN, {"SLURM_PROCID": "6"}, "rank 6 of 6"),
        (SRUN, {"SLURM_LOCALID": "2"}, "local rank 2 of 2"),
        (SRUN, {"SLURM_LOCALID": None}, "SLURM_LOCALID is None"),
        (SRUN, {"SLURM_STEP_NUM_TASKS": None}, "SLURM_STEP_NUM_TASKS is None"),
        (SRUN, {"SLURM_STEP_NODELIST": None}, "cannot read the Slurm node list ''"),
        (SRUN, {"SLURM_STEP_NODELIST": "gpu[07-09"}, r"cannot read the Slurm node list 'gpu\[07-09'"),
        (MPIRUN, {"OMPI_COMM_WORLD_SIZE": None}, "OMPI_COMM_WORLD_SIZE is None"),
        (MPIRUN, {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "MASTER_ADDR is not set"),
        (MPIRUN, {"OMPI_COMM_WORLD_RANK": "4"}, "rank 4 of 4"),
    ],
)
def test_contradictions_and_missing_variables(
    base: dict[str, str], changes: dict[str, str | None], says: str
) -> None:
    env = {k: v for k, v in {**base, **changes}.items() if v is not None}
    with pytest.raises(EnvironmentProblem, match=says):
        read(env)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[03-05,9]", "node03"),
        ("node[7],other", "node7"),
        ("a,b[2-3]", "a"),
        ("gpu[01-04]-ib,x1", "gpu01-ib"),
        ("rack[1-2]n[10-12]", "rack1n10"),
        ("node-a.example.org,b", "node-a.example.org"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", ",a", "[", "[]", "n[]", "]x"])
def test_no_first_host(nodelist: str) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot read the Slurm node list"):
        first_host(nodelist)


@pytest.mark.parametrize(
    ("devices", "count"),
    [("", 0), ("0", 1), ("0,1", 2), ("3, 5,7", 3), ("-1", 0), ("NoDevFiles", 0), ("GPU-8f3b,MIG-1", 2)],
)
def test_visible_gpus(devices: str, count: int) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": devices}) == count
    assert Topology.from_env({"CUDA_VISIBLE_DEVICES": devices}).gpus == count


def test_ranks_of_a_job_agree_on_the_port_and_jobs_differ() -> None:
    ports = {
        read({**SRUN, "SLURM_PROCID": r, "SLURM_LOCALID": str(int(r) % 2)}).master_port for r in "012345"
    }
    assert len(ports) == 1
    jobs = {
        read({**SRUN, "SLURM_JOB_ID": str(j), "SLURM_STEP_ID": s}).master_port
        for j in range(50)
        for s in "01"
    }
    assert len(jobs) == 100
    assert all(15000 <= p < 31000 for p in jobs if p)


# --- launchers: one a node ---

EACH = {**SRUN, "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}


def test_a_launcher_alone() -> None:
    assert Agents.from_env({}, None) == Agents.from_env(SBATCH, 1) == Agents()


def test_one_launcher_on_each_node() -> None:
    port = 15000 + (1234 * 16 + 2) % 16000
    assert Agents.from_env(EACH, None) == Agents.from_env(EACH, 3) == Agents(2, 3, "gpu07", port)
    chosen = {**EACH, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "5000"}
    assert Agents.from_env(chosen, 3) == Agents(2, 3, "10.0.0.7", 5000)


@pytest.mark.parametrize(
    ("env", "nodes", "says"),
    [
        ({}, 2, "2 nodes are asked for and 1 started"),
        (EACH, 2, "2 nodes are asked for and 3 started"),
        (SRUN, None, "srun started 6 times `distdl launch` on 3 nodes"),
        (TORCHRUN, None, "was started by torchrun"),
        (MPIRUN, None, "was started by mpirun"),
        ({"RANK": "0", "LOCAL_SIZE": "2", "CROSS_SIZE": "1"}, None, "deepspeed ... --module distdl train"),
    ],
)
def test_launchers_that_do_not_fit_are_refused(env: dict[str, str], nodes: int | None, says: str) -> None:
    with pytest.raises(EnvironmentProblem, match=says):
        Agents.from_env(env, nodes)


def test_torchrun_in_every_task_of_srun_is_refused() -> None:
    with pytest.raises(
        EnvironmentProblem, match="srun started torchrun 6 times, and each forms a world of 2 nodes"
    ):
        read({**SRUN, **TORCHRUN})


DEEPSPEED = {
    "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
    "LOCAL_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({**SRUN, **DEEPSPEED}, "srun started deepspeed 6 times, and each forms a world of 1 node by itself"),
        ({**MPIRUN, **TORCHRUN}, "mpirun started torchrun 4 times, and each forms a world of 2 nodes"),
        ({**SRUN, **MPIRUN, **TORCHRUN}, "mpirun started torchrun 4 times"),
        ({**MPIRUN, **DEEPSPEED}, "mpirun started deepspeed 4 times"),
    ],
)
def test_other_launchers_in_every_task_are_refused_too(env: dict[str, str], says: str) -> None:
    with pytest.raises(EnvironmentProblem, match=says):
        read(env)


def test_a_launcher_on_each_node_is_fine() -> None:
    assert read({**SRUN, **DEEPSPEED, "SLURM_STEP_NUM_TASKS": "1"}).world_size == 2
    assert read({**MPIRUN, **TORCHRUN, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}).rank == 5


def test_jobs_of_mpirun_meet_at_ports_of_their_own() -> None:
    names = [f"prterun-node1-{pid}@1" for pid in range(40_000, 40_100)]
    ports = {read({**MPIRUN, "PMIX_NAMESPACE": name}).master_port for name in names}
    assert len(ports) > 95


def test_variables_left_over_from_a_smaller_try_are_refused() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with pytest.raises(EnvironmentProblem, match="srun started 6 tasks, and WORLD_SIZE=1 and RANK=0 are set"):
        read({**SRUN, **alone})
    assert read({**SRUN, **alone, "SLURM_STEP_NUM_TASKS": "1"}).world_size == 1
    assert read({**SBATCH, **alone}).world_size == 1


@pytest.mark.parametrize(
    ("env", "gpu", "each"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_PER_TASK": "1"}, 0, True),
        ({"CUDA_VISIBLE_DEVICES": "0"}, 1, False),  # one for the two processes of the node
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 1, True),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_PER_TASK": "1"}, 1, False),
    ],
)
def test_a_task_of_srun_may_see_its_own_gpu_alone(env: dict[str, str], gpu: int, each: bool) -> None:
    found = read({**SRUN, **env})
    assert (found.gpu, found.a_gpu_each) == (gpu, each)


def test_deepspeed_says_how_many_are_on_a_node() -> None:
    launched = {k: v for k, v in TORCHRUN.items() if not k.startswith(("LOCAL_WORLD", "TORCHELASTIC"))}
    assert read({**launched, "LOCAL_SIZE": "4"}).nodes == 2
