"""Where am I? `Topology` is read once from an explicit environment; nothing else in distdl reads ranks.

Four ways of being started are understood, tried in this order:

* torchrun, `distdl launch`, `accelerate launch`, `deepspeed`: RANK, WORLD_SIZE, LOCAL_RANK, ...
* Slurm's srun: SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST, ...
* Open MPI's mpirun: OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE, ...
* nothing: one process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

from distdl.errors import EnvironmentProblem


@dataclass(frozen=True)
class AccelerateAsks:
    """What Accelerate's own configuration asks for, as `accelerate launch` hands it to its processes.

    `wraps`: "ddp", "fsdp", "deepspeed" or "megatron"; `zero_stage` for DeepSpeed. `precision` and `dynamo`
    are None where it leaves them open.
    """

    wraps: str = "ddp"
    zero_stage: int = 2
    precision: str | None = None
    dynamo: str | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> AccelerateAsks:
        """Read what is asked for from environment variables; without any, DDP and nothing else."""
        switches = {
            "fsdp": "ACCELERATE_USE_FSDP",
            "deepspeed": "ACCELERATE_USE_DEEPSPEED",
            "megatron": "ACCELERATE_USE_MEGATRON_LM",
        }
        on = [name for name, variable in switches.items() if _flag(env, variable)]
        return cls(
            wraps=on[0] if on else "ddp",
            zero_stage=_number(env, "ACCELERATE_DEEPSPEED_ZERO_STAGE", 2),
            precision=_unless_no(env, "ACCELERATE_MIXED_PRECISION"),
            dynamo=_unless_no(env, "ACCELERATE_DYNAMO_BACKEND"),
        )


def _flag(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _unless_no(env: Mapping[str, str], name: str) -> str | None:
    value = env.get(name, "no").lower()
    return None if value == "no" else value


@dataclass(frozen=True)
class Agents:
    """One launcher's place among those of a run, one a node. Node 0's is to be found at `host` and `port`;
    they mean nothing where there is only one.
    """

    node: int = 0
    nodes: int = 1
    host: str = "127.0.0.1"
    port: int = 0

    @classmethod
    def from_env(cls, env: Mapping[str, str], nodes: int | None) -> Agents:
        """Who starts how many launchers is read from the environment; `nodes` is what the user asks for.

        Raises EnvironmentProblem where the two differ, and where this launcher is itself the worker of one.
        """
        for name, launcher, use in (
            ("TORCHELASTIC_RUN_ID", "torchrun", "torchrun ... -m distdl train"),
            ("OMPI_COMM_WORLD_RANK", "mpirun", "mpirun ... python -m distdl train"),
            ("CROSS_SIZE", "deepspeed", "deepspeed ... --module distdl train"),
        ):
            if name in env:
                raise EnvironmentProblem(
                    f"`distdl launch` was started by {launcher}, which starts processes as well: use "
                    f"`{use}`, or `distdl launch` without it"
                )
        if not _in_slurm_step(env):
            found = cls()
        else:
            tasks, there = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_STEP_NUM_NODES", 1)
            if tasks > there:
                raise EnvironmentProblem(
                    f"srun started {tasks} times `distdl launch` on {there} node{'s' * (there > 1)}, and "
                    "each would start all processes of its node: use `srun --ntasks-per-node=1 distdl launch "
                    "...`, or `srun python -m distdl train ...` without a launcher"
                )
            host, port = _slurm_meeting(env, there)
            found = cls(_number(env, "SLURM_NODEID", 0), there, host, port)
        if nodes is not None and nodes != found.nodes:
            raise EnvironmentProblem(
                f"{nodes} nodes are asked for and {found.nodes} started: `srun --nodes={nodes} "
                "--ntasks-per-node=1 distdl launch ...` starts it once on each, and `--on slurm` does it all"
            )
        return found


@dataclass(frozen=True)
class Topology:
    """One process's place among the processes of a run, and what its node offers.

    `gpus` and `cpus` are those this node lets the run use. `master_addr` and `master_port` name the
    rendezvous; both are None for a single process. `agent_store`: the launcher's agent serves a store there,
    and `attempt` counts how often it has restarted its workers. `own_gpu`: the GPU that this process sees is
    its alone, as with `srun --gpus-per-task=1`.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    launcher: str = "none"
    master_addr: str | None = None
    master_port: int | None = None
    agent_store: bool = False
    attempt: int = 0
    cpus: int = 1
    gpus: int = 0
    own_gpu: bool = False
    accelerate: AccelerateAsks = AccelerateAsks()

    @property
    def gpu(self) -> int:
        """The number of this process's GPU among those it sees."""
        return 0 if self.own_gpu else self.local_rank

    @property
    def a_gpu_each(self) -> bool:
        """Whether every process of the node has a GPU of its own."""
        return self.own_gpu or self.gpus >= self.local_world_size

    @property
    def nodes(self) -> int:
        """How many nodes, taking every node to hold as many processes as this one."""
        return -(-self.world_size // self.local_world_size)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Topology:
        """Read the topology from environment variables.

        Raises EnvironmentProblem where variables contradict each other or one is missing.
        """
        if "RANK" in env and "WORLD_SIZE" in env:
            _check_launcher_in_launcher(env)
            _check_left_over_in_slurm(env)
            found = _from_torchrun(env)
        elif "OMPI_COMM_WORLD_RANK" in env:  # before Slurm: mpirun's daemons are a step of its own
            found = _from_open_mpi(env)
        elif _in_slurm_step(env):
            found = _from_slurm(env)
        elif "RANK" in env or "WORLD_SIZE" in env:
            found = _from_torchrun(env)  # raises, naming the one that is missing
        else:
            _refuse_one_of_several(env)
            found = cls()
        _check(found)
        asks = AccelerateAsks.from_env(env)
        gpus = visible_gpus(env)
        own = found.launcher == "srun" and gpus == 1 and "SLURM_GPUS_PER_TASK" in env
        return replace(found, cpus=usable_cpus(), gpus=gpus, own_gpu=own, accelerate=asks)

    @classmethod
    def of(cls, nodes: int, procs: int, *, cpus: int | None = None, gpus: int = 0) -> Topology:
        """The topology of rank 0 of `nodes` nodes with `procs` processes each, for planning ahead."""
        return cls(
            world_size=nodes * procs,
            local_world_size=procs,
            launcher="planned",
            cpus=usable_cpus() if cpus is None else cpus,
            gpus=gpus,
        )


def usable_cpus() -> int:
    """The number of CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus(env: Mapping[str, str]) -> int:
    """The number of NVIDIA GPUs that a process with this environment would see, without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in env:
        named = [d.strip() for d in env["CUDA_VISIBLE_DEVICES"].split(",")]
        return len([d for d in named if d and d not in ("-1", "NoDevFiles")])
    return len([p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)])


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: ``node[03-05,9]-ib,x1`` -> ``node03-ib``."""
    match = re.match(r"(?:[^,\[\]]|\[\w[^\[\]]*\])+(?=,|$)", nodelist)
    if not match:
        raise EnvironmentProblem(f"cannot read the Slurm node list {nodelist!r}: expected e.g. node[01-04]")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d+", text):
        raise EnvironmentProblem(
            f"environment variable {name} is {text!r}: expected a whole number. "
            "It is set by the launcher that started this process; unset all of them to run a single process"
        )
    return int(text)


def _from_torchrun(env: Mapping[str, str]) -> Topology:
    world = _number(env, "WORLD_SIZE")
    return Topology(
        rank=_number(env, "RANK"),
        world_size=world,
        local_rank=_number(env, "LOCAL_RANK", 0 if world == 1 else None),
        local_world_size=_number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", world)),  # DeepSpeed's
        node_rank=_number(env, "GROUP_RANK", 0),
        launcher="distdl" if "DISTDL_LAUNCHER_PID" in env else "torchrun",
        master_addr=env.get("MASTER_ADDR"),
        master_port=_number(env, "MASTER_PORT") if "MASTER_PORT" in env else None,
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    return "SLURM_STEP_ID" in env and "SLURM_PROCID" in env


def _slurm_meeting(env: Mapping[str, str], nodes: int) -> tuple[str, int]:
    """Host and port at which the tasks of a step meet."""
    host = env.get("MASTER_ADDR") or (
        "127.0.0.1" if nodes == 1 else first_host(env.get("SLURM_STEP_NODELIST", ""))
    )
    # A port that follows from the job: all its tasks find it, and two jobs on one node rarely share it.
    port = 15000 + (_number(env, "SLURM_JOB_ID", 0) * 16 + _number(env, "SLURM_STEP_ID", 0)) % 16000
    return host, _number(env, "MASTER_PORT", port)


def _check_launcher_in_launcher(env: Mapping[str, str]) -> None:
    """torchrun (or deepspeed) under srun or mpirun is one launcher a task. Several that know nothing of each
    other are a mistake.
    """
    if "DISTDL_LAUNCHER_PID" in env:  # its agents have met, and may be fewer than were started
        return
    if "TORCHELASTIC_RUN_ID" in env:
        inner, agents = "torchrun", _number(env, "GROUP_WORLD_SIZE", 1)
    elif "CROSS_SIZE" in env:
        inner, agents = "deepspeed", _number(env, "CROSS_SIZE", 1)
    else:
        return
    if "OMPI_COMM_WORLD_SIZE" in env:  # in a job of Slurm it has srun start its daemons
        outer, tasks = "mpirun", _number(env, "OMPI_COMM_WORLD_SIZE")
    elif _in_slurm_step(env):
        outer, tasks = "srun", _number(env, "SLURM_STEP_NUM_TASKS", 1)
    else:
        return
    if tasks > agents:
        one = "srun --ntasks-per-node=1" if outer == "srun" else "mpirun --map-by ppr:1:node"
        raise EnvironmentProblem(
            f"{outer} started {inner} {tasks} times, and each forms a world of {agents} node"
            f"{'s' * (agents > 1)} by itself: they would train the same run at once. Start one a node "
            f"(`{one} torchrun --nnodes=N ...`), or none: `{outer} python -m distdl train`"
        )


def _check_left_over_in_slurm(env: Mapping[str, str]) -> None:
    """Variables of an earlier try, which srun hands to all tasks: each would think its run smaller."""
    # torch's agents, ours, DeepSpeed's launcher, and Accelerate's set these for the processes they start.
    others = {"TORCHELASTIC_RUN_ID", "DISTDL_LAUNCHER_PID", "LOCAL_SIZE", "CROSS_SIZE"} & env.keys()
    if not _in_slurm_step(env) or others or any(name.startswith("ACCELERATE_") for name in env):
        return
    tasks, world = _number(env, "SLURM_STEP_NUM_TASKS", 1), _number(env, "WORLD_SIZE")
    if world < tasks:
        raise EnvironmentProblem(
            f"srun started {tasks} tasks, and WORLD_SIZE={world} and RANK={env['RANK']} are set in their "
            "environment (left over in a shell or in its start-up file?): each would train by itself. Unset "
            "them (`unset RANK WORLD_SIZE LOCAL_RANK`), and srun's own numbers are taken"
        )


def _from_slurm(env: Mapping[str, str]) -> Topology:
    world = _number(env, "SLURM_STEP_NUM_TASKS")
    nodes = _number(env, "SLURM_STEP_NUM_NODES", 1)
    host, port = _slurm_meeting(env, nodes)
    return Topology(
        rank=_number(env, "SLURM_PROCID"),
        world_size=world,
        local_rank=_number(env, "SLURM_LOCALID"),
        local_world_size=-(-world // nodes),
        node_rank=_number(env, "SLURM_NODEID", 0),
        launcher="srun",
        master_addr=host,
        master_port=port,
    )


def _from_open_mpi(env: Mapping[str, str]) -> Topology:
    world = _number(env, "OMPI_COMM_WORLD_SIZE")
    local = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if local < world and "MASTER_ADDR" not in env:
        raise EnvironmentProblem(
            f"mpirun started {world} processes on several nodes and MASTER_ADDR is not set: "
            "name the host of rank 0 with `mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=PORT ...`"
        )
    # mpirun gives all ranks of a job one parent identity; without it the default port has to do.
    job = crc32(env.get("PMIX_NAMESPACE", env.get("OMPI_MCA_ess_base_jobid", "")).encode())
    rank = _number(env, "OMPI_COMM_WORLD_RANK")
    return Topology(
        rank=rank,
        world_size=world,
        local_rank=_number(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_world_size=local,
        # Not OMPI_COMM_WORLD_NODE_RANK, which counts processes on this node, not nodes.
        node_rank=rank // max(local, 1),
        launcher="mpirun",
        master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(env, "MASTER_PORT", 15000 + job % 16000),
    )


def _refuse_one_of_several(env: Mapping[str, str]) -> None:
    # Accelerate's launcher for CPUs gives an address to meet at where several processes were asked for, and
    # then starts one, without a rank (accelerate/utils/launch.py, prepare_simple_launcher_cmd_env).
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise EnvironmentProblem(
            "Accelerate was asked for several processes and has started one (MASTER_ADDR and MASTER_PORT are "
            "set, WORLD_SIZE is not): `accelerate launch` starts several on GPUs or by mpirun. Start with "
            "`distdl launch --procs N` or torchrun; where one process is meant, unset MASTER_ADDR and "
            "MASTER_PORT"
        )


def _check(t: Topology) -> None:
    if not 0 <= t.rank < t.world_size or not 0 <= t.local_rank < t.local_world_size:
        raise EnvironmentProblem(
            f"the environment says rank {t.rank} of {t.world_size}, local rank {t.local_rank} of "
            f"{t.local_world_size} (launcher: {t.launcher}): ranks must lie below their world sizes"
        )
    if t.world_size > 1 and (t.master_addr is None or t.master_port is None):
        raise EnvironmentProblem(
            f"rank {t.rank} of {t.world_size}: MASTER_ADDR and MASTER_PORT must both be set, so that "
            "the ranks find each other; torchrun and `distdl launch` set them"
        )
