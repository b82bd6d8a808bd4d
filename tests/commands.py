"""`distdl` commands for tests: in a process of its own, forked from one that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from distdl.testing.worlds import PRELOAD


def distdl(*arguments: str, cwd: Path | None = None, timeout_s: float = 60) -> tuple[int, str]:
    """Run one command to its end: (exit code, all that it printed).

    `launch` gets an interpreter of its own, since it starts a fork server and this one's would be it. The
    others save the seconds that importing torch takes. Raises TimeoutExpired.
    """
    if arguments[:1] == ("launch",):
        return _in_a_new_interpreter(arguments, cwd, timeout_s)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.NamedTemporaryFile("rb") as output:
        given = (output.name, str(cwd or Path.cwd()), dict(os.environ), list(arguments))
        process = context.Process(target=_command, args=given)
        process.start()
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["distdl", *arguments], timeout_s, output.read())
        assert process.exitcode is not None
        return process.exitcode, output.read().decode()


def _command(output: str, cwd: str, environment: dict[str, str], arguments: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, "")  # as `python -m` has it
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115 (for as long as the process lives)
    sys.argv = ["distdl", *arguments]
    from distdl.cli import main

    main()


def _in_a_new_interpreter(arguments: tuple[str, ...], cwd: Path | None, timeout_s: float) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "distdl", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return done.returncode, done.stdout
