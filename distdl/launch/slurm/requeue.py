"""Whether a job that has ended is started again, and how."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from distdl import errors
from distdl.errors import EnvironmentProblem
from distdl.launch.slurm.client import ask
from distdl.record import RunDirectory


class Verdict(Enum):
    """What becomes of a job whose step has ended."""

    OVER = "over"
    AGAIN = "started again"
    IDLE = "not started again"


def idle_attempts(events: Sequence[Mapping[str, Any]]) -> int:
    """How many attempts of the run, up to the newest, began since a step was saved beyond all before.

    Submitting the run anew begins the count anew.
    """
    furthest, idle = 0, 0
    for event in events:
        if event["event"] == "submitted":
            idle = 0
        elif event["event"] == "job_start":
            idle += 1
        elif event["event"] == "save" and event["step"] > furthest:
            furthest, idle = event["step"], 0
    return idle


def judge(code: int, asked: bool, idle: int, most_idle: int) -> Verdict:
    """`code`: of the step. `asked`: the run was told to stop. `idle`: attempts in a row without progress.

    A run that stopped on request goes on; so does one that was asked to and did not manage. An error would
    only come again.
    """
    stopped = code in errors.STOPS or (asked and code > 128)
    if not stopped:
        return Verdict.OVER
    return Verdict.AGAIN if idle < most_idle else Verdict.IDLE


def start_again(name: str, restarts: int, script: Path) -> tuple[str, str | None]:
    """Have Slurm start job `name` again, unless it was cancelled or is to start again already.

    `restarts`: how often it had been when this attempt began. Returns what was done, in words, and the id of
    the job that follows where it is another one. Raises EnvironmentProblem where Slurm does not answer.
    """
    requeues = shutil.which("scontrol") is not None  # some clusters keep it from their users
    if requeues:
        state, reason, count = state_of(ask(["scontrol", "show", "job", "-o", name]))
    else:
        state, reason, count = queue_state_of(
            ask(["squeue", "--noheader", f"--jobs={name}", "--Format=State:32,Reason:64,RestartCnt:16"])
        )
    if count != restarts:
        return "Slurm itself starts it again", None
    # A job that is cancelled is COMPLETING for as long as this program lives; so is one out of time.
    if state != "RUNNING" and reason != "TimeLimit":
        return "cancelled, not started again", None
    if requeues:
        ask(["scontrol", "requeue", name])
        return Verdict.AGAIN.value, None
    dependency = f"--dependency=afterany:{name}"
    said = ask(["sbatch", "--parsable", dependency, *_task_of(name), str(script)])
    job = said.strip().partition(";")[0]
    return f"goes on as job {job}", job


JOB = "DISTDL_SLURM_JOB"
"""Environment variable by which the program of a job of a range of nodes tells its agents whose job it is."""
_POLL_S = 2.0


def start_again_from_here(
    env: Mapping[str, str], directory: RunDirectory, stopped: Callable[[], bool], wait_s: float = 900.0
) -> None:
    """On a node that is left of a job of a range whose first node does not answer: once Slurm has that node
    down, have the job started again, as its program there would have done. Slurm itself leaves such a job
    with the other nodes, idle.

    Does nothing where this is no such job, or Slurm thinks well of the node for `wait_s` seconds: then this
    node may be the one that is cut off. Blocks. One of several nodes that call it does it.
    """
    if JOB not in env:
        return
    job = json.loads(env[JOB])
    end = time.monotonic() + wait_s
    try:
        while "down" not in ask(["sinfo", "--noheader", f"--nodes={job['first']}", "--format=%t"]):
            if stopped() or time.monotonic() > end:
                return
            time.sleep(_POLL_S)
        (directory.path / f".again-{job['name']}-{job['restarts']}").touch(exist_ok=False)
        said, following = start_again(job["name"], job["restarts"], Path(job["script"]))
        directory.event("first_node_lost", lost_host=job["first"], verdict=said)
        if following is not None:
            directory.event("followed_by", job=following)
            ask(["scancel", job["name"]])
    except FileExistsError:  # another node does it
        return
    except EnvironmentProblem as problem:
        directory.event("first_node_lost", lost_host=job["first"], verdict=str(problem))


def _task_of(name: str) -> list[str]:
    _, _, task = name.partition("_")
    return [f"--array={task}"] if task else []


def state_of(text: str) -> tuple[str, str, int]:
    """(state, reason, restarts) from the line that `scontrol show job -o` prints."""
    found = dict(re.findall(r"(?:^|\s)(JobState|Reason|Restarts)=(\S+)", text))
    return found.get("JobState", "UNKNOWN"), found.get("Reason", ""), int(found.get("Restarts", "0"))


def queue_state_of(text: str) -> tuple[str, str, int]:
    """The same from the columns of `squeue`; a job that is no longer there is not running."""
    words = text.split()
    return (words[0], words[1], int(words[2])) if len(words) == 3 else ("UNKNOWN", "", 0)
