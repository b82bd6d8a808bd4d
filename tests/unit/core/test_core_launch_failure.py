"""`failure.json` names the cause, not one of its consequences."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from distdl.launch.failure import Casualty, find_failure, first_failure, lost_node, write_failure


class Attempt:
    """An attempt's folder, with what ranks leave in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "logs").mkdir(parents=True)

    def report(self, rank: int, *, time: float, consequence: bool, exception: str = "ValueError") -> None:
        value = {
            "rank": rank,
            "exception": exception,
            "message": f"of rank {rank}",
            "traceback": f"Traceback of rank {rank}",
            "consequence": consequence,
            "time": time,
        }
        (self.path / "failures").mkdir(exist_ok=True)
        (self.path / "failures" / f"rank-{rank:05d}.json").write_text(json.dumps(value))

    def log(self, rank: int, text: str) -> None:
        (self.path / "logs" / f"rank-{rank:05d}.log").write_text(text)

    def failure(self, *casualties: tuple[int, int]) -> dict[str, Any]:
        here = find_failure(self.path, [Casualty(r, 1000 + r, code) for r, code in casualties], node=0)
        found = first_failure([here], step=17, phase="saving")
        write_failure(self.path, found)
        assert json.loads((self.path / "failure.json").read_text()) == found
        return found


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt(tmp_path / "0001")


KILLED = -signal.SIGKILL


def test_a_killed_rank_comes_before_its_consequences(attempt: Attempt) -> None:
    attempt.report(0, time=1.0, consequence=True, exception="RuntimeError")
    attempt.report(1, time=2.0, consequence=True, exception="RuntimeError")
    found = attempt.failure((0, 70), (1, 70), (2, KILLED))
    assert (found["rank"], found["pid"]) == (2, 1002)
    assert found["cause"].startswith("ended by SIGKILL (out of memory, if nobody sent it")
    assert found["traceback"] is None
    assert found["all_failed"] == [
        {"rank": 0, "exitcode": 70},
        {"rank": 1, "exitcode": 70},
        {"rank": 2, "exitcode": KILLED},
    ]


def test_a_killed_rank_comes_before_what_other_ranks_raised(attempt: Attempt) -> None:
    """A lost peer may surface as any exception, in a user's code too; nothing but a cause kills a process."""
    attempt.report(0, time=1.0, consequence=False)
    assert attempt.failure((0, 70), (1, KILLED))["rank"] == 1


def test_an_exception_comes_before_its_consequences_even_if_told_later(attempt: Attempt) -> None:
    attempt.report(0, time=1.0, consequence=True, exception="PeerFailed")
    attempt.report(1, time=3.0, consequence=False)
    attempt.report(2, time=2.0, consequence=True, exception="RuntimeError")
    found = attempt.failure((0, 70), (1, 70), (2, 70))
    assert found["rank"] == 1
    assert found["cause"] == "ValueError: of rank 1"
    assert found["traceback"] == "Traceback of rank 1"


def test_of_several_causes_the_earliest(attempt: Attempt) -> None:
    attempt.report(0, time=9.0, consequence=False)
    attempt.report(1, time=3.0, consequence=False)
    assert attempt.failure((0, 70), (1, 70))["rank"] == 1


def test_a_report_alone_does_not_make_a_casualty(attempt: Attempt) -> None:
    """A rank that reported and has not ended yet cannot be named over one that has."""
    attempt.report(0, time=1.0, consequence=False)
    attempt.report(1, time=2.0, consequence=True)
    assert attempt.failure((1, 70))["rank"] == 1


@pytest.mark.parametrize(
    ("exitcode", "cause"),
    [
        (-signal.SIGSEGV, "ended by SIGSEGV"),
        (-signal.SIGTERM, "ended by SIGTERM"),
        (1, "ended with exit code 1"),
    ],
)
def test_causes_without_a_report(attempt: Attempt, exitcode: int, cause: str) -> None:
    assert attempt.failure((0, exitcode))["cause"] == cause


def test_where_it_stood_and_its_last_words(attempt: Attempt) -> None:
    attempt.log(0, "not this one")
    attempt.log(1, "".join(f"line {i}\n" for i in range(50)) + "last words \ufffd")
    found = attempt.failure((1, KILLED))
    assert (found["step"], found["phase"]) == (17, "saving")
    assert found["log"] == str(attempt.path / "logs" / "rank-00001.log")
    assert found["log_tail"].splitlines() == [f"line {i}" for i in range(31, 50)] + ["last words \ufffd"]


def test_before_anything_was_written(attempt: Attempt) -> None:
    found = attempt.failure((0, 1))
    assert (found["traceback"], found["log_tail"]) == (None, "")


def test_of_several_nodes_the_one_that_failed_first(attempt: Attempt) -> None:
    attempt.report(0, time=1.0, consequence=True, exception="RuntimeError")
    on_0 = find_failure(attempt.path, [Casualty(0, 1000, 70)], node=0)
    on_1 = find_failure(attempt.path, [Casualty(1, 1001, KILLED)], node=1)
    found = first_failure([on_0, on_1], step=3, phase="step")
    assert (found["node"], found["rank"], found["step"]) == (1, 1, 3)
    assert found["all_failed"] == [{"rank": 0, "exitcode": 70}, {"rank": 1, "exitcode": KILLED}]
    assert "order" not in found


def test_a_lost_node_is_named_with_its_host() -> None:
    found = first_failure([lost_node(1, "gpu07", range(4, 6))], step=3, phase="step")
    assert found["cause"].startswith("node 1 (gpu07) with ranks 4, 5 is lost")
    assert lost_node(1, None, ())["cause"].startswith("node 1 is lost")
    assert "order" not in found
    assert (found["rank"], found["node"], found["step"]) == (None, 1, 3)
