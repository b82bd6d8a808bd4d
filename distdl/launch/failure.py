"""`failure.json`: which rank failed first, of what, and where its story is."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distdl.launch.logs import tail
from distdl.record import Heartbeat, write_atomic

_CONSEQUENCE = 2


@dataclass(frozen=True)
class Casualty:
    """A worker that ended badly before the launcher ended the others. Negative `exitcode`: the signal."""

    rank: int
    pid: int
    exitcode: int


def write_failure(attempt: Path, casualties: Sequence[Casualty]) -> dict[str, Any]:
    """Choose the rank that failed first, write `failure.json` in the attempt's folder and return it.

    Ranks that report (failures/rank-NNNNN.json) are told apart from those that a signal ended. A lost
    connection is a consequence: the rank that died is the cause.
    """
    reports = {r["rank"]: r for r in map(_read, sorted((attempt / "failures").glob("rank-*.json")))}
    first = min(casualties, key=lambda c: _order(c, reports.get(c.rank)))
    report = reports.get(first.rank, {})
    step, phase, _ = Heartbeat.read(attempt / "heartbeat")
    log = attempt / "logs" / f"rank-{first.rank:05d}.log"
    place = attempt / "failure.json"
    if _order(first, report or None)[0] == _CONSEQUENCE and place.exists():
        return _read(place)  # of another node, where it began
    failure = {
        "rank": first.rank,
        "pid": first.pid,
        "cause": _cause(first, report),
        "step": step,
        "phase": phase,
        "time": time.time(),
        "traceback": report.get("traceback"),
        "log": str(log),
        "log_tail": tail(log),
        "all_failed": [{"rank": c.rank, "exitcode": c.exitcode} for c in casualties],
    }
    write_atomic(place, json.dumps(failure, indent=2) + "\n")
    return failure


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def _order(casualty: Casualty, report: dict[str, Any] | None) -> tuple[int, float]:
    if report is None:
        return (0, 0.0)
    return (_CONSEQUENCE if report["consequence"] else 1, report["time"])


def _cause(casualty: Casualty, report: dict[str, Any]) -> str:
    if report:
        return f"{report['exception']}: {report['message']}"
    if casualty.exitcode < 0:
        name = signal.Signals(-casualty.exitcode).name
        hint = " (out of memory, if nobody sent it: see the kernel's log)" if name == "SIGKILL" else ""
        return f"ended by {name}{hint}"
    return f"ended with exit code {casualty.exitcode}"
