"""Can this recipe run here?"""

from __future__ import annotations

from collections.abc import Iterator

from distdl.capabilities import ENGINES
from distdl.doctor.finding import Finding, Job, fail, groups, ok, skipped, spread, where


def planned(job: Job) -> Iterator[Finding]:
    """It plans for this many processes, its data are there, and all nodes read the same one."""
    if job.wanted is None:
        yield skipped("no recipe was given: `distdl doctor RECIPE` checks what it needs")
        return
    hashes = groups(job, lambda f: f.wanted.hash if f.wanted else "none")
    if len(hashes) > 1:
        yield fail(
            f"nodes read different recipes: {spread(hashes)}",
            "give all processes the same file and the same overrides",
        )
    for facts in job.leaders:
        wanted = facts.wanted
        if wanted is None:
            continue
        at = where(job, facts)
        for problem in (wanted.data_error, wanted.plan_error, wanted.code_error):
            if problem:
                yield fail(f"{wanted.recipe}{at}: {problem}", "see what the message says, and `distdl plan`")
    yield ok(f"{job.wanted.recipe} plans for {job.world_size} process(es), its data are there")


def engine(job: Job) -> Iterator[Finding]:
    """The library of hardware.engine is installed on every node."""
    if job.wanted is None:
        yield skipped("no recipe was given")
        return
    library = ENGINES[job.wanted.engine].library
    for facts in job.leaders:
        if library and library not in facts.software.packages:
            yield fail(
                f"engine {job.wanted.engine} needs {library}, which is not installed{where(job, facts)}",
                f"pip install 'distdl[{library}]', or hardware.engine=ddp",
            )
    yield ok(f"{job.wanted.engine}" + (f", {library} is installed" if library else ""))
