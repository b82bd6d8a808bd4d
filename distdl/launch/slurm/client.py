"""Slurm's own commands. All have a time limit: they try again at length when the controller is dead."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from distdl.errors import EnvironmentProblem

LIMIT_S = 60.0


def ask(words: Sequence[str], given: str | None = None) -> str:
    """Run one of Slurm's commands and return all that it printed. Blocks for at most `LIMIT_S` seconds.

    `given` is its standard input. Raises EnvironmentProblem where it is missing, fails, or does not answer.
    """
    try:
        done = subprocess.run(
            words,
            input=given or "",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except FileNotFoundError:
        raise EnvironmentProblem(
            f"{words[0]} is not here: this machine has no Slurm. Run the command on a login node of the "
            "cluster, or print the script with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise EnvironmentProblem(
            f"{words[0]} did not answer within {LIMIT_S:g} s; is Slurm's controller down? Try `scontrol ping`"
        ) from None
    if done.returncode != 0:
        raise EnvironmentProblem(f"{words[0]}: {done.stdout.strip() or f'exit code {done.returncode}'}")
    return done.stdout
