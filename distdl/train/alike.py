"""That all ranks were given the same: what differs between nodes trains what nobody wrote down."""

from __future__ import annotations

import hashlib
import socket
import sys
from pathlib import Path

from distdl.comm import World
from distdl.errors import DistdlError


def alike(world: World, what: str, value: str, error: type[DistdlError], todo: str) -> None:
    """Collective. Raise `error` on all ranks where one has another `value` than rank 0: it "has `what`"."""
    told = world.gather([value, socket.gethostname()])
    first, main = told[0]
    for rank, (other, host) in enumerate(told):
        if other != first:
            raise error(
                f"[rank {rank}/{world.size} on {host}] has {what} than rank 0 on {main} ({other}, and there "
                f"{first}). {todo}"
            )


def code_hash(*things: object) -> str:
    """Of the Python files that the classes of these objects are written in. What is installed is left out,
    and distdl itself: `distdl doctor` compares their versions.
    """
    names = {type(thing).__module__ for thing in things}
    whole = hashlib.sha256()
    for name in sorted(n for n in names if n.partition(".")[0] != "distdl"):
        path = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        installed = {"site-packages", "dist-packages"} & set(path.parts)
        if path.suffix == ".py" and path.is_file() and not installed:
            whole.update(name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    return whole.hexdigest()[:16]
