"""Are the processes those that the launcher meant to start?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from distdl.doctor.finding import Finding, Job, fail, groups, ok, spread

LAUNCHERS = (
    "start all processes with one launcher (`distdl launch`, torchrun, srun), which sets RANK, WORLD_SIZE "
    "and LOCAL_RANK, and unset those that a shell or a script has set"
)


def ranks(job: Job) -> Iterator[Finding]:
    """Ranks are there once each, and all count the same world."""
    for facts in job.facts:
        if facts.place.error:
            yield fail(f"{facts.place.host}: {facts.place.error}", LAUNCHERS)
    worlds = groups(job, lambda f: f.place.world_size)
    if len(worlds) > 1:
        told = ", ".join(f"{f.place.world_size} for rank {f.place.rank}" for f in job.facts[:8])
        yield fail(f"WORLD_SIZE differs: {told}", LAUNCHERS)
    times = Counter(f.place.rank for f in job.facts)
    for rank, count in times.items():
        if count > 1:
            hosts = ", ".join(f.place.host for f in job.facts if f.place.rank == rank)
            often = "twice" if count == 2 else f"{count} times"
            yield fail(f"rank {rank} was started {often}: on {hosts}", LAUNCHERS)
    absent = sorted(set(range(job.world_size)) - set(times) - set(job.first.network.stuck))
    if absent:
        shown = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
        yield fail(
            f"of {job.world_size} processes {len(absent)} did not answer: rank {shown}",
            "look at what those processes printed; where they printed nothing they were not started, or "
            "cannot reach the machine of rank 0",
        )
    users = groups(job, lambda f: f.place.user)
    if len(users) > 1:
        yield fail(f"processes run as different users: {spread(users)}", "start all of them as the same user")
    yield ok(f"{len(job.facts)} on {len(job.nodes)} node(s), started by {_launcher(job)}")


def _launcher(job: Job) -> str:
    return "hand" if job.first.place.launcher == "none" else job.first.place.launcher
