"""The checks by name, in the order in which they are shown, and `findings`, which runs them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from distdl.doctor.checks import communication, gpus, machine, network, processes, recipe, software, storage
from distdl.doctor.facts import Facts
from distdl.doctor.finding import Check, Finding, Job

CHECKS: dict[str, Check] = {
    "processes": processes.ranks,
    "Python": software.python,
    "distdl": software.distdl,
    "packages": software.packages,
    "your code": software.user_code,
    "torch": software.torch,
    "compiled ops": software.compiled_ops,
    "rendezvous": network.rendezvous,
    "host names": network.host_names,
    "interfaces": network.interfaces,
    "proxies": network.proxies,
    "clocks": network.clocks,
    "GPUs": gpus.visible,
    "GPU driver": gpus.driver,
    "GPUs idle": gpus.idle,
    "GPU settings": gpus.settings,
    "CPU cores": machine.cores,
    "threads": machine.threads,
    "arithmetic": machine.arithmetic,
    "memory": machine.memory,
    "shared memory": machine.shared_memory,
    "limits": machine.limits,
    "temporary files": machine.folders,
    "run directory": storage.run_directory,
    "shared directory": storage.shared,
    "disk space": storage.space,
    "checkpoint store": storage.store,
    "recipe": recipe.planned,
    "engine": recipe.engine,
    "connections": communication.connections,
    "all-reduce": communication.all_reduce,
}


def findings(facts: Sequence[Facts]) -> list[Finding]:
    """What every check says to the facts of all processes; at least one finding a check."""
    job = Job(facts)
    return [finding for name, check in CHECKS.items() for finding in run_check(name, check, job)]


def run_check(name: str, check: Check, job: Job) -> list[Finding]:
    """One check's findings under its name; what is in order is left out where something is not."""
    found = [Finding(f.status, f.found, f.todo, name) for f in check(job)]
    problems = [f for f in found if f.status in ("warn", "fail")]
    return problems or found
