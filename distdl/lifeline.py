"""No orphans: a process that dies when its parent does, by whatever cause."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(*, init_is_fine: bool = False) -> None:
    """Have the kernel send this process SIGKILL when its parent ends (Linux; elsewhere it does nothing).

    If the parent is gone already, this process ends here. `init_is_fine`: a parent that is process 1 is no
    sign of that, since the command itself may be process 1 of a container.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent or (parent == 1 and not init_is_fine):
        os._exit(1)
