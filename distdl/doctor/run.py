"""The examination: alone, or together with the other processes of a started job."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distdl import errors
from distdl.doctor.checks import findings
from distdl.doctor.collect import collect, place_in
from distdl.doctor.collect.recipe import Asked
from distdl.doctor.collect.storage import (
    leave_mark,
    leave_note,
    marks,
    note,
    take_mark_away,
    take_note_away,
    trying,
)
from distdl.doctor.facts import Facts, Measured, Place
from distdl.doctor.finding import Finding
from distdl.doctor.measure import all_reduce, large_messages, stream
from distdl.doctor.meeting import Lost, Meeting
from distdl.errors import DistdlError
from distdl.topology import Topology

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

SEEN_S = 10.0
"""So late may a file that another node wrote appear: attributes are cached by NFS for some seconds."""
BEFORE_A_GROUP = ("processes", "torch", "rendezvous", "host names", "interfaces", "connections")
"""Where one of these fails, forming a process group would only wait for its time-out."""


@dataclass(frozen=True)
class Report:
    """What one process has to print. `findings` is None where rank 0 speaks for it, with exit code `code`."""

    findings: list[Finding] | None
    code: int
    label: str = ""


def examine(asked: Asked | None, env: Mapping[str, str], *, wait_s: float, fix: bool) -> Report:
    """Look at this machine; as one of several processes, compare with the others. All of them call it.

    Blocks for seconds; up to a few times `wait_s` where a process is missing.
    """
    topology, place = place_in(env)
    if asked is None or topology.world_size == 1 or topology.rank > 0:
        return _examine(asked, env, topology, place, wait_s=wait_s, fix=fix)
    leave_note(asked.directory.path, _target(topology))
    try:
        return _examine(asked, env, topology, place, wait_s=wait_s, fix=fix)
    finally:
        take_note_away(asked.directory.path)


def _target(topology: Topology) -> str:
    return f"{topology.master_addr}:{topology.master_port}"


def _examine(
    asked: Asked | None, env: Mapping[str, str], topology: Topology, place: Place, *, wait_s: float, fix: bool
) -> Report:
    mine = collect(env, topology, place, asked, wait_s=wait_s, fix=fix)
    if topology.world_size == 1:
        return report([mine])
    if why := _cannot_meet(mine):
        there = note(asked.directory.path) if asked and topology.rank > 0 else None
        if there is not None and there != _target(topology):
            network = mine.network.model_copy(update={"elsewhere": there})
            mine = mine.model_copy(update={"network": network})
        return report([mine], why)
    try:
        store = _store(topology, wait_s)
    except (RuntimeError, OSError, DistdlError) as error:
        return report([mine], str(error).partition("\n")[0])
    return examine_together(mine, asked, store, topology, wait_s)


def _store(topology: Topology, wait_s: float) -> Store:
    """Where the processes meet. In a thread: a program of another kind that listens there may never answer,
    and torch's client has no time-out for that. Raises what it raises, and TimeoutError.
    """
    from distdl.comm.world import rendezvous

    found: Future[Store] = Future()

    def meet() -> None:
        try:
            found.set_result(rendezvous(topology, wait_s))
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=meet, daemon=True).start()
    try:
        return found.result(2 * wait_s)
    except FutureTimeout:
        raise TimeoutError(
            f"what listens at {topology.master_addr}:{topology.master_port} does not answer as a run would: "
            "another program has the port, or rank 0 hangs"
        ) from None


def _cannot_meet(mine: Facts) -> str | None:
    torch, net = mine.software.torch, mine.network
    if torch.error or not torch.distributed:
        return "torch does not work here"
    return net.master_error or net.port_error


def report(facts: Sequence[Facts], alone: str | None = None) -> Report:
    """The findings, and the exit code that they mean. `alone`: why one process speaks for itself."""
    found = findings(facts)
    label = ""
    if alone is not None:
        label = f"[{facts[0].label}] "
        # What it says of the others is of no use then: that they did not answer, or have the same code.
        found = [f for f in found if f.check != "processes" and f.status in ("warn", "fail")] + [
            Finding("fail", f"could not compare with the other processes: {alone}", _ALONE, "processes")
        ]
    failed = any(f.status == "fail" for f in found)
    return Report(found, errors.ENVIRONMENT if failed else errors.DONE, label)


_ALONE = "mend what fails here first, then run the doctor again on all of them"


def examine_together(
    mine: Facts, asked: Asked | None, store: Store, topology: Topology, wait_s: float
) -> Report:
    """Collective: hand the facts to rank 0, which finds, prints, and tells the exit code to the others."""
    main = topology.rank == 0
    try:
        meeting = Meeting(store, main=main, world_size=topology.world_size, wait_s=wait_s)
        several = topology.nodes > 1  # on one machine nothing listens for it
        if several and (stuck := large_messages(meeting, mine.place.rank, mine.label, _address(mine))):
            mine = mine.model_copy(update={"network": mine.network.model_copy(update={"stuck": stuck})})
            if not main:
                return report([mine], "large messages do not get through to rank 0")
        told = meeting.gather("facts", mine.model_dump(mode="json"))
        facts = {number: Facts.model_validate(value) for number, value in told.items()}
        skew = meeting.clocks()
        seen = _share_marks(meeting, asked, mine)
        facts = {n: _with(f, skew.get(n, 0.0), seen.get(n)) for n, f in facts.items()}
        measured = _measure(meeting, facts, mine, store, topology, wait_s)
        facts = {n: f.model_copy(update={"measured": measured.get(n)}) for n, f in facts.items()}
        result = report(list(facts.values())) if main else None
        code = int(meeting.share("code", result.code if result else 0))
        meeting.gather("bye", None)  # the store goes with rank 0
    except Lost as error:
        return report([mine], f"rank 0 does not answer ({error})")
    return result or Report(None, code)


def _with(facts: Facts, skew: float, seen: Sequence[int] | None) -> Facts:
    network = facts.network.model_copy(update={"clock_skew": skew})
    storage = facts.storage.model_copy(update={"seen": None if seen is None else tuple(seen)})
    return facts.model_copy(update={"network": network, "storage": storage})


def _share_marks(meeting: Meeting, asked: Asked | None, mine: Facts) -> dict[int, list[int]]:
    """On rank 0: number -> the ranks whose files it found in its run directory. Nothing without a recipe."""
    if asked is None:
        return {}
    folder, rank = asked.directory.path, mine.place.rank
    token, ours = str(meeting.share("token", secrets.token_hex(6))), mine.storage.error is None
    try:
        if ours:  # two that take themselves for one rank leave one mark
            ours = trying(lambda: leave_mark(folder, token, rank)) is None
        left = meeting.gather("left", ours)
        expected = int(meeting.share("expected", sum(map(bool, left.values()))))
        seen = meeting.gather("seen", list(marks(folder, token, expected, SEEN_S)))
        meeting.share("seen-by-all")
    finally:
        take_mark_away(folder, token, rank)
    return seen


def _measure(
    meeting: Meeting, facts: dict[int, Facts], mine: Facts, store: Store, topology: Topology, wait_s: float
) -> dict[int, Measured]:
    """On rank 0: number -> what was measured; nothing where a process group could not be formed."""
    found = findings(list(facts.values())) if meeting.main else []
    sound = not any(f.status == "fail" and f.check in BEFORE_A_GROUP for f in found)
    if not meeting.share("sound", sound):
        return {}
    cuda = all(_has_gpu(f) for f in facts.values())
    far = _farthest(meeting.number, facts) if meeting.main else 0
    peer, cuda = meeting.share("peer", [far, cuda])
    line = stream(meeting, peer, _address(mine))
    summed = all_reduce(store, topology.rank, topology.world_size, topology.gpu, cuda=cuda, wait_s=wait_s)
    told = {n: Measured.model_validate(v) for n, v in meeting.gather("sum", summed.model_dump()).items()}
    if meeting.main:
        extra = {"stream": line.stream, "stream_error": line.stream_error, "peer": facts[peer].label}
        told[meeting.number] = told[meeting.number].model_copy(update=extra)
    return told


def _address(mine: Facts) -> str:
    """Where rank 0 is reached."""
    return mine.network.master_addresses[0] if mine.network.master_addresses else "127.0.0.1"


def _has_gpu(facts: Facts) -> bool:
    on_cpu = facts.wanted is not None and facts.wanted.device == "cpu"
    devices = facts.software.torch.devices
    return not on_cpu and (devices >= facts.place.local_world_size or (facts.place.own_gpu and devices > 0))


def _farthest(main: int, facts: dict[int, Facts]) -> int:
    """A process on another node, where there is one."""
    here = facts[main].place.node
    return max(facts, key=lambda n: (facts[n].place.node != here, n != main, n))
