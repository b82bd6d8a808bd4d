"""Where DeepSpeed's compiled ops go, and the lock that a killed build leaves behind.

With the configuration that distdl derives nothing is compiled: torch's optimisers, and gloo or nccl for every
collective. Other versions of DeepSpeed, and keys of a user's own, may compile something all the same. torch
builds an op in one process while the others wait for a file named `lock` to go. Where that process was
killed, they wait for ever, without a word.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

_VARIABLE = "TORCH_EXTENSIONS_DIR"
_OURS = "in-use"


def build_folder() -> Path:
    """TORCH_EXTENSIONS_DIR if it is set; else a folder of this user's for these versions of everything."""
    given = os.environ.get(_VARIABLE)
    if given:
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = f"py{platform.python_version()}-torch{version('torch')}-deepspeed{version('deepspeed')}"
    return cache / "distdl" / "torch_extensions" / versions


@contextmanager
def own_builds() -> Iterator[None]:
    """While DeepSpeed may compile: into `build_folder`, rid of stale locks, with ninja found.

    A folder of the user's own is left as it is: other programs may be building there. Local; waits only while
    another process is clearing. Every process of the node holds our own lock together while it may build; the
    kernel drops it with the process. Whoever gets it alone knows that nobody builds.
    """
    if os.environ.get(_VARIABLE):
        with _set({"PATH": _path_with_ninja()}):
            yield
        return
    folder = build_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / _OURS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # Most runs compile nothing: those that do get torch's own message.
        print(f"distdl: no folder for compiled ops: {error}", file=sys.stderr)  # noqa: T201
        yield
        return
    try:
        _clear_if_alone(lock, folder)
        fcntl.flock(lock, fcntl.LOCK_SH)
        with _set({_VARIABLE: str(folder), "PATH": _path_with_ninja()}):
            yield
    finally:
        os.close(lock)


def _clear_if_alone(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    for stale in folder.glob("**/lock"):
        stale.unlink(missing_ok=True)
        print(f"distdl: removed {stale}, left behind by a build that was killed", file=sys.stderr)  # noqa: T201


def _path_with_ninja() -> str:
    """torch calls `ninja` by name; in a virtual environment that is not activated it is not on the path."""
    path = os.environ.get("PATH", os.defpath)
    beside = str(Path(sys.executable).parent)
    if shutil.which("ninja") is None and shutil.which("ninja", path=beside):
        return path + os.pathsep + beside
    return path


@contextmanager
def _set(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
