"""`distdl doctor` as a person starts it: alone, and as every process of a job."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from distdl import errors
from distdl.testing.worlds import PRELOAD
from tests.commands import _command, distdl


def free_port() -> int:
    with socket.create_server(("", 0)) as it:
        return int(it.getsockname()[1])


def start_all(folder: Path, processes: list[Mapping[str, str]], *options: str) -> list[tuple[int, str]]:
    """One `distdl doctor` for each environment, all at once: their exit codes and what they printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    started = []
    for number, env in enumerate(processes):
        output = folder / f"output-{number}"
        # torch sets the number of threads in the process that starts these
        whole = {n: v for n, v in os.environ.items() if n != "OMP_NUM_THREADS"} | dict(env)
        given = (str(output), str(folder), whole, ["doctor", *options])
        process = context.Process(target=_command, args=given)
        process.start()
        started.append((process, output))
    for process, _ in started:
        process.join(60)
        assert process.exitcode is not None, "still running after 60 s"
    return [(process.exitcode or 0, output.read_text()) for process, output in started]


def ranks(*numbers: int, world: int, port: int, host: str = "127.0.0.1") -> list[Mapping[str, str]]:
    """The variables that a launcher sets."""
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in numbers]


def test_alone_on_a_healthy_machine(tmp_path: Path) -> None:
    code, output = distdl("doctor", "--json", cwd=tmp_path)
    told = json.loads(output)
    assert (code, told["exit_code"]) == (errors.DONE, errors.DONE)
    assert [f for f in told["findings"] if f["status"] in ("warn", "fail")] == []
    assert list(tmp_path.iterdir()) == []


def test_what_would_fail_ends_with_3_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    code, output = distdl("doctor", cwd=tmp_path)
    assert code == errors.ENVIRONMENT
    problem, advice, summary = output.splitlines()[-3:]
    assert problem.split() == ["fail", "temporary", "files", *problem.split()[3:]]
    assert str(tmp_path / "nowhere") in problem
    assert "do: set TMPDIR" in advice
    assert summary.startswith("1 fail, ")


def test_two_healthy_processes_meet_and_rank_0_speaks(tmp_path: Path) -> None:
    (code, output), (other, silent) = start_all(tmp_path, ranks(0, 1, world=2, port=free_port()))
    assert (code, other, silent) == (errors.DONE, errors.DONE, "")
    assert "2 on 1 node(s)" in output
    assert " with gloo over 2 processes" in output
    assert "warn " not in output, output


def test_processes_that_are_missing_or_doubled_are_named(tmp_path: Path) -> None:
    """All the same exit with 3: rank 1 of 3 came twice, rank 2 never."""
    them = ranks(0, 1, 1, world=3, port=free_port())
    (code, output), *others = start_all(tmp_path, them, "--wait", "10")
    assert [code, *(c for c, _ in others)] == [errors.ENVIRONMENT] * 3
    assert "rank 1 was started twice" in output
    assert "1 did not answer: rank 2" in output
    assert "left out" in output  # no process group is formed that would only wait


def test_one_process_says_why_it_cannot_meet_the_others(tmp_path: Path) -> None:
    port = free_port()
    told = start_all(tmp_path, ranks(1, world=2, port=port), "--wait", "1")
    told += start_all(tmp_path, ranks(0, world=2, port=port, host="no-such-host.invalid"), "--wait", "1")
    assert [code for code, _ in told] == [errors.ENVIRONMENT] * 2
    assert f"cannot reach 127.0.0.1:{port}: Connection refused for 1 s" in told[0][1]
    assert "[rank 1 on " in told[0][1]
    assert "MASTER_ADDR=no-such-host.invalid does not resolve" in told[1][1]
