"""Are the GPUs there, free, and understood by torch?"""

from __future__ import annotations

from collections.abc import Iterator

from distdl.doctor.facts import Facts
from distdl.doctor.finding import Finding, Job, fail, listed, ok, size, skipped, warn, where

DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580, 0)}
"""CUDA's major version -> the oldest Linux driver that runs it: "CUDA Toolkit and minimum required driver
version for CUDA minor version compatibility" in NVIDIA's CUDA Toolkit release notes."""
BUSY = 1 << 30
"""Memory in use on a GPU that is more than the driver's own."""
LEFT_OVER = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE", "CUDA_LAUNCH_BLOCKING")
"""Switches for finding an error, which cost speed where they are left on."""


def visible(job: Job) -> Iterator[Finding]:
    """CUDA_VISIBLE_DEVICES names GPUs that exist, one for each process of the node."""
    if not any(f.gpus.present for f in job.facts) and not _wants_cuda(job):
        yield skipped("no NVIDIA GPU here")
        return
    without = [f.place.host for f in job.leaders if f.gpus.present == 0]
    if _wants_cuda(job) and without:
        yield fail(
            "hardware.device is cuda, and there is no GPU" + f" on {listed(without)}" * job.several_nodes,
            "use hardware.device=cpu, or ask for GPUs (under Slurm: launch.slurm.gpus, srun --gres=gpu:N)",
        )
    for processes in job.nodes.values():
        yield from _visible_on(job, processes)
    cards = job.first.gpus.cards
    yield ok(f"{job.first.gpus.present} x {cards[0].name if cards else 'GPU'}")


def _visible_on(job: Job, processes: list[Facts]) -> Iterator[Finding]:
    first, here = processes[0], len(processes)
    at, present = where(job, first), first.gpus.present
    if first.gpus.error:
        yield fail(
            f"nvidia-smi fails{at}: {first.gpus.error}",
            "the driver is not loaded or does not match its library: reboot, or install it anew",
        )
    for facts in processes:
        asked = [d.strip() for d in facts.env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
        wrong = [d for d in asked if d.isdigit() and int(d) >= present]
        twice = sorted({d for d in asked if asked.count(d) > 1})
        if (wrong or twice) and present:
            what = f"GPU {', '.join(wrong)}, which is not there" if wrong else f"GPU {twice[0]} twice"
            yield fail(
                f"CUDA_VISIBLE_DEVICES={','.join(asked)} names {what}{at}",
                f"name GPUs 0 to {present - 1} once each, or unset it",
            )
            return
    names = {f.env.get("CUDA_VISIBLE_DEVICES") for f in processes}
    devices = first.software.torch.devices
    if first.place.own_gpu:
        return
    if len(names) == 1 and here > 1 and 0 < devices < here:
        yield fail(
            f"{here} processes share {devices} GPU(s){at}: NCCL refuses two on one",
            f"start {devices} processes a node, or use hardware.device=cpu",
        )
    elif len(names) < here and None not in names and here > 1 and devices == 1:
        yield fail(
            f"several processes were given the same GPU{at}: CUDA_VISIBLE_DEVICES={sorted(map(str, names))}",
            "give each process its own, or all of them all (srun --gpus-per-task=1 with --gpu-bind=none)",
        )


def driver(job: Job) -> Iterator[Finding]:
    """torch was built for CUDA, and for one that the driver can run."""
    for facts in job.leaders:
        torch, gpus, at = facts.software.torch, facts.gpus, where(job, facts)
        hidden = facts.env.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
        on_cpu = job.wanted is not None and job.wanted.device == "cpu"
        if not gpus.present or torch.version is None:
            continue
        if torch.cuda is None:
            make = warn if hidden or on_cpu else fail
            yield make(
                f"there are {gpus.present} GPU(s){at}, and torch {torch.version} is built without CUDA",
                "install a build with CUDA (pytorch.org), or use hardware.device=cpu",
            )
        elif gpus.driver and torch.devices == 0 and too_old(gpus.driver, torch.cuda):
            yield fail(
                f"the driver {gpus.driver} is too old for CUDA {torch.cuda}, which torch {torch.version} was "
                f"built for{at}",
                f"update the driver to {_needed(torch.cuda)} or newer, or install a torch for an older CUDA",
            )
        elif torch.cuda_error and not hidden:
            yield fail(
                f"torch cannot use the GPUs{at}: {torch.cuda_error}",
                "check that driver and library match (nvidia-smi), and that the container was started with "
                "GPUs (docker --gpus all)",
            )
    drivers = {f.gpus.driver for f in job.leaders if f.gpus.driver}
    if len(drivers) > 1:
        yield warn(f"drivers differ between nodes: {', '.join(sorted(drivers))}", "install the same on all")
    yield ok(f"driver {job.first.gpus.driver}") if drivers else skipped("no NVIDIA GPU here")


def too_old(driver: str, cuda: str) -> bool:
    """Whether a driver cannot run programs built for a version of CUDA."""
    least = DRIVERS.get(int(cuda.partition(".")[0]))
    have = tuple(int(part) for part in driver.split(".")[:2] if part.isdigit())
    return least is not None and have < least


def _needed(cuda: str) -> str:
    return ".".join(map(str, DRIVERS[int(cuda.partition(".")[0])]))


def idle(job: Job) -> Iterator[Finding]:
    """Nobody else holds memory of the GPUs."""
    cards = [(f, card) for f in job.leaders for card in f.gpus.cards]
    if not cards:
        yield skipped("no NVIDIA GPU that can be asked")
        return
    for facts, card in cards:
        held = sum(card.others.values())
        if card.others:
            who = ", ".join(f"process {pid} ({size(n)})" for pid, n in card.others.items())
            yield warn(
                f"GPU {card.index}{where(job, facts)} is in use by {who}",
                f"end it if it is yours and left over (kill {next(iter(card.others))}), or choose other GPUs "
                "in CUDA_VISIBLE_DEVICES",
            )
        elif card.used > BUSY and not held:
            yield warn(
                f"GPU {card.index}{where(job, facts)} has {size(card.used)} in use, by nobody that is "
                "seen from here",
                "another container or user has it: end that, or choose other GPUs in CUDA_VISIBLE_DEVICES",
            )
    yield ok(f"{len(cards)} with nobody on them")


def settings(job: Job) -> Iterator[Finding]:
    """No switch that was turned on to find an error is still on."""
    if not any(f.gpus.present for f in job.facts):
        yield skipped("no NVIDIA GPU here")
        return
    for facts in job.leaders:
        for name in LEFT_OVER:
            if facts.env.get(name, "0") not in ("0", ""):
                yield warn(
                    f"{name}={facts.env[name]} is set{where(job, facts)}, which slows things down",
                    f"unset {name}, unless this machine needs it",
                )
    yield ok("nothing unusual in NCCL's variables")


def _wants_cuda(job: Job) -> bool:
    return job.wanted is not None and job.wanted.device == "cuda"
