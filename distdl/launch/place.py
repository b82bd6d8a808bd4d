"""Which of several nodes this is, and where they meet: what is typed after --nodes. Imports no torch."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass

from distdl.errors import PlanError
from distdl.topology import Agents

DEFAULT_PORT = 29400
"""torchrun's own."""


@dataclass(frozen=True)
class Endpoint:
    """A host, by name or address, and a port."""

    host: str
    port: int = DEFAULT_PORT

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read ``host``, ``host:port``, ``10.0.0.1:port``, ``[2001:db8::1]:port`` or a bare IPv6 address.

        Raises PlanError.
        """
        if _is_ipv6(text):
            return cls(text)
        bracketed = re.fullmatch(r"\[([^\[\]]+)\](?::(\d+))?", text)
        named = re.fullmatch(r"([^\s:\[\]]+)(?::(\d+))?", text)
        found = bracketed if bracketed and _is_ipv6(bracketed[1]) else named
        if found is None:
            raise PlanError(
                f"--rendezvous {text!r}: expected HOST:PORT, such as node01:29400, 10.0.0.1:29400 or "
                "[2001:db8::1]:29400"
            )
        port = int(found[2] or DEFAULT_PORT)
        if not 0 < port < 65536:
            raise PlanError(f"--rendezvous {text!r}: a port lies between 1 and 65535")
        return cls(found[1], port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text.partition("%")[0])
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Place:
    """Node `node` of `nodes`; `rendezvous` is where node 0 listens and the others come, None for one node."""

    node: int = 0
    nodes: int = 1
    rendezvous: Endpoint | None = None

    @classmethod
    def find(
        cls, nodes: int | None, node: int | None, rendezvous: str | None, env: Mapping[str, str]
    ) -> Place:
        """What was typed; where nothing was, what srun says in the environment.

        Raises PlanError, and EnvironmentProblem for a launcher inside a launcher.
        """
        typed = node is not None or rendezvous is not None
        agents = Agents.from_env(env, None if typed or "SLURM_STEP_ID" not in env else nodes)
        if typed or agents.nodes == 1:
            return cls.of(nodes or 1, node, rendezvous)
        return cls(agents.node, agents.nodes, Endpoint(agents.host, agents.port))

    @classmethod
    def of(cls, nodes: int, node: int | None, rendezvous: str | None) -> Place:
        """Check what was typed. Raises PlanError, saying what is missing."""
        if nodes == 1:
            if node:
                raise PlanError(f"--node-rank {node} with one node: nodes are numbered from 0")
            return cls()
        if node is None or rendezvous is None:
            missing = " and ".join(
                option for option, v in (("--node-rank", node), ("--rendezvous", rendezvous)) if v is None
            )
            raise PlanError(
                f"{nodes} nodes, and no {missing}: start one launcher on each node with --node-rank 0 to "
                f"{nodes - 1} and --rendezvous HOST:PORT, where HOST is the first node; or have all of them "
                "started, with --on ssh or --on slurm. For this machine alone: --nodes 1"
            )
        if not 0 <= node < nodes:
            raise PlanError(f"--node-rank {node} of {nodes} nodes: expected 0 to {nodes - 1}")
        return cls(node, nodes, Endpoint.parse(rendezvous))
