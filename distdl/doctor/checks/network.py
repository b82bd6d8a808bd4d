"""Can the processes find each other, and over which interface?"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from urllib.parse import urlsplit

from distdl.doctor.facts import Facts, Interface
from distdl.doctor.finding import Finding, Job, fail, groups, listed, ok, skipped, spread, warn, where

NAMED = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
UNSET = (
    "unset MASTER_ADDR (srun hands on what a start-up file or a script has set; without it the first node of "
    "the step is taken), or "
)
SKEW_S, SIGNED_S = 2.0, 900.0
"""From where logs of several nodes are out of order, and from where object stores refuse a request."""


def rendezvous(job: Job) -> Iterator[Finding]:
    """MASTER_ADDR resolves, to this machine for rank 0; MASTER_PORT is free there, and open to the others."""
    if job.world_size == 1:
        yield skipped("a single process meets nobody")
        return
    for facts in job.facts:
        yield from _rendezvous_of(job, facts)
    net = job.first.network
    different = groups(job, lambda f: f"{f.network.master_addr}:{f.network.master_port}")
    if len(different) > 1:
        yield fail(
            f"MASTER_ADDR and MASTER_PORT differ: {spread(different)}",
            "give all processes the address of rank 0's machine and the same port",
        )
    yield ok(f"at {net.master_addr}:{net.master_port}")


def _rendezvous_of(job: Job, facts: Facts) -> Iterator[Finding]:
    net, place = facts.network, facts.place
    given, set_it = f"MASTER_ADDR={net.master_addr}", ""
    if place.launcher == "srun" and "MASTER_ADDR" in facts.env:
        set_it = UNSET
    elif place.launcher == "srun":
        given = f"{net.master_addr}, the first node of the step,"
    target = f"{net.master_addr}:{net.master_port}"
    if net.master_error:
        yield fail(
            f"{given} does not resolve for {facts.label}: {net.master_error}",
            f"{set_it}put the name into DNS or into /etc/hosts of every node, or give an IP address",
        )
    elif net.port_error and place.rank == 0:
        yield fail(
            f"rank 0 cannot listen at {target}: MASTER_PORT {net.port_error}",
            "choose another port (MASTER_PORT, torchrun --master-port), or end that process if it is left "
            "over from an earlier run",
        )
    elif net.port_error and net.elsewhere:
        yield fail(
            f"MASTER_PORT is not the same for all: rank 0 listens at {net.elsewhere}, and {facts.label} "
            f"looks for it at {target}",
            "give all processes one MASTER_PORT: set it once, before srun and not in what every task runs, "
            "or unset it, and srun's tasks find one by themselves",
        )
    elif net.port_error:
        addresses = ", ".join(net.master_addresses)
        known = "" if net.master_addr == addresses else f" (which {place.host} resolves to {addresses})"
        yield fail(
            f"{facts.label} cannot reach {target}{known}: {net.port_error}",
            f"{set_it}check that rank 0 runs, that this is the address of its machine (if not: /etc/hosts "
            f"and DNS on {place.host}), and that no firewall stands between "
            f"(from {place.host}: nc -vz {net.master_addr} {net.master_port})",
        )
    elif place.rank == 0 and not net.master_local:
        (make, extent) = (warn, "if that is not a forwarded address, ") if job.several_nodes else (fail, "")
        yield make(
            f"{given} ({', '.join(net.master_addresses)}) is no address of {place.host}, where rank 0 runs",
            f"{extent}{set_it}set MASTER_ADDR to the host name of rank 0's machine",
        )
    if (
        place.world_size > place.local_world_size
        and not net.master_error
        and all_loopback(net.master_addresses)
    ):
        yield fail(
            f"{given} is a loopback address ({', '.join(net.master_addresses)}) for "
            f"{facts.label}: only processes of one machine meet there, and there are "
            f"{place.world_size} with {place.local_world_size} on this one",
            f"{set_it}set MASTER_ADDR to a name or address of rank 0's machine that the others can reach",
        )


def host_names(job: Job) -> Iterator[Finding]:
    """Every host's own name leads to an address that the others can reach: gloo offers that to them."""
    for facts in job.leaders:
        net, host = facts.network, facts.place.host
        chosen = "GLOO_SOCKET_IFNAME" in facts.env
        if net.host_error and not chosen:
            make = fail if job.several_nodes else warn
            yield make(
                f"the host name {host} does not resolve on {host} itself: {net.host_error}",
                f"add it to DNS or /etc/hosts, or set GLOO_SOCKET_IFNAME to one of {offered(job, facts)}",
            )
        elif job.several_nodes and not chosen and not net.host_local:
            yield fail(
                f"the host name of {facts.label} leads to {', '.join(net.host_addresses)}, which is no "
                f"address of its machine: gloo would offer the others its loopback address",
                f"give it a host name of its own, or map {host} to its own network address in /etc/hosts, or "
                f"set GLOO_SOCKET_IFNAME to one of {offered(job, facts)}",
            )
        elif job.several_nodes and not chosen and all_loopback(net.host_addresses):
            yield fail(
                f"the host name {host} is {', '.join(net.host_addresses)} on {host} itself: gloo would offer "
                "that address to the other nodes",
                f"map {host} to its network address in /etc/hosts, or set GLOO_SOCKET_IFNAME to one of "
                f"{offered(job, facts)}",
            )
    twice = [h for h in {f.place.host for f in job.leaders} if _nodes_called(job, h) > 1]
    if twice:
        yield warn(
            f"several nodes call themselves {', '.join(sorted(twice))}",
            "give each a host name of its own: messages that name a host would mislead",
        )
    yield ok("; ".join(f"{f.place.host} is {', '.join(f.network.host_addresses)}" for f in job.leaders[:4]))


def _nodes_called(job: Job, host: str) -> int:
    return sum(f.place.host == host for f in job.leaders)


def interfaces(job: Job) -> Iterator[Finding]:
    """What the variables name is there, up, and no loopback where nodes have to reach each other."""
    for facts in job.leaders:
        for variable in NAMED:
            if variable in facts.env:
                yield from _named_interface(job, facts, variable, facts.env[variable])
    yield from _same_address(job)
    yield ok("; ".join(f"{named(f.network.interfaces)}{where(job, f)}" for f in job.leaders[:4]))


def _same_address(job: Job) -> Iterator[Finding]:
    """An interface such as docker0 leads to what is on its own machine, and has one address on all."""
    held: dict[tuple[str, str], list[Facts]] = {}
    for facts in job.leaders:
        value = facts.env.get(NAMED[0], "")
        for name in matching(value, facts.network.interfaces, prefixes=False)[:1]:
            it = facts.network.interfaces[name]
            if it.address and not it.loopback:
                held.setdefault((name, it.address), []).append(facts)
    for (name, address), holders in held.items():
        if len(holders) > 1:
            yield fail(
                f"{NAMED[0]}={name} has the same address, {address}, on "
                f"{listed([f.place.host for f in holders])}: each would offer the others an address at which "
                "they find themselves (a bridge for containers, say)",
                f"set {NAMED[0]} to the interface between the nodes, or unset it: there are "
                f"{offered(job, holders[0])}",
            )


def _named_interface(job: Job, facts: Facts, variable: str, value: str) -> Iterator[Finding]:
    there = facts.network.interfaces
    at_all = f"set {variable} to one of {offered(job, facts)}, or unset it"
    chosen = matching(value, there, prefixes=variable.startswith("NCCL"))
    if not chosen:
        yield fail(f"{variable}={value} names no interface of {facts.place.host}", at_all)
        return
    usable = [name for name in chosen if there[name].up]
    if not usable:
        yield fail(f"{variable}={value}: {', '.join(chosen)} is down on {facts.place.host}", at_all)
    elif job.several_nodes and all(there[name].loopback for name in usable):
        yield fail(
            f"{variable}={value} is loopback, and there are {len(job.nodes)} nodes: they cannot reach each "
            f"other over it ({facts.place.host})",
            at_all,
        )


def matching(value: str, there: dict[str, Interface], *, prefixes: bool) -> list[str]:
    """The interfaces that a variable's value means. gloo: a name, or several between commas. NCCL: prefixes
    too, `=` before an exact name, `^` before what is left out.
    """
    words = [word.strip() for word in value.lstrip("^=").split(",")]
    if not prefixes:
        return [name for name in words if name in there]
    exact = value.startswith(("=", "^="))
    hit = [n for n in there if any(n == w if exact else n.startswith(w) for w in words)]
    if value.startswith("^"):
        return [n for n in there if n not in hit and not there[n].loopback]
    return hit


def named(there: dict[str, Interface]) -> str:
    """The interfaces that are up."""
    return ", ".join(name for name, it in there.items() if it.up) or "none"


def offered(job: Job, facts: Facts) -> str:
    """The interfaces to choose from: over loopback several nodes do not reach each other."""
    there = facts.network.interfaces
    return named({name: it for name, it in there.items() if not (job.several_nodes and it.loopback)})


def all_loopback(addresses: tuple[str, ...]) -> bool:
    """Whether there are addresses, and all of them lead back to the machine that asks."""
    return bool(addresses) and all(ipaddress.ip_address(a.partition("%")[0]).is_loopback for a in addresses)


def proxies(job: Job) -> Iterator[Finding]:
    """No proxy stands between this machine and its own servers."""
    for facts in job.leaders:
        env = {name.lower(): value for name, value in facts.env.items()}
        proxy = env.get("http_proxy") or env.get("all_proxy")
        spared = [word.strip() for word in env.get("no_proxy", "").split(",")]
        endpoint = env.get("aws_endpoint_url_s3") or env.get("aws_endpoint_url")
        host = urlsplit(endpoint).hostname if endpoint else None
        if proxy and host and "*" not in spared and _inside(host) and not _spares(spared, host):
            yield fail(
                f"requests to AWS_ENDPOINT_URL={endpoint} go to the proxy {proxy}{where(job, facts)}, which "
                "cannot reach it",
                f"set no_proxy={','.join([*filter(None, spared), host])}",
            )
    yield ok("none in the way")


def _inside(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or "." not in host


def _spares(spared: list[str], host: str) -> bool:
    return any(host == word or (word and host.endswith("." + word.lstrip("."))) for word in spared)


def clocks(job: Job) -> Iterator[Finding]:
    """All nodes tell the same time, and no time before that of files that exist."""
    remote = job.wanted is not None and "://" in (job.first.storage.store or "")
    for facts in job.leaders:
        skew = facts.network.clock_skew
        if abs(skew) > SKEW_S:
            side = "ahead of" if skew > 0 else "behind"
            make = fail if remote and abs(skew) > SIGNED_S else warn
            yield make(
                f"the clock of {facts.place.host} is {abs(skew):.0f} s {side} that of {job.first.place.host}",
                "let NTP set it (timedatectl set-ntp true): logs are out of order, and object stores refuse "
                "requests signed at another time",
            )
        behind = facts.machine.newest_file - facts.machine.clock
        if behind > 86400:
            yield warn(
                f"the clock of {facts.place.host} is {behind / 86400:.0f} days before the newest file of "
                "distdl",
                "let NTP set it (timedatectl set-ntp true): certificates of servers are not valid yet",
            )
    worst = max(abs(f.network.clock_skew) for f in job.facts)
    yield ok(f"within {worst:.3f} s of each other" if job.several_nodes else "later than all files")
