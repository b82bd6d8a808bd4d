"""Are cores, memory and limits enough for the processes of a node?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distdl.doctor.facts import Facts
from distdl.doctor.finding import Finding, Job, fail, ok, size, skipped, warn, where

MEMORY_A_PROCESS = 1 << 30
"""A process that has imported torch and mapped its data, before it has a model."""
LEAST_SHARE = 0.25
"""Of a core: with less, a rank is several times slower than the others, which wait for it."""
SHM_A_SNAPSHOT = 64 << 20
"""Of a network nobody has saved yet; a container has this much /dev/shm by default."""
SHM_A_PROCESS, SHM_A_WORKER = 32 << 20, 64 << 20
"""What NCCL takes for the ranks of one node; a batch or two from each process that loads data."""
ADDRESS_SPACE = 4 << 30
"""What a process maps is more than what it uses; a small network on a CPU reached 1.5 GiB."""
LEAST_FILES, FILES, FILES_A_RANK, FILES_A_WORKER = 40, 128, 4, 32
"""Open files of a process: by itself at the least (about 20 were counted in one that trains), with room for
libraries, for each rank it is connected to, for each process that loads data."""


def cores(job: Job) -> Iterator[Finding]:
    """Every process of a node has a core of its own."""
    for processes in job.nodes.values():
        first = processes[0]
        for cores in sorted({f.machine.cores for f in processes}):
            on_them = sum(set(f.machine.cores) <= set(cores) for f in processes)
            if on_them > len(cores):
                yield warn(
                    f"{on_them} processes may use only core {_list(cores)}{where(job, first)}: they wait",
                    "give each cores of its own: srun --cpu-bind=cores --cpus-per-task=N, mpirun --bind-to "
                    "none, or fewer processes",
                )
                break
        for facts in processes:
            if facts.machine.share < LEAST_SHARE:
                yield warn(
                    f"{facts.label} gets {facts.machine.share:.0%} of a core when it asks for all of it: "
                    f"other processes compete for core {_list(facts.machine.cores)}, and all ranks wait for "
                    "it in every step",
                    f"see what else runs there (on {facts.place.host}: top, ps -eo pcpu,pid,user,args), and "
                    "stop it; or leave the node out (--exclude), or ask for nodes of your own (--exclusive)",
                )
        quota = first.machine.cpu_quota
        if quota is not None and quota < len(processes):
            yield warn(
                f"the control group grants {quota:g} cores to {len(processes)} processes{where(job, first)}",
                "ask the scheduler or the container for more (--cpus-per-task, docker --cpus)",
            )
    yield ok("; ".join(f"{len(_of_node(p))}{where(job, p[0])}" for p in job.nodes.values()))


def _of_node(processes: Sequence[Facts]) -> set[int]:
    return {core for f in processes for core in f.machine.cores}


def _list(cores: Sequence[int]) -> str:
    return ", ".join(map(str, cores))


def threads(job: Job) -> Iterator[Finding]:
    """No more threads than cores."""
    for processes in job.nodes.values():
        first, here = processes[0], len(_of_node(processes))
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            text = first.env.get(variable)
            if text is None:
                continue
            if not text.isdigit() or int(text) == 0:
                yield warn(
                    f"{variable}={text} is no number of threads{where(job, first)}", f"unset {variable}"
                )
            elif int(text) * len(processes) > 2 * here:
                yield warn(
                    f"{variable}={text}, {len(processes)} process(es), {here} cores{where(job, first)}: "
                    "threads get in each other's way",
                    f"unset {variable}, or set it to {max(1, here // len(processes))}",
                )
        asked = job.wanted.threads if job.wanted else None
        few = [f for f in processes if asked and len(f.machine.cores) < asked]
        if few:
            yield warn(
                f"hardware.threads={asked}, and {few[0].label} may use {len(few[0].machine.cores)} core(s), "
                "fewer than threads: they wait for each other",
                f"ask for as many (srun --cpus-per-task={asked}, launch.slurm.cpus; mpirun --bind-to none), "
                f"or hardware.threads={len(few[0].machine.cores)}",
            )
    yield ok("no more than cores")


def arithmetic(job: Job) -> Iterator[Finding]:
    """The processor computes in train.precision, where it is the processor that computes."""
    if job.wanted is None:
        yield skipped("no recipe was given")
        return
    precision = job.wanted.precision
    for facts in job.leaders if job.wanted.device == "cpu" else ():
        if precision in facts.software.torch.slow:
            yield warn(
                f"the processor has no instructions for train.precision={precision}{where(job, facts)}: it "
                "imitates them, many times slower than fp32",
                "train.precision=fp32, or a processor that has them",
            )
    yield ok(f"{precision} on {job.wanted.device}")


def memory(job: Job) -> Iterator[Finding]:
    """There is room for the processes of the node."""
    for processes in job.nodes.values():
        first = processes[0]
        here, room = len(processes), first.machine.memory_free
        if room < here * MEMORY_A_PROCESS:
            make = fail if room < here * MEMORY_A_PROCESS // 2 else warn
            yield make(
                f"{size(room)} of {size(first.machine.memory)} of memory is free for {here} "
                f"process(es){where(job, first)}; each takes about {size(MEMORY_A_PROCESS)} before it has a "
                "model",
                "end what else runs there, start fewer processes, or ask for more (sbatch --mem, docker "
                "--memory)",
            )
    yield ok("; ".join(f"{size(f.machine.memory_free)} free{where(job, f)}" for f in job.leaders[:4]))


def shared_memory(job: Job) -> Iterator[Finding]:
    """/dev/shm holds what the processes of a node hand to each other through it."""
    wanted = job.wanted
    for processes in job.nodes.values():
        first, here = processes[0], len(processes)
        workers = wanted.workers if wanted else 0
        need = here * workers * SHM_A_WORKER
        if first.gpus.present and here > 1:
            need += here * SHM_A_PROCESS
        if wanted and wanted.replicas:
            # Its own snapshot, and the one of the node before it.
            need += 2 * (wanted.save if wanted.save is not None else SHM_A_SNAPSHOT)
        room = first.machine.shm_free
        found = f"/dev/shm has {size(room)} free of {size(first.machine.shm)}{where(job, first)}"
        todo = (
            "make it larger (docker run --shm-size=8g or --ipc=host; as root: mount -o remount,size=8G "
            "/dev/shm)"
        )
        if room < need:
            less = " or hardware.workers=0" if workers else ""
            less += " or checkpoint.replicas=none" if wanted and wanted.replicas else ""
            yield fail(f"{found}; the processes of this node need about {size(need)}", f"{todo}{less}")
        elif first.machine.shm < 128 << 20 and (first.gpus.present or wanted is None):
            yield warn(f"{found}, which is a container's default", f"{todo} before loading data in workers")
    yield ok("; ".join(f"{size(f.machine.shm_free)} free{where(job, f)}" for f in job.leaders[:4]))


def limits(job: Job) -> Iterator[Finding]:
    """Limits of open files, processes and locked memory."""
    workers = job.wanted.workers if job.wanted else 0
    more = FILES_A_RANK * job.world_size + FILES_A_WORKER * workers
    need = FILES + more
    for processes in job.nodes.values():
        first = min(processes, key=lambda f: f.machine.open_files)
        it = first.machine
        if it.open_files < need:
            hard = "" if it.open_files_hard >= need else ", and the hard limit: limits.conf, LimitNOFILE"
            make = fail if it.open_files < LEAST_FILES + more else warn
            yield make(
                f"a process may have {it.open_files} open files{where(job, first)}, and with "
                f"{job.world_size} ranks {need} are enough",
                f"raise it before starting: ulimit -n {max(need, 4096)}, docker --ulimit nofile{hard}",
            )
        threads_needed = len(processes) * (8 + workers) + 64
        if it.processes < threads_needed:
            yield fail(
                f"this user may have {it.processes} processes and threads{where(job, first)}, and the node "
                f"needs about {threads_needed}",
                "raise it: ulimit -u, limits.conf, docker --pids-limit",
            )
        least = ADDRESS_SPACE * (16 if first.gpus.present else 1)
        if it.address_space is not None and it.address_space < least:
            yield fail(
                f"a process may have {size(it.address_space)} of address space (ulimit -v)"
                f"{where(job, first)}: libraries alone map about 1.5 GiB, those of CUDA many times as much",
                "ulimit -v unlimited before starting; where that is refused, limits.conf (as), LimitAS",
            )
        if it.cpu_time is not None:
            yield warn(
                f"a process is killed after {it.cpu_time} seconds of CPU time (ulimit -t)"
                f"{where(job, first)}, which a long run uses up",
                "ulimit -t unlimited before starting; under Slurm, which hands on the limits of the shell "
                "that submits, --propagate=NONE; where that is refused, limits.conf (cpu), LimitCPU",
            )
        infiniband = any(name.startswith("ib") for name in first.network.interfaces)
        if infiniband and it.locked_memory is not None and it.locked_memory < 64 << 20:
            yield fail(
                f"a process may lock {size(it.locked_memory)} of memory{where(job, first)}; InfiniBand "
                "needs it without a limit",
                "ulimit -l unlimited; under Slurm, LimitMEMLOCK=infinity in slurmd's unit",
            )
    it = job.first.machine
    yield ok(f"{it.open_files} open files, {it.processes} processes")


def folders(job: Job) -> Iterator[Finding]:
    """Temporary files and caches can be written."""
    for facts in job.leaders:
        it = facts.machine
        if it.tmp_error:
            yield fail(
                f"no temporary file can be made in {it.tmp}{where(job, facts)}: {it.tmp_error}",
                "set TMPDIR to a folder that exists and that you may write",
            )
        elif it.tmp_free < 256 << 20:
            yield warn(
                f"{it.tmp} has {size(it.tmp_free)} free{where(job, facts)}",
                "free some, or set TMPDIR to another folder",
            )
        if it.cache_error:
            yield warn(
                f"the cache {it.cache} cannot be written{where(job, facts)}: {it.cache_error}",
                "set DISTDL_CACHE (and HOME, or XDG_CACHE_HOME) to folders that you may write",
            )
    yield ok(f"{job.first.machine.tmp}, {job.first.machine.cache}")
