"""`Finding`: what a check has to say. `Job`: what all processes told, as checks ask for it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from distdl.doctor.facts import Facts, Wanted

Status = Literal["ok", "warn", "fail", "skipped"]
ORDER: tuple[Status, ...] = ("fail", "warn", "skipped", "ok")
"""The worst first."""


@dataclass(frozen=True)
class Finding:
    """`status`: "fail" where a run will fail, "warn" where it may, or is slower than it could be.

    `check` is filled in by whoever runs the check. `todo` says what a person does about it.
    """

    status: Status
    found: str
    todo: str = ""
    check: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def ok(found: str) -> Finding:
    """All is well; left out where the same check also has something to complain of."""
    return Finding("ok", found)


def warn(found: str, todo: str) -> Finding:
    """It may go wrong, or is slower than it could be."""
    return Finding("warn", found, todo)


def fail(found: str, todo: str) -> Finding:
    """A run will fail."""
    return Finding("fail", found, todo)


def skipped(why: str) -> Finding:
    """It could not be looked at, or there is nothing to look at."""
    return Finding("skipped", why)


class Job:
    """The facts of all processes that answered, by rank."""

    def __init__(self, facts: Sequence[Facts]) -> None:
        self.facts = sorted(facts, key=lambda f: f.place.rank)
        self.first = self.facts[0]
        self.world_size = self.first.place.world_size

    @property
    def wanted(self) -> Wanted | None:
        """What the recipe asks for, as rank 0 has read it; None without a recipe."""
        return self.first.wanted

    @property
    def nodes(self) -> dict[str, list[Facts]]:
        """Node -> its processes, in order of rank."""
        found: dict[str, list[Facts]] = {}
        for facts in self.facts:
            found.setdefault(facts.place.node, []).append(facts)
        return found

    @property
    def leaders(self) -> list[Facts]:
        """The first process of each node: what is the same for all processes of a node is told once."""
        return [processes[0] for processes in self.nodes.values()]

    @property
    def several_nodes(self) -> bool:
        """Whether processes have to find each other over a network."""
        return len(self.nodes) > 1


Check = Callable[[Job], Iterator[Finding]]


def where(job: Job, facts: Facts) -> str:
    """`" on HOST"` where there are several nodes, nothing otherwise."""
    return f" on {facts.place.host}" if job.several_nodes else ""


def groups(job: Job, value: Callable[[Facts], Any]) -> dict[Any, list[str]]:
    """Value -> the nodes that have it, the commonest first. A value of one process counts for its node."""
    found: dict[Any, list[str]] = {}
    for facts in job.facts:
        hosts = found.setdefault(value(facts), [])
        if facts.place.host not in hosts:
            hosts.append(facts.place.host)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def spread(found: dict[Any, list[str]]) -> str:
    """`groups` in words: "2.6.0 on node0, node2; 2.5.1 on node1", long lists cut."""
    return "; ".join(f"{value} on {listed(hosts)}" for value, hosts in found.items())


def listed(hosts: Sequence[str]) -> str:
    """The names of nodes, a long list cut."""
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")


def size(nbytes: float) -> str:
    """Bytes for a person."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if nbytes >= 1 << power:
            return f"{nbytes / (1 << power):.3g} {unit}"
    return f"{nbytes / 1024:.3g} KiB"
