"""What a run leaves behind survives several writers, kills and bad numbers."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distdl.errors import ENVIRONMENT, EnvironmentProblem
from distdl.record import (
    PHASES,
    Heartbeat,
    RunDirectory,
    append_line,
    read_lines,
    rewind_metrics,
    write_atomic,
)

WRITER = """
import sys
from pathlib import Path
from distdl.record import append_line
name, path = sys.argv[1], Path(sys.argv[2])
sys.stdin.readline()
for i in range(200):
    append_line(path, {"writer": name, "i": i, "text": name * (1 + 37 * i % 5000)})
"""


def test_several_writers_never_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, name, str(path)], stdin=subprocess.PIPE)
        for name in "abc"
    ]
    for writer in writers:  # all of them wait at the same place, and are let go together
        assert writer.stdin is not None
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 600
    assert all(row["text"] == row["writer"] * (1 + 37 * row["i"] % 5000) for row in rows)
    for name in "abc":
        assert [row["i"] for row in rows if row["writer"] == name] == list(range(200))


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = {
        "step": 1,
        "loss": math.nan,
        "deep": {"norm": math.inf, "all": [1.0, -math.inf, {"x": math.nan}], "pair": (math.nan, 2)},
        "fine": 0.5,
    }
    append_line(path, row)
    assert strict(path.read_text()) == {
        "step": 1,
        "loss": "nan",
        "deep": {"norm": "inf", "all": [1.0, "-inf", {"x": "nan"}], "pair": ["nan", 2]},
        "fine": 0.5,
    }
    assert rewind_metrics(path, 2) == {}
    assert strict(path.read_text())["loss"] == "nan"


def rows(*steps: int) -> str:
    return "".join(json.dumps({"step": s, "loss": s / 2}) + "\n" for s in steps)


@pytest.mark.parametrize(
    ("before", "step", "after", "row"),
    [
        (rows(1, 10, 20, 30), 20, rows(1, 10, 20), 20),
        (rows(1, 10, 20, 30), 25, rows(1, 10, 20), None),
        (rows(1, 10, 20), 99, rows(1, 10, 20), None),
        (rows(1, 10, 20), 0, "", None),
        (rows(1, 10, 20) + '{"step": 30, "lo', 20, rows(1, 10, 20), 20),
        # The cut line lies before the step, too: what is appended next must begin a line of its own.
        (rows(1, 10) + '{"step": 20, "lo', 30, rows(1, 10), None),
        ('{"st', 0, "", None),
        ("", 5, "", None),
    ],
)
def test_rewind(tmp_path: Path, before: str, step: int, after: str, row: int | None) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(before)
    found = rewind_metrics(path, step)
    assert found == ({} if row is None else {"step": row, "loss": row / 2})
    assert path.read_text() == after
    append_line(path, {"step": step})
    assert read_lines(path)[-1] == {"step": step}
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_rewind_of_nothing(tmp_path: Path) -> None:
    assert rewind_metrics(tmp_path / "metrics.jsonl", 3) == {}
    assert os.listdir(tmp_path) == []


def test_rewind_leaves_a_file_alone_that_is_right_already(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(rows(1, 10))
    before = path.stat()
    rewind_metrics(path, 11)
    assert path.stat().st_ino == before.st_ino


def test_reading_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert read_lines(path) == []
    path.write_text('{"a": 1}\n{"b": "\\u00fc"}\n{"c": ')
    assert read_lines(path) == [{"a": 1}, {"b": "ü"}]


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "failure.json"
    path.write_text("old")

    def killed(fd: int) -> None:
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["failure.json"]


HOLDER = """
import sys
from distdl.record import RunDirectory
directory = RunDirectory(sys.argv[1])
with directory.lock():
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_lock_held_by_another_process_names_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        who = f"in use by process {holder.pid} on {socket.gethostname()}"
        for _ in range(2):  # to be refused leaves the lock, and the holder's name, as they were
            with pytest.raises(EnvironmentProblem, match=who) as caught:
                directory.lock()
            assert str(directory.path) in str(caught.value)
            assert "run.dir=" in str(caught.value)
            assert directory.in_use_by() == f"process {holder.pid} on {socket.gethostname()}"
    finally:
        holder.kill()
        holder.communicate()
    with directory.lock(), pytest.raises(EnvironmentProblem, match=f"process {os.getpid()} "):
        directory.lock()
    directory.lock().close()
    assert directory.in_use_by() is None
    assert RunDirectory(tmp_path / "never started").in_use_by() is None


def test_the_run_directory_makes_nothing_until_asked(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "a" / "run")
    assert os.listdir(tmp_path) == []
    directory.create()
    directory.create()
    assert sorted(os.listdir(directory.path)) == ["attempts", "checkpoints"]


@pytest.mark.parametrize("way", ["a file", "below a file", "no such device"])
def test_an_unwritable_run_directory(way: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "run",
        "no such device": Path("/proc/run"),
    }[way]
    with pytest.raises(EnvironmentProblem, match="cannot be written") as caught:
        RunDirectory(path).create()
    assert str(path) in str(caught.value)
    assert "run.dir=" in str(caught.value)
    assert caught.value.exit_code == ENVIRONMENT == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable to root")
def test_a_run_directory_without_permission(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    directory.path.chmod(0o500)
    try:
        with pytest.raises(EnvironmentProblem, match="Permission denied"):
            directory.create()
    finally:
        directory.path.chmod(0o700)


def test_attempts_are_numbered(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.create()
    assert directory.new_attempt() == tmp_path / "attempts" / "0001"
    (directory.attempts / "0041").mkdir()
    (directory.attempts / "notes").mkdir()
    assert directory.new_attempt().name == "0042"
    assert (directory.attempts / "0042" / "logs").is_dir()


def test_events_say_when_where_and_who(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.event("launch", procs=2)
    directory.event("save", rank=0, step=7, norm=math.inf)
    launch, save = read_lines(directory.events)
    assert launch.keys() == {"time", "event", "host", "pid", "procs"}
    assert (save["rank"], save["step"], save["norm"]) == (0, 7, "inf")
    assert (save["pid"], save["host"]) == (os.getpid(), socket.gethostname())
    assert launch["time"] <= save["time"]


def test_the_heartbeat_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    assert Heartbeat.read(path) == (0, "starting", 0.0)
    path.write_bytes(b"short")
    assert Heartbeat.read(path) == (0, "starting", 0.0)
    path.unlink()
    heart = Heartbeat(path)
    assert path.stat().st_size == 24
    assert Heartbeat.read(path) == (0, "starting", 0.0)
    last = 0.0
    for step, phase in enumerate(PHASES):
        heart.beat(step * 10**12, phase)
        found = Heartbeat.read(path)
        assert found[:2] == (step * 10**12, phase)
        assert found[2] >= last > -1
        last = found[2]
    with pytest.raises(ValueError, match="not in tuple"):
        heart.beat(1, "unheard")
    assert Heartbeat.read(path)[1] == PHASES[-1]


def test_a_heartbeat_outlives_the_process_that_beat(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from distdl.record import Heartbeat;"
        "Heartbeat(Path(sys.argv[1])).beat(41, 'saving'); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "heartbeat"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
    assert done.returncode == -9
    assert Heartbeat.read(path)[:2] == (41, "saving")
