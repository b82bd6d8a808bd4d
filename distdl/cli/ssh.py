"""`distdl launch --on ssh`: a launcher on every host of a file. Imports no torch."""

from __future__ import annotations

import os
import random
import shlex
import sys

from distdl import errors
from distdl.errors import PlanError
from distdl.launch.place import Endpoint, Nodes
from distdl.launch.ssh.command import Launch, command_lines, environment
from distdl.launch.ssh.hostfile import read_hosts
from distdl.launch.ssh.run import run
from distdl.recipe import Recipe


def launch_over_ssh(
    recipe: Recipe,
    config: str,
    overrides: list[str],
    *,
    hostfile: str | None,
    nodes: Nodes | None,
    procs: int | None,
    rendezvous: str | None,
    dry_run: bool,
    allow_changed: bool,
) -> int:
    """Print the commands, or run them; returns the exit code of the run."""
    ssh = recipe.launch.ssh
    path = hostfile or ssh.hostfile
    if path is None:
        raise PlanError("--on ssh needs --hostfile FILE, with lines such as: node01 slots=8")
    hosts = read_hosts(path)
    wanted = nodes or Nodes.of(recipe)
    if wanted.elastic:
        raise PlanError(
            f"--nodes {wanted} (launch.min_nodes) with --on ssh: all hosts are needed there; start the "
            "launchers one by one (docs/several-nodes.md) for a run that goes on with those that are left"
        )
    if nodes is not None and nodes.most > len(hosts):
        raise PlanError(f"--nodes {nodes}: {path} has {len(hosts)} hosts")
    hosts = hosts[: nodes.most] if nodes else hosts
    if procs is None and recipe.launch.procs != "auto":
        procs = recipe.launch.procs
    # Below the ports that kernels hand out, and another for every run: two runs may share a host.
    port = random.SystemRandom().randrange(20000, 32000)
    launch = Launch(
        config=config,
        overrides=tuple(overrides),
        hosts=tuple(hosts),
        procs=procs,
        rendezvous=Endpoint.parse(rendezvous) if rendezvous else Endpoint(hosts[0].name, port),
        python=ssh.python or sys.executable,
        directory=ssh.directory or os.getcwd(),
        env=environment(os.environ, ssh.pass_env, ssh.env),
        client=ssh.client,
        allow_changed=allow_changed,
    )
    if dry_run:
        for words in command_lines(launch):
            print(shlex.join(words))  # noqa: T201
        return errors.DONE
    return run(launch)
