"""Can this recipe run here?"""

from __future__ import annotations

from collections.abc import Iterator

from distdl.capabilities import ENGINES
from distdl.doctor.finding import Finding, Job, fail, groups, listed, ok, skipped, spread, where


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
    yield from _data(job, job.wanted.recipe)
    for kind in ("plan_error", "code_error"):
        for problem, at in _told(job, kind):
            yield fail(f"{job.wanted.recipe}{at}: {problem}", "see what the message says, and `distdl plan`")
    if job.wanted.changed:
        yield fail(
            f"the run directory {job.first.storage.run} holds checkpoints of another recipe or of other "
            "data, and a run would not go on from them; what differs (checkpoint -> now): "
            f"{'; '.join(job.wanted.changed)}",
            "choose another run.dir, undo the change, or continue with --allow-changed",
        )
    yield ok(f"{job.wanted.recipe} plans for {job.world_size} process(es), its data are there")


def _data(job: Job, recipe: str) -> Iterator[Finding]:
    """They are there on every node, and the same."""
    missing = _told(job, "data_error")
    fingerprints = groups(job, lambda f: f.wanted.data if f.wanted else None)
    there = [host for data, hosts in fingerprints.items() if data is not None for host in hosts]
    everywhere = (
        "copy the data to the same path on every node, or name a folder that all nodes mount (data.path)"
    )
    for problem, at in missing:
        if there:
            found = f"the data are there on {listed(there)}, and not everywhere: {problem}"
            yield fail(f"{recipe}{at}: {found}", everywhere)
        else:
            yield fail(f"{recipe}{at}: {problem}", "see what the message says, and `distdl plan`")
    if not missing and len(fingerprints) > 1:
        yield fail(f"{recipe}: the data differ between nodes: {spread(fingerprints)}", everywhere)


def _told(job: Job, kind: str) -> list[tuple[str, str]]:
    """The errors of one kind, and the nodes that have each; no node where all have it."""
    found = groups(job, lambda f: getattr(f.wanted, kind, None))
    return [(p, f" on {listed(hosts)}" * (len(found) > 1)) for p, hosts in found.items() if p is not None]


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
