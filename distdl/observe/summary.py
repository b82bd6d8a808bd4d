"""The table at the end of a run, read from the run directory."""

from __future__ import annotations

from typing import Any

from distdl.observe.console import show
from distdl.record import RunDirectory, read_lines


def summary(directory: RunDirectory) -> dict[str, Any]:
    """Name -> value of a finished run: its last evaluation, best metric, throughput."""
    done = [e for e in read_lines(directory.events) if e["event"] == "done"]
    rows: dict[str, Any] = {}
    if done:
        last = done[-1]
        rows = {f"test {k}": f"{float(v):.4f}" for k, v in last["metrics"].items()}
        if last["best"] is not None:
            rows[f"best {last['metric']}"] = f"{float(last['best']):.4f} at step {last['best_step']}"
        rows["steps"] = last["step"]
        rows["throughput"] = f"{last['samples_per_s']:,.0f} samples/s with {last['world_size']} processes"
        rows["training time"] = f"{last['seconds']:.1f} s in the last attempt"
    return rows


def show_summary(directory: RunDirectory) -> None:
    """Print `summary` as a table, and where the run lies."""
    show("finished", summary(directory), {"run directory": directory.path})
