"""What a person sees: a progress bar on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class RunConsole:
    """Rank 0 speaks; a quiet one says nothing. Lines go to standard output, and so into the rank's log."""

    def __init__(self, total_steps: int, *, quiet: bool, terminal: IO[str] | None = None) -> None:
        self._quiet = quiet
        self._total = total_steps
        self._progress: Progress | None = None
        screen = terminal if terminal is not None else sys.stdout
        if not quiet and screen.isatty():
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=Console(file=screen),
                transient=True,
                redirect_stdout=False,  # standard output also goes to the rank's log
                redirect_stderr=False,
            )
            self._bar = self._progress.add_task("", total=total_steps)
            self._progress.start()

    def say(self, text: str) -> None:
        """One line for the person at the keyboard."""
        if self._quiet:
            return
        if self._progress is None:
            print(text, flush=True)  # noqa: T201
            return
        self._progress.console.print(text, markup=False, highlight=False)  # above the bar
        log = getattr(sys.stdout, "log", None)
        if log is not None:
            log.write(text + "\n")

    def step(self, step: int, row: Mapping[str, Any] | None) -> None:
        """Called after every step; `row` on logging steps only."""
        if self._progress is not None:
            self._progress.update(self._bar, completed=step)
        if row is None or self._quiet:
            return
        text = f"loss {row['loss']:.4f}  lr {row['lr']:.3g}  {row['samples_per_s']:,.0f} samples/s"
        if self._progress is not None:
            self._progress.update(self._bar, description=text)
        else:
            self.say(
                f"step {step}/{self._total}  epoch {row['epoch']:.2f}  {text}  ETA {_clock(row['eta_s'])}"
            )

    def close(self) -> None:
        """Take the bar away, so that later lines stand on a clean terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def table(title: str, rows: Mapping[str, Any]) -> Table:
    """Two columns, a name and a value a row."""
    grid = Table(title=title, show_header=False, title_justify="left")
    grid.add_column(style="bold")
    grid.add_column()
    for name, value in rows.items():
        grid.add_row(name, str(value))
    return grid


def show(title: str, rows: Mapping[str, Any], paths: Mapping[str, Any] | None = None) -> None:
    """Print `table` on standard output, and `paths` below it, each whole on a line, to be copied."""
    Console(file=sys.stdout).print(table(title, rows))
    for name, path in (paths or {}).items():
        print(f"{name}: {path}")  # noqa: T201
    sys.stdout.flush()


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
