"""The command for each host: a pure function. Every value is data, quoted for the shell it passes through."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from distdl.launch.place import Endpoint
from distdl.launch.ssh.hostfile import Host

OPTIONS = (
    *("-T", "-o", "BatchMode=yes"),  # nobody is there to type a password
    *("-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"),
)


@dataclass(frozen=True)
class Launch:
    """What is started on every host: the recipe's file and overrides as typed, and where it runs.

    `procs` is for hosts without slots; None leaves the number to each.
    """

    config: str
    overrides: tuple[str, ...]
    hosts: tuple[Host, ...]
    procs: int | None
    rendezvous: Endpoint
    python: str
    directory: str
    env: Mapping[str, str]
    client: tuple[str, ...] = ("ssh",)
    allow_changed: bool = False


def command_lines(launch: Launch) -> list[list[str]]:
    """The words of each node's ssh client; node 0 is the first."""
    return [
        [*launch.client, *OPTIONS, host.login, remote_line(launch, node)]
        for node, host in enumerate(launch.hosts)
    ]


def remote_line(launch: Launch, node: int) -> str:
    """What the host's shell is given. A folder that is not there is a problem of the environment: 3."""
    # env, and not the shell: a variable's name need not be one of the shell's.
    variables = [f"{name}={value}" for name, value in launch.env.items()]
    words = ["env", "--", *variables, *agent(launch, node)]
    return f"cd -- {shlex.quote(launch.directory)} || exit 3; exec {shlex.join(words)}"


def agent(launch: Launch, node: int) -> list[str]:
    """The launcher of one node."""
    procs = launch.hosts[node].slots or launch.procs
    each = ["--procs", str(procs)] if procs else []
    place = ["--nodes", str(len(launch.hosts)), "--node-rank", str(node), *each]
    meeting = ["--rendezvous", str(launch.rendezvous), "--heed-stdin"]
    changed = ["--allow-changed"] if launch.allow_changed else []
    command = [launch.python, "-m", "distdl", "launch", *place, *meeting, *changed]
    return [*command, "--", launch.config, *launch.overrides]


def environment(here: Mapping[str, str], patterns: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """The variables for the hosts: those here that match a pattern, and over them those that are given."""
    passed = {n: v for n, v in sorted(here.items()) if any(fnmatchcase(n, p) for p in patterns)}
    return {**passed, **given}
