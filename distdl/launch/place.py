"""Which of several nodes this is, and where they meet: what is typed after --nodes. Imports no torch."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass

from distdl.errors import PlanError
from distdl.recipe import Recipe
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
class Nodes:
    """How many machines a run has: `most`, and where `fewest` is given, what is there of them."""

    most: int = 1
    fewest: int | None = None

    @classmethod
    def parse(cls, text: str) -> Nodes:
        """Read ``4``, or ``1:4``. Raises PlanError."""
        found = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
        least, most = (int(found[1] or found[2]), int(found[2])) if found else (0, 0)
        if not 0 < least <= most:
            raise PlanError(
                f"--nodes {text}: expected how many machines, such as 4, or the fewest and the most with "
                "which the run goes on, such as 1:4"
            )
        return cls(most, least if least < most else None)

    @classmethod
    def of(cls, recipe: Recipe) -> Nodes:
        """What a recipe says."""
        return cls(recipe.launch.nodes, recipe.launch.min_nodes)

    @property
    def elastic(self) -> bool:
        """Whether the run may have fewer than asked for."""
        return self.fewest is not None

    @property
    def least(self) -> int:
        """With how many the run begins and goes on."""
        return self.fewest or self.most

    def __str__(self) -> str:
        return f"{self.fewest}:{self.most}" if self.elastic else str(self.most)


@dataclass(frozen=True)
class Place:
    """Node `node` of `nodes`; `rendezvous` is where node 0 listens and the others come, None for one node.

    `fewest`: with how many of the nodes the run begins and goes on; None: with all.
    """

    node: int = 0
    nodes: int = 1
    rendezvous: Endpoint | None = None
    fewest: int | None = None

    @classmethod
    def find(
        cls, nodes: Nodes | None, node: int | None, rendezvous: str | None, env: Mapping[str, str]
    ) -> Place:
        """What was typed; where nothing was, what srun says in the environment: of a range, what it got.

        Raises PlanError, and EnvironmentProblem for a launcher inside a launcher.
        """
        typed = node is not None or rendezvous is not None
        wanted = None if typed or nodes is None or "SLURM_STEP_ID" not in env else nodes
        agents = Agents.from_env(env, None if wanted is None or wanted.elastic else wanted.most)
        if wanted is not None and not wanted.least <= agents.nodes <= wanted.most:
            raise PlanError(f"--nodes {wanted}, and srun started {agents.nodes}")
        if typed or (agents.nodes == 1 and wanted is None):
            return cls.of(nodes or Nodes(), node, rendezvous)
        if agents.nodes == 1:
            return cls()
        fewest = wanted.fewest if wanted is not None and wanted.least < agents.nodes else None
        return cls(agents.node, agents.nodes, Endpoint(agents.host, agents.port), fewest)

    @classmethod
    def of(cls, asked: Nodes, node: int | None, rendezvous: str | None) -> Place:
        """Check what was typed. Raises PlanError, saying what is missing."""
        nodes = asked.most
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
        return cls(node, nodes, Endpoint.parse(rendezvous), asked.fewest)
