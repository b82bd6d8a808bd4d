"""A request to stop is a flag. Ranks agree on it at a step boundary; nothing else happens in a handler."""

from __future__ import annotations

import os
import signal
from types import FrameType

from distdl import errors
from distdl.checkpoint.read import has_manifest, step_directories
from distdl.record import RunDirectory

# Under nohup a hang-up is ignored, and stays so.
_HANG_UP = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, *_HANG_UP)
"""The signals that ask a run to stop: a scheduler's, a person's, and a terminal that is closed."""


class StopFlag:
    """Set by SIGTERM, SIGUSR1, SIGHUP or SIGINT. Bare runs end at once on a second SIGINT; launched
    ones leave that to the launcher, since a terminal sends its Ctrl-C to them as well.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._interrupts = 0
        self._alone = True

    def install(self, *, alone: bool) -> None:
        """Take over the signals, and let in those that the launcher held back during the start."""
        self._alone = alone
        for number in REQUESTS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._alone and self._interrupts > 1:
            os._exit(130)
        self.signal = self.signal or signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """True once any of the signals has come."""
        return self.signal is not None


def code_of_a_stop(directory: RunDirectory) -> int:
    """The exit code of a run that is stopped while no worker trains: whether anything is saved decides."""
    saved = any(has_manifest(place) for place in step_directories(directory.checkpoints))
    return errors.STOPPED if saved else errors.STOPPED_BEFORE_START
