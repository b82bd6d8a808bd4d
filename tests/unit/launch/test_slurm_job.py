"""What becomes of a job whose step has ended: decided from what is on record, done with stubs of Slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distdl.errors import EnvironmentProblem
from distdl.launch.slurm.job import Attempt, run_of_task, step_command
from distdl.launch.slurm.requeue import Verdict, idle_attempts, judge, start_again_from_here, state_of
from distdl.launch.slurm.submit import job_of
from distdl.record import RunDirectory, read_lines

START, SUBMITTED = {"event": "job_start"}, {"event": "submitted"}


def save(step: int) -> dict[str, Any]:
    return {"event": "save", "step": step}


@pytest.mark.parametrize(
    ("events", "idle"),
    [
        ([], 0),
        ([START], 1),
        ([START, START, START], 3),
        ([START, save(10), START], 1),
        ([START, save(10), START, save(10), START], 2),  # the same step again is no progress
        ([START, save(10), START, save(5), save(11)], 0),
        ([START, START, SUBMITTED, START], 1),
        ([START, {"event": "stop", "step": 3}], 1),
    ],
)
def test_attempts_without_progress_are_counted(events: list[dict[str, Any]], idle: int) -> None:
    assert idle_attempts(events) == idle


@pytest.mark.parametrize(
    ("code", "asked", "idle", "verdict"),
    [
        (0, False, 0, Verdict.OVER),
        (0, True, 0, Verdict.OVER),
        (75, False, 0, Verdict.AGAIN),  # preempted: TERM went to the step alone
        (75, True, 2, Verdict.AGAIN),
        (75, True, 3, Verdict.IDLE),
        (143, False, 1, Verdict.AGAIN),
        (138, True, 1, Verdict.AGAIN),  # warned before Python had its handlers
        (137, True, 1, Verdict.AGAIN),
        (137, False, 0, Verdict.OVER),
        (70, True, 0, Verdict.OVER),
        (2, False, 0, Verdict.OVER),
    ],
)
def test_the_verdict(code: int, asked: bool, idle: int, verdict: Verdict) -> None:
    assert judge(code, asked, idle, 3) is verdict


def test_the_state_is_read_from_what_scontrol_prints() -> None:
    line = "JobId=7 JobName=a JobState=RUNNING Reason=None Requeue=1 Restarts=2 BatchFlag=1 ExitCode=0:0"
    assert state_of(line) == ("RUNNING", "None", 2)


JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2"}


def test_an_attempt_is_read_from_the_environment() -> None:
    assert Attempt.from_env(JOB) == Attempt("12", None, 0, "2", None)
    task = {**JOB, "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "4", "SLURM_RESTART_COUNT": "3"}
    assert Attempt.from_env(task) == Attempt("10_4", "4", 3, "2", None)
    with pytest.raises(EnvironmentProblem, match="submit it with sbatch"):
        Attempt.from_env({})


def test_the_step_has_one_task_on_each_node() -> None:
    words = step_command(Attempt("12", None, 0, "2", "8"), ["python", "x"])
    assert words[:4] == ["srun", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=8"]
    assert words[-2:] == ["python", "x"]


def test_each_task_of_an_array_is_a_run_of_its_own() -> None:
    assert run_of_task("runs/a", None, "4") == ("runs/a", [])
    assert run_of_task("runs/a/", "train.seed", "4") == (
        "runs/a/task-4",
        ["train.seed=4", "run.dir=runs/a/task-4"],
    )


# --- the program itself, with commands in the place of Slurm's ---

SRUN = """#!{python}
import json, os, signal, sys, time
def warned(*_):
    sys.exit(int(os.environ["CODE_ASKED"]))
signal.signal(signal.SIGUSR1, warned)
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(["srun", *sys.argv[1:]]) + "\\n")
if "DISTDL_SLURM_JOB" in os.environ:
    with open(os.environ["NOTES"] + ".job", "w") as file:
        file.write(os.environ["DISTDL_SLURM_JOB"])
if "CODE" in os.environ:
    sys.exit(int(os.environ["CODE"]))
open(os.environ["NOTES"] + ".ready", "w").close()
signal.pause()
"""
SCONTROL = """#!{python}
import json, os, sys
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(["scontrol", *sys.argv[1:]]) + "\\n")
if sys.argv[1] == "show":
    said = {{"STATE": "RUNNING", "REASON": "None", "RESTARTS": "0", **os.environ}}
    print("JobId=12 JobState={{STATE}} Reason={{REASON}} Restarts={{RESTARTS}}".format(**said))
"""


class Program:
    """The job's program in a folder with stubs of srun and scontrol."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes = folder / "notes"
        self.run = folder / "run"
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            stub = folder / "bin" / name
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(text.format(python=sys.executable))
            stub.chmod(0o700)
        self.processes: list[subprocess.Popen[str]] = []
        self.path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def without_scontrol(self) -> None:
        """A cluster whose users have squeue and sbatch; nothing else that the machine may have is seen."""
        (self.folder / "bin" / "scontrol").unlink()
        for name, text in (("squeue", SQUEUE), ("sbatch", SBATCH)):
            stub = self.folder / "bin" / name
            stub.write_text(text.format(python=sys.executable))
            stub.chmod(0o700)
        self.path = str(self.folder / "bin")

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        words = ["--run", str(self.run), "--idle-attempts", "2", *options, "--", "train", "a b", "$(id)"]
        process = subprocess.Popen(
            [sys.executable, "-m", "distdl.launch.slurm.job", *words],
            env={**os.environ, **JOB, "PATH": self.path, "NOTES": str(self.notes), **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        said = process.communicate(timeout=30)[0]
        return process.returncode, said

    def asked(self, command: str) -> list[list[str]]:
        return [
            words for line in self.notes.read_text().splitlines() if (words := json.loads(line))[0] == command
        ]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    found = Program(tmp_path)
    yield found
    for process in found.processes:
        process.kill()
        process.wait()


REQUEUE = ["scontrol", "requeue", "12"]


def test_a_warning_is_passed_on_and_the_job_starts_again(program: Program) -> None:
    process = program.start(CODE_ASKED="75")
    ready = program.notes.with_name("notes.ready")
    while not ready.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    code, said = program.finish(process)
    assert (code, program.asked("scontrol")[-1]) == (75, REQUEUE)
    assert "exit code 75; started again" in said
    assert program.asked("srun")[0][-3:] == ["train", "a b", "$(id)"]
    assert [e["event"] for e in read_lines(program.run / "events.jsonl")] == ["job_start", "job_end"]


def test_the_agents_of_a_job_of_a_range_can_start_it_again(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first node, and so its program, may be lost: then one of the others does what that would do."""
    program.finish(program.start("--elastic", CODE="0", SLURMD_NODENAME="n1"))
    told = {"DISTDL_SLURM_JOB": program.notes.with_name("notes.job").read_text()}
    monkeypatch.setenv("PATH", program.path)
    monkeypatch.setenv("NOTES", str(program.notes))
    directory = RunDirectory(program.run)
    before = program.asked("scontrol")
    start_again_from_here({}, directory, lambda: False)  # no such job
    sinfo = program.folder / "bin" / "sinfo"
    sinfo.write_text("#!/bin/sh\necho mix\n")
    sinfo.chmod(0o700)
    start_again_from_here(
        told, directory, lambda: False, wait_s=0.0
    )  # this node may be the one that is cut off
    start_again_from_here(told, directory, lambda: True)
    assert program.asked("scontrol") == before
    sinfo.write_text('#!/bin/sh\ntest "$2" = --nodes=n1 && echo down*\n')
    for _ in range(3):  # of all that are left, one
        start_again_from_here(told, directory, lambda: False)
    assert program.asked("scontrol")[len(before) :] == [["scontrol", "show", "job", "-o", "12"], REQUEUE]
    assert [e["verdict"] for e in read_lines(directory.events) if e["event"] == "first_node_lost"] == [
        "started again"
    ]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CODE": "0"}, "exit code 0; over"),
        ({"CODE": "70"}, "exit code 70; over"),
        ({"CODE": "75", "STATE": "CANCELLED"}, "cancelled, not started again"),
        ({"CODE": "75", "STATE": "COMPLETING"}, "cancelled, not started again"),
        ({"CODE": "75", "RESTARTS": "1"}, "Slurm itself starts it again"),
    ],
)
def test_when_a_job_is_not_started_again(program: Program, environment: dict[str, str], says: str) -> None:
    code, said = program.finish(program.start(**environment))
    assert code == int(environment["CODE"])
    assert says in said
    assert "scontrol" not in {words[0] for words in program.asked("scontrol") if words[1] == "requeue"}


SQUEUE = "#!/bin/sh\necho ${{STATE:-RUNNING}} ${{REASON:-None}} ${{RESTARTS:-0}}\n"
SBATCH = """#!{python}
import json, os, sys
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(["sbatch", *sys.argv[1:]]) + "\\n")
print("13;cluster")
"""


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "goes on as job 13"),
        ({"STATE": "COMPLETING"}, "cancelled, not started again"),
        ({"STATE": "COMPLETING", "REASON": "TimeLimit"}, "goes on as job 13"),
        ({"RESTARTS": "1"}, "Slurm itself starts it again"),
    ],
)
def test_without_scontrol_another_job_follows(
    program: Program, environment: dict[str, str], says: str
) -> None:
    """And not after one that was cancelled: it would submit itself for ever."""
    program.without_scontrol()
    code, said = program.finish(program.start(CODE="75", **environment))
    assert code == 75
    assert says in said, said
    follows = "13" in says
    script = str(program.run / "slurm" / "job.sbatch")
    asked = ["sbatch", "--parsable", "--dependency=afterany:12", script]
    assert program.asked("sbatch") == ([asked] if follows else [])
    (program.run / "slurm").mkdir()
    events = [e["event"] for e in read_lines(program.run / "events.jsonl")]
    assert events == ["job_start", *(["followed_by"] * follows), "job_end"]
    if follows:
        assert job_of(program.run) == "13"


def test_without_scontrol_a_task_of_an_array_is_followed_alone(program: Program) -> None:
    program.without_scontrol()
    task = {"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "4"}
    program.finish(program.start("--array-key", "train.seed", CODE="75", **task))
    script = str(program.run / "slurm" / "job.sbatch")
    asked = ["sbatch", "--parsable", "--dependency=afterany:10_4", "--array=4", script]
    assert program.asked("sbatch") == [asked]
    (program.run / "slurm").mkdir()
    assert job_of(program.run / "task-4") == "13_4"


def test_a_job_out_of_time_that_could_save_starts_again(program: Program) -> None:
    program.finish(program.start(CODE="75", STATE="COMPLETING", REASON="TimeLimit"))
    assert program.asked("scontrol")[-1] == REQUEUE


def test_a_job_that_saves_no_step_ends_after_so_many_attempts(program: Program) -> None:
    said = [program.finish(program.start(CODE="143")) for _ in range(3)]
    assert [code for code, _ in said] == [143, 70, 70]
    assert "2 attempts in a row saved no step" in said[1][1]
    assert program.asked("scontrol").count(REQUEUE) == 1
    assert len(program.asked("srun")) == 2


def test_a_task_of_an_array_starts_alone_again(program: Program) -> None:
    task = {"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "4"}
    program.finish(program.start("--array-key", "train.seed", CODE="75", **task))
    assert program.asked("scontrol")[-1] == ["scontrol", "requeue", "10_4"]
    own = program.run / "task-4"
    assert program.asked("srun")[0][-2:] == ["train.seed=4", f"run.dir={own}"]
    assert len(read_lines(own / "events.jsonl")) == 2
