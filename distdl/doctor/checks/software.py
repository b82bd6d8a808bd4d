"""Is the same code installed everywhere, and does it work?"""

from __future__ import annotations

from collections.abc import Iterator

from distdl.capabilities import ENGINES
from distdl.doctor.facts import STALE_LOCK_S, Facts
from distdl.doctor.finding import Finding, Job, fail, groups, ok, skipped, spread, warn, where

SAME = "use the same environment on all nodes: one on a shared file system, or one container image"


def python(job: Job) -> Iterator[Finding]:
    """One minor version everywhere."""
    found = groups(job, lambda f: f.software.python.rpartition(".")[0])
    if len(found) > 1:
        yield fail(f"Python {spread(found)}", SAME)
    where_from = groups(job, lambda f: f.software.executable)
    if len(where_from) > 1:
        yield warn(f"interpreters {spread(where_from)}", SAME)
    yield ok(f"{job.first.software.python}, {job.first.software.executable}")


def distdl(job: Job) -> Iterator[Finding]:
    """The same files of distdl everywhere, and no second copy that another folder would have imported."""
    found = groups(job, lambda f: f.software.distdl_hash[:12])
    if len(found) > 1:
        paths = groups(job, lambda f: f.software.distdl_path)
        yield fail(f"distdl's own code differs: {spread(found)} ({spread(paths)})", SAME)
    for facts in job.leaders:
        if facts.software.copies:
            yield warn(
                f"distdl is imported from {facts.software.distdl_path}; there are others on the import path"
                f"{where(job, facts)}: {', '.join(facts.software.copies)}",
                "a process started in another folder may import another copy: take the others out of "
                "PYTHONPATH, or uninstall them",
            )
    yield ok(f"the same code everywhere, {job.first.software.distdl_path}")


def packages(job: Job) -> Iterator[Finding]:
    """The same versions of what computes, stores and communicates."""
    names = sorted({name for f in job.facts for name in f.software.packages})
    for name in names:
        found = groups(job, lambda f, name=name: f.software.packages.get(name, "none"))  # type: ignore[misc]
        if len(found) > 1:
            make = fail if name in ("deepspeed", "accelerate") else warn
            yield make(f"{name} {spread(found)}", SAME)
    yield ok(", ".join(f"{n} {v}" for n, v in sorted(job.first.software.packages.items())))


def user_code(job: Job) -> Iterator[Finding]:
    """The modules that the recipe names are the same files everywhere."""
    names = sorted({name for f in job.facts for name in f.software.user_code})
    if not names:
        yield skipped("the recipe names no code of yours" if job.wanted else "no recipe was given")
        return
    for name in names:
        found = groups(job, lambda f, name=name: f.software.user_code.get(name, "absent"))  # type: ignore[misc]
        if len(found) > 1:
            yield fail(
                f"the files of {name} differ: {spread(found)}",
                "copy the same files to all nodes, or start from a folder on a shared file system",
            )
    yield ok(f"{', '.join(names)}: the same everywhere")


def torch(job: Job) -> Iterator[Finding]:
    """It imports, can communicate, and is one version with one NCCL."""
    for facts in job.leaders:
        it = facts.software.torch
        if it.error:
            yield fail(
                f"torch does not import{where(job, facts)}: {it.error}",
                f"install it into this environment: {facts.software.executable} -m pip install torch"
                + (_OTHER_LIBRARIES if "LD_LIBRARY_PATH" in facts.env else ""),
            )
        elif not (it.distributed and it.gloo):
            lacks = "distributed" if not it.distributed else "gloo"
            yield fail(
                f"torch {it.version} was built without {lacks}{where(job, facts)}",
                "install a build for Linux from pytorch.org; processes cannot communicate without it",
            )
    for name, found in (
        ("torch", groups(job, lambda f: f.software.torch.version)),
        ("NCCL", groups(job, lambda f: f.software.torch.nccl)),
    ):
        if len(found) > 1:
            yield fail(f"{name} differs: {spread(found)}", SAME)
    it = job.first.software.torch
    build = f"CUDA {it.cuda}, NCCL {it.nccl}" if it.cuda else "for CPUs"
    yield ok(f"{it.version}, built {'for ' if it.cuda else ''}{build}")


_OTHER_LIBRARIES = ". LD_LIBRARY_PATH is set: without it, torch finds the libraries that it came with"


def compiled_ops(job: Job) -> Iterator[Finding]:
    """Nobody would wait for ever on the lock of a build that was killed; what compiles finds a compiler."""
    zero = job.wanted is not None and ENGINES[job.wanted.engine].library == "deepspeed"
    for facts in job.leaders:
        stale = {p: age for p, age in facts.software.build_locks.items() if age > STALE_LOCK_S}
        for path, age in stale.items():
            yield (fail if zero else warn)(
                f"a build that was killed {age / 3600:.1f} h ago left the lock {path}{where(job, facts)}: "
                "whatever compiles next waits for it for ever, without a word",
                "`distdl doctor --fix` removes it",
            )
        if zero and not (facts.software.compiler and facts.software.ninja):
            lacks = " and ".join(
                name
                for name, there in (
                    ("a C++ compiler", facts.software.compiler),
                    ("ninja", facts.software.ninja),
                )
                if not there
            )
            yield warn(
                f"DeepSpeed may compile ops, and {lacks} is missing{where(job, facts)}",
                "install g++ and `pip install ninja`, or give no keys in hardware.deepspeed that need ops",
            )
        if job.wanted is not None and job.wanted.compile:
            yield from _no_compiler(job, facts)
    removed = [path for f in job.facts for path in f.software.removed]
    yield ok(f"removed {', '.join(removed)}" if removed else "no lock of a killed build")


def _no_compiler(job: Job, facts: Facts) -> Iterator[Finding]:
    lacks = None if facts.software.compiler else "there is none"
    if facts.software.cxx:
        lacks = f"CXX={facts.software.cxx} is not there"
    if lacks:
        yield fail(
            f"hardware.compile needs a C++ compiler, and {lacks}{where(job, facts)}",
            "install one (g++) on the nodes, load its module in the job (launch.slurm.modules), unset CXX, "
            "or hardware.compile=false",
        )
