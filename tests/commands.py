"""`distdl` commands for tests: in a process of its own, forked from one that has imported torch already.

What a fresh interpreter would do is seen where a test names one (`python -m distdl`, torchrun, srun, a
terminal). The others save the seconds of processor time that importing torch takes: a launch would import it
twice, for itself and for the server that its workers come from.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import NoReturn

from distdl.testing.worlds import PRELOAD
from distdl.train.stop import REQUESTS


class Command:
    """A running `distdl` command, in a session of its own; what it prints goes to a file."""

    def __init__(self, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        self.arguments = arguments
        self._file = tempfile.NamedTemporaryFile("rb")  # noqa: SIM115 (closed by `close`)
        self._said = ""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        environment = dict(os.environ) if env is None else env
        self._process = context.Process(
            target=_command, args=(self._file.name, str(cwd or Path.cwd()), environment, list(arguments))
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        """All that it has printed so far, also when it is closed."""
        if not self._file.closed:
            self._said = Path(self._file.name).read_bytes().decode(errors="replace")
        return self._said

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end; returns the exit code, that of a signal negative. Raises TimeoutExpired."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(
                ["distdl", *self.arguments], timeout_s or 0.0, self.output.encode()
            )
        return self._process.exitcode

    def wait_for_line(self, words: str) -> None:
        """Wait until it has printed a line with `words`. Raises AssertionError if it ends without."""
        while words not in self.output:
            ended = self._process.exitcode is not None
            if ended and words not in self.output:
                raise AssertionError(f"ended without saying {words!r}:\n{self.output}")
            select.select([], [], [], 0.01)

    def close(self) -> None:
        """Kill it, unless it has ended."""
        self._process.kill()
        self._process.join()
        self._said = self.output
        self._file.close()


def distdl(*arguments: str, cwd: Path | None = None, timeout_s: float = 60) -> tuple[int, str]:
    """Run one command to its end: (exit code, all that it printed). Raises TimeoutExpired."""
    with contextlib.closing(Command(*arguments, cwd=cwd)) as command:
        code = command.wait(timeout_s)
        return code, command.output


def _command(output: str, cwd: str, environment: dict[str, str], arguments: list[str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, "")  # as `python -m` has it
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.stdin = open(os.devnull)  # noqa: SIM115 (for as long as the process lives)
    sys.argv = ["distdl", *arguments]
    _forget_servers()
    spawn = util.spawnv_passfds  # type: ignore[attr-defined]
    util.spawnv_passfds = lambda path, args, fds: _fork(args[-1], fds) or spawn(path, args, fds)  # type: ignore[attr-defined]
    from distdl.cli import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()


def _forget_servers() -> None:
    """multiprocessing's own two, which are those of the tests; a launcher starts its own."""
    forkserver._forkserver.__init__()  # type: ignore[misc]
    resource_tracker._resource_tracker.__init__()  # type: ignore[misc]


def _fork(code: str, fds: list[int]) -> int:
    """Start the fork server of a launcher, whose program is `code`, by forking this process: its id.

    0 if `code` is something else. The new process is as `exec` would have left it, but for its imports.
    """
    if "forkserver" not in code:
        return 0
    if child := os.fork():
        return child
    try:
        _serve(code, fds)
    finally:
        os._exit(1)


def _serve(code: str, fds: list[int]) -> NoReturn:
    for number in REQUESTS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *fds}:
        with contextlib.suppress(OSError):  # the one that listed them
            os.close(fd)
    _forget_servers()
    exec(code, {})
    os._exit(0)
