"""The `distdl` command. Parses, calls, and maps errors to exit codes; see errors.py for those."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Console entry point. Ends the process with the command's exit code."""
    if len(sys.argv) > 1 and sys.argv[1].startswith("--local_rank="):
        del sys.argv[1]  # DeepSpeed's launcher inserts it, and says the same in the environment
    if len(sys.argv) > 1 and sys.argv[1] in ("launch", "train"):
        # Until their own handlers stand, a request to stop ends these commands as "nothing to save".
        for number, code in ((signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)):
            signal.signal(number, lambda *_, code=code: os._exit(code))
    from distdl.cli.commands import run

    sys.exit(run())
