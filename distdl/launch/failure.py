"""`failure.json`: which rank failed first, of what, and where its story is."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distdl.launch.logs import tail
from distdl.record import write_atomic


@dataclass(frozen=True)
class Casualty:
    """A worker that ended badly before the launcher ended the others. Negative `exitcode`: the signal."""

    rank: int
    pid: int
    exitcode: int


def find_failure(attempt: Path, casualties: Sequence[Casualty], node: int) -> dict[str, Any]:
    """What failed first among this node's ranks, and all that is known of it, as plain values.

    Ranks that report (failures/rank-NNNNN.json) are told apart from those that a signal ended. A lost
    connection is a consequence: the rank that died is the cause.
    """
    reports = {r["rank"]: r for r in map(_read, sorted((attempt / "failures").glob("rank-*.json")))}
    first = min(casualties, key=lambda c: _order(reports.get(c.rank)))
    report = reports.get(first.rank, {})
    log = attempt / "logs" / f"rank-{first.rank:05d}.log"
    return {
        "rank": first.rank,
        "node": node,
        "host": socket.gethostname(),
        "pid": first.pid,
        "cause": _cause(first, report),
        "time": time.time(),
        "traceback": report.get("traceback"),
        "log": str(log),
        "log_tail": tail(log),
        "all_failed": [{"rank": c.rank, "exitcode": c.exitcode} for c in casualties],
        "order": _order(report or None),
    }


def first_failure(failures: Sequence[dict[str, Any]], step: int, phase: str) -> dict[str, Any]:
    """Of what failed first on each node, what failed first of all; `step` and `phase`: where the run was."""
    first = min(failures, key=lambda f: tuple(f["order"]))
    everyone = sorted((each for f in failures for each in f["all_failed"]), key=lambda each: each["rank"])
    known = {name: value for name, value in first.items() if name != "order"}
    return known | {"step": step, "phase": phase, "all_failed": everyone}


def lost_node(node: int, host: str | None, ranks: Sequence[int]) -> dict[str, Any]:
    """The failure of a node that is gone with all its `ranks`, which are none before the first attempt; for
    `first_failure`, of which it is the cause of all others.
    """
    names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    who = f"node {node}{f' ({host})' if host else ''}{f' with {names}' if ranks else ''}"
    cause = f"{who} is lost: its launcher ended or cannot be reached"
    return {
        "node": node,
        "host": host,
        "cause": cause,
        "time": time.time(),
        "rank": None,
        "pid": None,
        "traceback": None,
        "log": None,
        "log_tail": "",
        "all_failed": [],
        "order": (-1, 0.0),
    }


def write_failure(attempt: Path, failure: dict[str, Any]) -> None:
    """Write `failure.json` in the attempt's folder."""
    write_atomic(attempt / "failure.json", json.dumps(failure, indent=2) + "\n")


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def _order(report: dict[str, Any] | None) -> tuple[int, float]:
    if report is None:
        return (0, 0.0)
    return (2 if report["consequence"] else 1, report["time"])


def _cause(casualty: Casualty, report: dict[str, Any]) -> str:
    if report:
        return f"{report['exception']}: {report['message']}"
    if casualty.exitcode < 0:
        name = signal.Signals(-casualty.exitcode).name
        hint = " (out of memory, if nobody sent it: see the kernel's log)" if name == "SIGKILL" else ""
        return f"ended by {name}{hint}"
    return f"ended with exit code {casualty.exitcode}"
