"""Interfaces, names, and whether the rendezvous can be reached."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import time
from pathlib import Path

from distdl.doctor.facts import Interface, Network
from distdl.topology import Topology

SYS, PROC = Path("/sys/class/net"), Path("/proc")
LISTENING = "0A"
_SIOCGIFFLAGS, _SIOCGIFADDR, _SIOCGIFMTU = 0x8913, 0x8915, 0x8921  # linux/sockios.h


def network_here(topology: Topology, wait_s: float) -> Network:
    """The network as this process sees it; waits up to `wait_s` seconds for rank 0 to listen."""
    host_addresses, host_error = addresses_of(socket.gethostname())
    given, port = topology.master_addr, topology.master_port
    master_addresses, master_error = addresses_of(given) if given else ((), None)
    port_error = None
    if topology.world_size > 1 and port is not None and master_addresses:
        if topology.agent_store or topology.rank > 0:
            port_error = cannot_reach(master_addresses[0], port, wait_s)
        else:
            port_error = cannot_listen(port)
    return Network(
        interfaces=interfaces_here(),
        host_addresses=host_addresses,
        host_error=host_error,
        host_local=not host_addresses or any(map(is_local, host_addresses)),
        master_addr=given,
        master_port=port,
        master_addresses=master_addresses,
        master_error=master_error,
        master_local=not master_addresses or any(map(is_local, master_addresses)),
        port_error=port_error,
    )


def interfaces_here() -> dict[str, Interface]:
    """Name -> interface, as the kernel tells it to this process; Linux. (What a container sees of /sys may be
    the machine's.)
    """
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as it:
        for _, name in sorted(socket.if_nameindex(), key=lambda pair: pair[1]):
            with contextlib.suppress(OSError):
                (flags,) = struct.unpack("H", _asked(it, _SIOCGIFFLAGS, name)[:2])
                address = None
                with contextlib.suppress(OSError):
                    address = socket.inet_ntoa(_asked(it, _SIOCGIFADDR, name)[4:8])
                found[name] = Interface(
                    up=bool(flags & 1),
                    loopback=bool(flags & 8),
                    speed_mbps=_speed(SYS / name),
                    mtu=struct.unpack("i", _asked(it, _SIOCGIFMTU, name)[:4])[0],
                    address=address,
                )
    return found


def _asked(it: socket.socket, what: int, name: str) -> bytes:
    """What the kernel writes behind the name into a struct ifreq (linux/if.h). Raises OSError."""
    return fcntl.ioctl(it, what, struct.pack("16s24x", name.encode()))[16:]


def _speed(path: Path) -> int | None:
    # A virtual interface makes up a figure; one that is down has none.
    if (path / "device").exists():
        with contextlib.suppress(OSError, ValueError):
            return max(0, int((path / "speed").read_text())) or None
    return None


def addresses_of(name: str) -> tuple[tuple[str, ...], str | None]:
    """The addresses of a name, and why there are none."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:  # socket.gaierror is one
        return (), error.strerror or str(error)
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found)), None


def is_local(address: str) -> bool:
    """Whether a socket of this machine can have an address."""
    with socket.socket(_family(address), socket.SOCK_STREAM) as it:
        try:
            it.bind((address, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def cannot_listen(port: int) -> str | None:
    """Why nobody can listen on a port of this machine: who does already. None where one can."""
    # Not socket.has_ipv6, which is what Python was built with: the kernel may have none.
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as it:
        it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            it.bind(("", port))
            it.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"{port} is in use by {holder(port)}"
            return f"{port}: {error.strerror or error}"
    return None


def cannot_reach(address: str, port: int, wait_s: float) -> str | None:
    """Why a port does not answer within `wait_s` seconds; None as soon as it does."""
    end = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, end - time.monotonic())).close()
            return None
        except OSError as error:
            if time.monotonic() >= end:
                waited = f"for {wait_s:.0f} s"
                if isinstance(error, TimeoutError):
                    return f"no answer {waited}: packets are dropped, or the machine is off"
                return f"{error.strerror or error} {waited}"
        time.sleep(0.1)  # rank 0 listens once it has looked at its own machine


def holder(port: int) -> str:
    """The process that listens on a port of this machine, from Linux's /proc, for a person to read."""
    inodes = set()
    for table in ("net/tcp", "net/tcp6"):
        with contextlib.suppress(OSError):
            rows = [line.split() for line in (PROC / table).read_text().splitlines()[1:]]
            inodes |= {r[9] for r in rows if r[3] == LISTENING and int(r[1].rpartition(":")[2], 16) == port}
    links = {f"socket:[{inode}]" for inode in inodes}
    for process in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(fd) in links for fd in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                return f"process {process.name} ({' '.join(command.split())[:80]})"
    return "a process of another user"


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
