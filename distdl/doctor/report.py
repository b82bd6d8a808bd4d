"""Findings as lines for a person, and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from distdl.doctor.finding import ORDER, Finding
from distdl.doctor.run import Report

COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}
INDENT = 28


def show(report: Report, *, as_json: bool) -> None:
    """Print what a process has to say, if it has: a finding a line, below it what to do. The worst
    comes last, where it is read first.
    """
    if report.findings is None:
        return
    if as_json:
        print(as_text(report))  # noqa: T201
        return
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    for finding in sorted(report.findings, key=lambda f: ORDER.index(f.status), reverse=True):
        console.print(Text(report.label).append_text(line(finding)))
        if finding.todo:
            console.print(Text(f"{report.label}{' ' * INDENT}do: {finding.todo}"))
    console.print(Text(f"{report.label}{summary(report.findings)}"))
    sys.stdout.flush()


def line(finding: Finding) -> Text:
    """The status, the check, and what was found."""
    text = Text(f"{finding.status:<8}", style=COLOURS[finding.status])
    return text.append(f"{finding.check:<{INDENT - 8}}{finding.found}", style="default")


def summary(findings: Sequence[Finding]) -> str:
    """How many of each, the worst first, and what that means."""
    counts = {status: sum(f.status == status for f in findings) for status in ORDER}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    if counts["fail"]:
        return f"{told}: a run would fail here"
    return f"{told}: nothing that would make a run fail"


def as_text(report: Report) -> str:
    """One JSON object."""
    return json.dumps(
        {"exit_code": report.code, "findings": [f.as_dict() for f in report.findings or ()]}, indent=2
    )
