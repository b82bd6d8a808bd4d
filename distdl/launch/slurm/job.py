"""The program of a job, on its first node: starts one agent on each node and decides what follows.

    python -m distdl.launch.slurm.job --run RUN --idle-attempts N [--array-key KEY] [--elastic] -- COMMAND ...

It takes the place of the script's shell, so that Slurm's warning before the time limit (USR1) comes here. It
passes that on, waits for the run to save, and has Slurm start the job again, unless nothing is gained by it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from distdl import errors
from distdl.errors import DistdlError
from distdl.launch.slurm.requeue import JOB, Verdict, idle_attempts, judge, start_again
from distdl.launch.slurm.script import FOLDER
from distdl.launch.slurm.submit import events_of
from distdl.record import RunDirectory

_PATIENCE_S = 60
"""Once one node has finished, the others have so long to follow."""


@dataclass(frozen=True)
class Attempt:
    """One start of a job, read from Slurm's environment. `name` is what Slurm's commands call the job."""

    name: str
    task: str | None
    restarts: int
    nodes: str
    cpus: str | None

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Attempt:
        """Raises EnvironmentProblem where this is no job of Slurm."""
        if "SLURM_JOB_ID" not in env or "SLURM_JOB_NUM_NODES" not in env:
            raise errors.EnvironmentProblem("this is the program of a Slurm job; submit it with sbatch")
        task = env.get("SLURM_ARRAY_TASK_ID")
        # The id of an array's last task is also that of the array: by that name all would be meant.
        name = f"{env['SLURM_ARRAY_JOB_ID']}_{task}" if task else env["SLURM_JOB_ID"]
        restarts = int(env.get("SLURM_RESTART_COUNT", "0"))
        return cls(name, task, restarts, env["SLURM_JOB_NUM_NODES"], env.get("SLURM_CPUS_PER_TASK"))


class Step:
    """The job's step: `command`, once on each node. Requests to stop that come here are passed on to it."""

    def __init__(self) -> None:
        self.asked = False
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_request)

    def _on_request(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        self._pass_on()

    def _pass_on(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGUSR1)  # srun hands it to every task; TERM would end srun

    def run(self, command: Sequence[str], more: Mapping[str, str]) -> int:
        """Blocks until the step ends; the largest exit code of its tasks, 128 + N for a signal N. `more`: for
        its environment.
        """
        inherited = {name: value for name, value in os.environ.items() if name != JOB}
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**inherited, **more})
        if self.asked:
            self._pass_on()
        code = self._process.wait()
        return code if code >= 0 else 128 - code


def step_command(attempt: Attempt, command: Sequence[str], *, elastic: bool = False) -> list[str]:
    """The srun command: one task on each node of the job. An `elastic` one goes on when a node is lost."""
    # srun does not inherit the job's CPUs for each task since Slurm 22.05.
    cpus = [f"--cpus-per-task={attempt.cpus}"] if attempt.cpus else []
    # One that stops first must not kill the rest; and a task on a lost node has ended, as srun sees it.
    ends = ["--kill-on-bad-exit=0", *(["--no-kill", "--wait=0"] if elastic else [f"--wait={_PATIENCE_S}"])]
    return ["srun", f"--nodes={attempt.nodes}", "--ntasks-per-node=1", *cpus, *ends, *command]


def run_of_task(run: str, key: str | None, task: str | None) -> tuple[str, list[str]]:
    """The run directory of a task of an array, and the overrides that make it a run of its own."""
    if key is None or task is None:
        return run, []
    own = f"{run.rstrip('/')}/task-{task}"
    return own, [f"{key}={task}", f"run.dir={own}"]


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code of the job, for Slurm's records."""
    given = _parse(arguments)
    attempt = Attempt.from_env(os.environ)
    step = Step()
    run, overrides = run_of_task(given.run, given.array_key, attempt.task)
    directory, script = RunDirectory(run), Path(given.run) / FOLDER / "job.sbatch"
    directory.path.mkdir(parents=True, exist_ok=True)
    idle = idle_attempts(events_of(directory.path))
    directory.event("job_start", job=attempt.name, restarts=attempt.restarts)
    _say(f"job {attempt.name}, restart {attempt.restarts}: {run}")
    if idle >= given.idle_attempts:  # Slurm itself has started it again, after a node was lost say
        return _end(directory, attempt, Verdict.IDLE, errors.RANK_FAILED, idle, script)
    first = os.environ.get("SLURMD_NODENAME", "")
    job = {"name": attempt.name, "restarts": attempt.restarts, "script": str(script), "first": first}
    code = step.run(
        step_command(attempt, [*given.command, *overrides], elastic=given.elastic),
        {JOB: json.dumps(job)} if given.elastic and first else {},
    )
    idle = idle_attempts(events_of(directory.path))
    verdict = judge(code, step.asked, idle, given.idle_attempts)
    return _end(directory, attempt, verdict, code, idle, script)


def _end(
    directory: RunDirectory, attempt: Attempt, verdict: Verdict, code: int, idle: int, script: Path
) -> int:
    said = str(verdict.value)
    if verdict is Verdict.AGAIN:
        said, following = start_again(attempt.name, attempt.restarts, script)
        if following is not None:
            # `distdl slurm` looks for this one from now on. Of an array, the new job has the one task.
            task = f"_{attempt.task}" if attempt.task else ""
            directory.event("followed_by", job=f"{following}{task}")
    elif verdict is Verdict.IDLE:
        code = errors.RANK_FAILED
        said = f"not started again: {idle} attempts in a row saved no step (launch.slurm.idle_attempts)"
    directory.event("job_end", job=attempt.name, exit_code=code, verdict=said)
    _say(f"job {attempt.name}: exit code {code}; {said}")
    return code


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="distdl.launch.slurm.job", allow_abbrev=False)
    parser.add_argument("--run", required=True)
    parser.add_argument("--idle-attempts", type=int, required=True)
    parser.add_argument("--array-key")
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("command", nargs="+")
    return parser.parse_args(arguments)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except DistdlError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
