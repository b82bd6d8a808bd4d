"""What a run says while it waits for data: to the person at rank 0, and to events.jsonl from every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from distdl.record import RunDirectory


class Notices:
    """Called with one line of text, from any thread. Without a `directory`, no event is written."""

    def __init__(self, rank: int = 0, directory: RunDirectory | None = None) -> None:
        self._rank, self._directory = rank, directory
        self.say: Callable[[str], None] = _print if rank == 0 else _nothing
        """How rank 0 speaks; a run's console takes its place."""

    def __call__(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone, a full disk: no reason to fail
            self.say(text)
        with contextlib.suppress(OSError):
            if self._directory is not None and self._directory.path.is_dir():
                self._directory.event("data", rank=self._rank, message=text)


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _nothing(text: str) -> None:
    """The other ranks leave it to rank 0."""
