"""What a person sees while it runs, and what a failing rank leaves behind."""

from __future__ import annotations

import io
import json
import os
import re
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from distdl.comm import PeerFailed
from distdl.errors import DataError
from distdl.observe.console import RunConsole, show
from distdl.observe.failure import is_consequence, report_failure
from distdl.record import RunDirectory

ROW = {"loss": 0.51239, "lr": 0.05, "samples_per_s": 12345.6, "epoch": 0.5, "eta_s": 3725.0}


class Terminal:
    """A pseudo-terminal: something to write on, and what a person saw there."""

    def __enter__(self) -> Terminal:
        self._master, slave = os.openpty()
        self.file = os.fdopen(slave, "w", buffering=1)
        os.set_blocking(self._master, False)
        self._seen = b""
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        os.close(self._master)

    def seen(self) -> str:
        self.file.flush()
        try:
            while True:
                self._seen += os.read(self._master, 65536)
        except BlockingIOError:
            return self._seen.decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole(200, quiet=False, terminal=io.StringIO())
    console.step(1, None)
    console.step(10, ROW)
    console.say("saved")
    console.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 10/200  epoch 0.50  loss 0.5124  lr 0.05  12,346 samples/s  ETA 1:02:05",
        "saved",
    ]


@pytest.mark.parametrize(
    ("seconds", "clock"), [(0.4, "0:00"), (61, "1:01"), (3599.9, "59:59"), (7322, "2:02:02")]
)
def test_time_left(seconds: float, clock: str, capsys: pytest.CaptureFixture[str]) -> None:
    RunConsole(9, quiet=False, terminal=io.StringIO()).step(1, ROW | {"eta_s": seconds})
    assert capsys.readouterr().out.endswith(f"ETA {clock}\n")


@pytest.mark.usefixtures("terminal")
def test_a_bar_on_a_terminal() -> None:
    with Terminal() as screen:
        console = RunConsole(200, quiet=False, terminal=screen.file)
        console.step(10, ROW)
        console.step(150, ROW)
        console.close()
        seen = screen.seen()
        assert re.search(r"150/200", seen)
        assert "━" in seen
        assert "loss 0.5124" in seen
        assert "epoch" not in seen
        assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1  # the cursor is given back
        console.close()
        console.step(160, None)
        assert screen.seen() == seen


@pytest.mark.usefixtures("terminal")
def test_a_quiet_rank_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal() as screen:
        console = RunConsole(200, quiet=True, terminal=screen.file)
        console.step(10, ROW)
        console.say("saved")
        console.close()
        assert screen.seen() == ""
    assert capsys.readouterr().out == ""


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    show("finished", {"test accuracy": 0.91, "run directory": "runs/x"})
    out = capsys.readouterr().out
    assert out.splitlines()[0].strip() == "finished"
    assert re.search(r"test accuracy\s+│ 0\.91", out)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PeerFailed("[rank 1/2 on a] KeyError: 'x'"), True),
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistNetworkError("timed out"), True),
        (dist.DistStoreError("wait timeout"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:9"), True),
        (RuntimeError("Connection reset by peer"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("gloo"), False),
        (ConnectionError("Connection reset by peer"), False),  # a user's own download, say
        (DataError("no such file"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_a_cause_is_told_from_a_consequence(error: BaseException, expected: bool) -> None:
    assert is_consequence(error) is expected


def test_a_report_goes_to_the_newest_attempt(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.create()
    first, second = directory.new_attempt(), directory.new_attempt()
    try:
        raise KeyError("label")
    except KeyError as error:
        report = report_failure(directory, 3, error)
    assert not (first / "failures").exists()
    assert os.listdir(second / "failures") == ["rank-00003.json"]
    assert json.loads((second / "failures" / "rank-00003.json").read_text()) == report
    assert (report["rank"], report["exception"], report["message"]) == (3, "KeyError", "'label'")
    assert (report["pid"], report["host"]) == (os.getpid(), socket.gethostname())
    assert report["consequence"] is False
    assert 'raise KeyError("label")' in report["traceback"]
