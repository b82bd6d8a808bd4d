"""Sockets between nodes: name, address, interface, and what to check where one of them is in the way."""

from __future__ import annotations

import array
import errno
import fcntl
import ipaddress
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from distdl.errors import EnvironmentProblem
from distdl.launch.place import Endpoint

LOST_AFTER_S = 30
"""A connection whose other end has not answered the kernel's probes for so long is given up."""

_RESOLVE_S = 30.0  # names of machines that are just being started may come late
_SAY_AFTER_S = 5.0
_SIOCGIFCONF = 0x8912  # linux/sockios.h
_IFREQ = 40  # bytes of a struct ifreq on 64-bit Linux


def resolve(at: Endpoint, say: Callable[[str], None]) -> list[str]:
    """The addresses of the host, in the order to try them. Blocks for at most 30 s.

    Raises EnvironmentProblem where the name is not known here.
    """
    end, told = time.monotonic() + _RESOLVE_S, False
    while True:
        try:
            found = socket.getaddrinfo(at.host, at.port, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(str(address[0]) for *_, address in found))
        except socket.gaierror as error:
            problem = (
                f"the rendezvous host {at.host!r} does not resolve on {socket.gethostname()} "
                f"({error.strerror}): check its spelling, and DNS or /etc/hosts on this machine, or give its "
                f"address, as in --rendezvous 10.0.0.1:{at.port}"
            )
        if time.monotonic() > end:
            raise EnvironmentProblem(problem)
        if not told:
            say(f"waiting: {problem}")
            told = True
        time.sleep(0.5)


def listen(at: Endpoint, address: str) -> socket.socket:
    """A socket that listens at that address alone. Raises EnvironmentProblem."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, at.port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise EnvironmentProblem(_why_not(at, address, error)) from error
    return listener


def _why_not(at: Endpoint, address: str, error: OSError) -> str:
    here = socket.gethostname()
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {at.port} of {at.host} ({address}) is in use on {here}, by another run perhaps (see "
            "`ss -ltnp`): choose another on every node, as in --rendezvous "
            f"{Endpoint(at.host, at.port % 65535 + 1)}; in a job of Slurm, MASTER_PORT (launch.slurm.env)"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        own = ", ".join(address for _, address in addresses_here())
        return (
            f"node 0 listens at the rendezvous, and {at.host} ({address}) is no address of {here}, which has "
            f"{own}: start node 0 on {at.host}, or give an address of this machine on every node"
        )
    return f"cannot listen at {at} ({address}) on {here}: {error.strerror or error}"


def connect(at: Endpoint, addresses: list[str], limit_s: float, say: Callable[[str], None]) -> socket.socket:
    """A connection to the first address that answers. Tries again until `limit_s` is over: node 0 may start
    later. Raises EnvironmentProblem.
    """
    began, told = time.monotonic(), False
    while True:
        for address in addresses:
            found = _dial(address, at.port)
            if isinstance(found, socket.socket):
                return keep_alive(found)
            problem = _no_way(at, address, found)
        waited = time.monotonic() - began
        if waited > limit_s:
            raise EnvironmentProblem(f"{problem}. Gave up after {limit_s:g} s (launch.timeout_s)")
        if not told and waited > _SAY_AFTER_S:
            say(f"waiting: {problem}")
            told = True
        time.sleep(0.2)


def _dial(address: str, port: int) -> socket.socket | OSError:
    try:
        return socket.create_connection((address, port), timeout=5.0)
    except OSError as error:
        return error


def _no_way(at: Endpoint, address: str, error: OSError) -> str:
    here = socket.gethostname()
    if isinstance(error, ConnectionRefusedError):
        return (
            f"node 0 does not listen at {at} ({address}), says a connection from {here} (refused): is it "
            f"started, with the same --rendezvous, and is {at.host} the same machine for both (/etc/hosts)? "
            f"A firewall may refuse too; try `nc -vz {at.host} {at.port}`"
        )
    return (
        f"no way from {here} to node 0 at {at} ({address}): {error.strerror or error}. Is the host up, and "
        f"does a firewall let TCP port {at.port} through, and those above 1024 for training itself? Try "
        f"`ping {at.host}` and `nc -vz {at.host} {at.port}`"
    )


def keep_alive(connection: socket.socket) -> socket.socket:
    """Have the kernel probe the other end, so that a machine that is gone ends the connection."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        for option, value in (
            (socket.TCP_KEEPIDLE, LOST_AFTER_S // 3),
            (socket.TCP_KEEPINTVL, LOST_AFTER_S // 6),
            (socket.TCP_KEEPCNT, 4),
            (socket.TCP_USER_TIMEOUT, LOST_AFTER_S * 1000),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.settimeout(None)
    return connection


def is_a_trap(at: Endpoint, address: str) -> bool:
    """Whether a name means this machine itself on every machine: Debian gives its own name 127.0.1.1."""
    return ipaddress.ip_address(address).is_loopback and at.host not in ("localhost", address)


def interface_towards(at: Endpoint, address: str) -> str | None:
    """The network interface that traffic to the address leaves by; None where that cannot be found out."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, at.port))  # sends nothing: asks the kernel for the route
        except OSError:
            return None
        own = str(probe.getsockname()[0])
    return next((interface for interface, held in addresses_here() if held == own), None)


def addresses_here() -> list[tuple[str, str]]:
    """(interface, address) of every address of this machine."""
    return [*_ipv4(), *_ipv6()]


def _ipv4() -> list[tuple[str, str]]:
    room = array.array("B", bytes(_IFREQ * 256))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        asked = struct.pack("iL", len(room), room.buffer_info()[0])
        used = struct.unpack("iL", fcntl.ioctl(probe.fileno(), _SIOCGIFCONF, asked))[0]
    data = room.tobytes()[:used]
    rows = [data[i : i + _IFREQ] for i in range(0, used, _IFREQ)]
    # A second address of eth0 is listed under a label such as eth0:1.
    return [(r[:16].partition(b"\0")[0].decode().partition(":")[0], socket.inet_ntoa(r[20:24])) for r in rows]


def _ipv6() -> list[tuple[str, str]]:
    table = Path("/proc/net/if_inet6")
    rows = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
    return [(row[5], str(ipaddress.IPv6Address(int(row[0], 16)))) for row in rows]
