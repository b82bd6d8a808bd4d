"""The file of hosts, in DeepSpeed's format: a host a line, such as ``node01 slots=8``. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distdl.errors import PlanError


@dataclass(frozen=True)
class Host:
    """A machine: the name that ssh is given, with a user before an @ or without, and its processes."""

    login: str
    slots: int | None = None

    @property
    def name(self) -> str:
        """The host alone, without its user and without brackets."""
        return self.login.rpartition("@")[2]


def read_hosts(path: str) -> list[Host]:
    """The hosts of a file, in its order; node 0 is the first. Raises PlanError, naming each line at fault."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"the hostfile {path} cannot be read: {error}") from error
    return parse_hosts(text, path)


def parse_hosts(text: str, path: str) -> list[Host]:
    """The hosts in the text of a file; `path` is for the messages. Raises PlanError."""
    found: dict[str, int] = {}
    hosts, problems = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host = _host(words)
        if isinstance(host, str):
            problems.append(f"{path}:{number}: {host}")
        elif host.name in found:
            problems.append(f"{path}:{number}: {host.name} stands in line {found[host.name]} already")
        else:
            found[host.name] = number
            hosts.append(host)
    if not hosts and not problems:
        problems.append(f"{path}: no host in it; expected lines such as: node01 slots=8")
    if problems:
        raise PlanError("\n".join(problems))
    return hosts


def _host(words: Sequence[str]) -> Host | str:
    """The host of a line, or what is wrong with it."""
    login, slots = re.sub(r"\[([0-9A-Fa-f:.]+)\]$", r"\1", words[0]), None
    # What begins with a hyphen would be an option of ssh.
    if not re.fullmatch(r"([\w.][\w.+-]*@)?[\w.:][\w.:%-]*", login, re.ASCII):
        return f"{words[0]!r} is no host: expected a name or an address, with USER@ before it or without"
    for word in words[1:]:
        given = re.fullmatch(r"slots=([1-9]\d{0,3})", word)
        if given is None or slots is not None:
            return f"{word!r}: expected slots=N after the host, once, N processes of at least 1"
        slots = int(given[1])
    return Host(login, slots)
