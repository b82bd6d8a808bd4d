"""The commands as a person types them; every way in does the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distdl.record import read_lines
from distdl.testing import assert_same_bits
from tests.commands import distdl
from tests.faults.support import Launched, events, tensors_of, wait_for_event, worker_pids, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launched_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("launched")
    recipe = write_recipe(folder, train={"max_steps": 30, "seed": 1})
    with Launched(["launch", str(recipe), "--procs", "2"]) as command:
        assert command.finish() == 0, command.output
    return recipe, folder / "run", command.output


def test_launch_leaves_the_documented_run_directory(launched_run: tuple[Path, Path, str]) -> None:
    recipe, run, output = launched_run
    assert "finished" in output
    assert "test accuracy" in output
    assert f"run directory: {run}" in output
    assert (run / "recipe.yaml").read_text().startswith("# resolved recipe; hash")
    attempt = run / "attempts" / "0001"
    assert json.loads((attempt / "plan.json").read_text())["shares"] == [2, 2]
    assert "torch" in json.loads((attempt / "environment.json").read_text())
    assert "step 10/30" in (attempt / "logs" / "rank-00000.log").read_text()
    assert (attempt / "logs" / "rank-00001.log").exists()
    assert [e["event"] for e in read_lines(run / "events.jsonl")][:3] == ["launch", "start", "first_step"]
    rows = read_lines(run / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 10, 20, 25, 30]
    assert {"loss", "lr", "grad_norm", "samples_per_s", "eval_accuracy"} <= rows[-1].keys()
    again = distdl("plan", str(run / "recipe.yaml"))
    assert again[0] == 0, again[1]
    assert recipe.exists()


def torchrun(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    start += ["-m", "distdl"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", **env},
    )


@pytest.mark.campaign
def test_torchrun_does_the_same_run(launched_run: tuple[Path, Path, str], tmp_path: Path) -> None:
    recipe, run, _ = launched_run
    done = torchrun("train", str(recipe), f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_bits(tensors_of(tmp_path / "run"), tensors_of(run))


def test_torchrun_sees_no_crash_in_a_stop(tmp_path: Path) -> None:
    """torchrun restarts on any non-zero exit: a stop on request leaves as 0 and says why in events.jsonl."""
    recipe = write_recipe(tmp_path, train={"max_steps": 30, "seed": 1})
    done = torchrun("train", str(recipe), DISTDL_FAIL_AT="1:train.step@14:USR1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert events(tmp_path / "run", "stop")[0]["saved"] == 15


def test_torchrun_restarts_a_killed_rank(launched_run: tuple[Path, Path, str], tmp_path: Path) -> None:
    """Killed just after the checkpoint at 20 was there, so that the next attempt starts behind the fault."""
    recipe, run, _ = launched_run
    where = f"run.dir={tmp_path / 'run'}"
    done = torchrun("train", str(recipe), where, DISTDL_FAIL_AT="0:save.renamed@20:kill")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [e["resumed_from"] for e in events(tmp_path / "run", "start")] == [None, "step-00000020"]
    assert_same_bits(tensors_of(tmp_path / "run"), tensors_of(run))


def test_a_finished_run_says_so(launched_run: tuple[Path, Path, str]) -> None:
    recipe, run, _ = launched_run
    before = (run / "metrics.jsonl").read_bytes()
    with Launched(["launch", str(recipe), "--procs", "2"]) as command:
        assert command.finish() == 0, command.output
    assert "finished already" in command.output
    assert "test accuracy" in command.output
    assert (run / "metrics.jsonl").read_bytes() == before


def test_eval_gives_the_metrics_of_the_run(launched_run: tuple[Path, Path, str]) -> None:
    recipe, run, _ = launched_run
    code, output = distdl("eval", str(recipe), "--json")
    assert code == 0, output
    alone = json.loads(output)
    rows = read_lines(run / "metrics.jsonl")
    assert alone["rows"] == 2000
    assert alone["accuracy"] == rows[-1]["eval_accuracy"]
    assert alone["loss"] == rows[-1]["eval_loss"]
    code, output = distdl("eval", str(recipe), "--checkpoint", str(run / "checkpoints" / "step-00000010"))
    assert code == 0, output
    assert str(run / "checkpoints" / "step-00000010") in output


def test_eval_without_a_checkpoint(tmp_path: Path) -> None:
    code, output = distdl("eval", str(write_recipe(tmp_path)))
    assert code == 4, output
    assert "train first" in output


def test_two_launches_at_once_and_nothing_beyond_loopback(tmp_path: Path) -> None:
    commands = []
    try:
        for name in ("one", "two"):
            recipe = write_recipe(tmp_path / name, train={"max_steps": 120, "seed": 1})
            commands.append(Launched(["launch", str(recipe), "--procs", "2"]))
        for name, command in zip(("one", "two"), commands, strict=True):
            wait_for_event(tmp_path / name / "run", "first_step")
            assert len(worker_pids(command)) == 2
            assert listening(command.pids()) <= {"127.0.0.1", "::1"}
        assert [c.finish() for c in commands] == [0, 0]
    finally:
        for command in commands:
            command.__exit__()
    assert_same_bits(tensors_of(tmp_path / "one" / "run"), tensors_of(tmp_path / "two" / "run"))


def listening(pids: list[int]) -> set[str]:
    """The addresses that these processes listen on, from /proc/net/tcp and tcp6 (state 0A is LISTEN)."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(fd)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(_address(fields[1].split(":")[0]))
    return found


def _address(text: str) -> str:
    if len(text) == 8:
        return ".".join(str(b) for b in reversed(bytes.fromhex(text)))
    words = [bytes.fromhex(text[i : i + 8])[::-1].hex() for i in range(0, 32, 8)]
    return "::1" if "".join(words) == "0" * 31 + "1" else "".join(words)


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    """Rank 0 draws on the terminal although its output goes to a log."""
    import pty

    recipe = write_recipe(tmp_path, train={"max_steps": 30, "seed": 1})
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "distdl", "launch", str(recipe), "--procs", "2"],
        stdout=follower, stderr=follower, stdin=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(follower)
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    os.close(leader)
    assert process.wait() == 0
    text = seen.decode(errors="replace")
    assert "━" in text
    assert "samples/s" in text
    assert "finished" in text
