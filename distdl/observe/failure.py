"""What a failing rank leaves behind, and how a cause is told from its consequences."""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from typing import Any

from distdl.record import RunDirectory, write_atomic

_SECONDARY = ("PeerFailed", "DistBackendError", "DistNetworkError", "DistStoreError")
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")


def is_consequence(error: BaseException) -> bool:
    """True for an error that tells of another rank's death: a lost connection, or a peer's report."""
    if type(error).__name__ in _SECONDARY:
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER)


def report_failure(directory: RunDirectory, rank: int, error: BaseException) -> dict[str, Any]:
    """Write this rank's report to failures/ in the newest attempt; returns it. No collective."""
    attempt = max((p for p in directory.attempts.iterdir() if p.name.isdigit()), default=None)
    report = {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "exception": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "consequence": is_consequence(error),
        "time": time.time(),
    }
    if attempt is not None:  # it may fail before it has one
        (attempt / "failures").mkdir(exist_ok=True)
        write_atomic(attempt / "failures" / f"rank-{rank:05d}.json", json.dumps(report, indent=2) + "\n")
    return report
