"""Do the processes reach each other on any port, and as fast as the link allows?"""

from __future__ import annotations

from collections.abc import Iterator

from distdl.doctor.finding import Finding, Job, fail, ok, skipped, warn

LINK_SHARE, STREAM_SHARE = 0.2, 0.1
"""Least share of the link's speed, or of a plain connection's, that an all-reduce should reach. Low, so that
a machine that does something else at the same time raises no alarm."""


def connections(job: Job) -> Iterator[Finding]:
    """A port that nobody has opened in a firewall is reachable: gloo and NCCL choose theirs freely."""
    measured = job.first.measured
    stuck = ", ".join(job.first.network.stuck.values())
    if stuck:
        longest = {n: it.mtu for n, it in job.first.network.interfaces.items() if it.up and not it.loopback}
        told = ", ".join(f"{name} {mtu}" for name, mtu in longest.items())
        yield fail(
            f"between {job.first.label} and {stuck} small messages pass and large ones never arrive: "
            f"something on the way drops long packets (MTU on {job.first.place.host}: {told})",
            "give the interface the MTU that every switch on the way carries (ip link set dev IFACE mtu "
            "1500), on all nodes, or have the switches pass jumbo frames",
        )
    elif measured is None or not (measured.stream or measured.stream_error):
        yield skipped(_why(job))
    elif measured.stream_error:
        yield fail(
            f"{measured.peer} does not get through to {job.first.place.host} on a free port: "
            f"{measured.stream_error}",
            "gloo and NCCL connect processes on ports of the system's choice (sysctl "
            "net.ipv4.ip_local_port_range): let these ports through between the nodes, in the firewall of "
            "each (iptables, nftables) or the cloud's security group",
        )
    else:
        yield ok(f"{_rate(measured.stream or 0)} from {measured.peer} over one plain TCP connection")


def all_reduce(job: Job) -> Iterator[Finding]:
    """All processes sum a tensor, beside what the link should give."""
    measured = job.first.measured
    answers = ((f.label, f.measured.all_reduce_error) for f in job.facts if f.measured)
    errors = [f"{label}: {error}" for label, error in answers if error]
    if errors:
        yield fail(
            f"an all-reduce over all {job.world_size} processes failed: {errors[0]}",
            "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the interface between the nodes; with GPUs, "
            "NCCL_DEBUG=INFO says more",
        )
        return
    if measured is None or not measured.all_reduce:
        yield skipped(_why(job))
        return
    rates = {n: bus_rate(n, s, job.world_size) for n, s in measured.all_reduce.items()}
    best, smallest = max(rates.values()), min(measured.all_reduce)
    told = (
        f"{_rate(best)} with {measured.backend} over {job.world_size} processes, "
        f"{measured.all_reduce[smallest] * 1e3:.2g} ms for {smallest / 1024:.0f} KiB"
    )
    link = _link(job)
    if link:
        told += f"; the slowest link that is known gives {_rate(link)}"
    elif measured.stream:
        told += f"; one plain TCP connection gives {_rate(measured.stream)}"
    least = LINK_SHARE * link if link else STREAM_SHARE * (measured.stream or 0)
    if best < least:
        yield warn(
            f"the link between the processes is slow: {told}",
            "check that the fast interface is used (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_IB_HCA), "
            "that nothing else uses it, and its cable and switch (ethtool IFACE)",
        )
    yield ok(told)


def bus_rate(nbytes: int, seconds: float, world_size: int) -> float:
    """Bytes a second that each link carries in an all-reduce: 2 (n-1)/n of the tensor has to pass
    (nccl-tests, doc/PERFORMANCE.md, "bus bandwidth").
    """
    return 2 * (world_size - 1) / world_size * nbytes / seconds


def _link(job: Job) -> float | None:
    """Bytes a second of the slowest node's fastest physical interface, where all nodes tell theirs."""
    if not job.several_nodes:
        return None
    speeds = [
        max((it.speed_mbps or 0 for it in f.network.interfaces.values() if it.up), default=0)
        for f in job.leaders
    ]
    return min(speeds) * 1e6 / 8 or None


def _why(job: Job) -> str:
    return "a single process" if job.world_size == 1 else "left out: what fails here would make it fail too"


def _rate(nbytes: float) -> str:
    """Bytes a second for a person, also in the bits that a link is sold by."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB/s"
    return f"{nbytes / 1e6:.3g} MB/s ({nbytes * 8 / 1e6:.3g} Mbit/s)"
