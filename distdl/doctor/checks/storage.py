"""Is the run directory one and the same for all, and does it keep what is written?"""

from __future__ import annotations

from collections.abc import Iterator

from distdl.doctor.finding import Finding, Job, fail, ok, size, skipped, warn, where

ANOTHER = "choose another with run.dir=PATH"
SMALL = 1 << 30
"""Room below which a disk counts as full where no checkpoint says how large one is."""


def run_directory(job: Job) -> Iterator[Finding]:
    """It can be written; a rename replaces, fsync and locks work: a checkpoint relies on them."""
    for facts in job.leaders:
        it, at = facts.storage, where(job, facts)
        if it.error:
            yield fail(f"the run directory {it.run} cannot be written{at}: {it.error}", ANOTHER)
        for what, error, why in (
            ("rename a folder", it.rename_error, "a checkpoint appears by a rename"),
            ("fsync", it.fsync_error, "a checkpoint would not survive a power failure"),
        ):
            if error:
                yield fail(f"{it.run} ({it.filesystem}) cannot {what}{at}: {error}", f"{why}: {ANOTHER}")
        if it.in_use and facts is job.first:
            yield fail(
                f"the run directory {it.run} is in use by {it.in_use}: a run that is started now is refused",
                f"wait for it, stop it (under Slurm: squeue --me, scancel), or {ANOTHER}",
            )
        if it.lock_error:
            yield fail(
                f"{it.run} ({it.filesystem}) cannot be locked{at}: {it.lock_error}",
                f"mount it with locks (NFS: start rpc.lockd, no `nolock`; Lustre: -o flock), or {ANOTHER}",
            )
        if abs(it.clock_skew) > 2:
            yield warn(
                f"the server of {it.run} is {it.clock_skew:+.0f} s off the clock{where(job, facts)}",
                "let NTP set both",
            )
    yield ok(f"{job.first.storage.run} ({job.first.storage.filesystem}): rename, fsync and locks work")


def shared(job: Job) -> Iterator[Finding]:
    """What one process writes into it, all others see."""
    looked = [f for f in job.facts if f.storage.seen is not None]
    if job.world_size == 1 or not looked:
        yield skipped("a single process" if job.world_size == 1 else "the processes could not compare")
        return
    wrote = {f.place.rank for f in looked if f.storage.error is None}
    for facts in looked:
        missing = sorted(wrote - set(facts.storage.seen or ()))
        if missing and facts.storage.error is None:
            others = [f for f in looked if f.place.rank in missing]
            yield fail(
                f"the run directory is not shared: {facts.label} does not see in {facts.storage.run} what "
                f"rank {', '.join(map(str, missing[:4]))} wrote in {others[0].storage.run} on "
                f"{others[0].place.host}",
                "choose a folder on a file system that all nodes mount, by its whole path: run.dir=/shared/"
                "NAME. Checkpoints alone may go to an object store: checkpoint.dir=s3://BUCKET/NAME",
            )
            return  # the other ranks would say the same of this one
    yield ok(f"all {len(looked)} processes see what each wrote")


def space(job: Job) -> Iterator[Finding]:
    """Room for the checkpoints that are kept, and one more that is being written."""
    wanted = job.wanted
    if job.first.storage.error:
        yield skipped("the run directory cannot be written")
        return
    it = min((f.storage for f in job.leaders), key=lambda s: s.free)
    local = wanted is None or it.store is None or "://" not in it.store
    if wanted and wanted.save and local and it.free < wanted.save * (wanted.keep + 1):
        make = fail if it.free < wanted.save else warn
        yield make(
            f"{size(it.free)} free at {it.run}; the last checkpoint took {size(wanted.save)}, and "
            f"checkpoint.keep={wanted.keep} with the one being written takes up to "
            f"{size(wanted.save * (wanted.keep + 1))}",
            "free some, or lower checkpoint.keep",
        )
    elif it.free < SMALL:
        make = fail if it.free < SMALL // 10 else warn
        yield make(
            f"{size(it.free)} free at {it.run}", "free some, lower checkpoint.keep, or set run.dir=PATH"
        )
    if it.free_files is not None and it.free_files < 1000:
        yield fail(
            f"the file system of {it.run} has room for {it.free_files} more files (inodes)",
            f"remove some files, or {ANOTHER}",
        )
    yield ok(f"{size(it.free)} free at {it.run}")


def store(job: Job) -> Iterator[Finding]:
    """The place that checkpoint.dir names answers."""
    if job.wanted is None or job.first.storage.store is None:
        yield skipped("no checkpoint.dir was given" if job.wanted else "no recipe was given")
        return
    for facts in job.leaders:
        if facts.storage.store_error:
            yield fail(
                f"checkpoint.dir={facts.storage.store} cannot be used{where(job, facts)}: "
                f"{facts.storage.store_error}",
                "check the address (for S3: AWS_ENDPOINT_URL), the credentials and the bucket; leave "
                "checkpoint.dir out to keep checkpoints in the run directory",
            )
    yield ok(f"{job.first.storage.store} answers")
