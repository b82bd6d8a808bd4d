"""Standard input as the line to whoever started this launcher from another machine."""

from __future__ import annotations

import os
import signal
import threading

NAMES = ("TERM", "INT", "USR1", "HUP")


def heed_stdin() -> None:
    """Take each line of standard input as the name of a signal to this process from now on, its end as TERM.

    ssh passes on neither signals nor its own death; the end of what it sends is seen in any case.
    """
    threading.Thread(target=_heed, name="distdl-heed", daemon=True).start()


def _heed() -> None:
    with open(0, "rb", buffering=0, closefd=False) as lines:
        for line in lines:
            name = line.strip().decode(errors="replace")
            if name in NAMES:
                os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
    os.kill(os.getpid(), signal.SIGTERM)
