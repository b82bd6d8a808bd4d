"""The test kit itself: faults happen where and when they are asked for, and parity sees a single bit."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

import distdl.testing
from distdl.testing import assert_same_bits, fail_at, worst
from distdl.testing.faults import InjectedFault, parse, point
from distdl.testing.parity import relative_error


def test_an_unarmed_point_does_nothing() -> None:
    point("save.begin")
    point("train.step", 4)


def test_a_fault_happens_once_at_its_point() -> None:
    with fail_at(0, "save.begin"):
        point("save.end")
        with pytest.raises(InjectedFault, match=r"injected at save\.begin"):
            point("save.begin")
        point("save.begin")
    point("save.begin")


def test_a_fault_at_a_step() -> None:
    with fail_at(None, "train.step@40"):
        for step in (0, 4, 39, 41, 400):
            point("train.step", step)
        with pytest.raises(InjectedFault):
            point("train.step", 40)
    with fail_at(None, "train.step"), pytest.raises(InjectedFault):
        point("train.step", 7)


@pytest.mark.parametrize(("rank", "mine", "happens"), [(1, 1, True), (1, 0, False), (None, 3, True)])
def test_a_fault_belongs_to_a_rank(rank: int | None, mine: int, happens: bool) -> None:
    with fail_at(rank, "here", "enospc", my_rank=mine):
        if happens:
            with pytest.raises(OSError, match="No space left") as caught:
                point("here")
            assert caught.value.errno == errno.ENOSPC
        else:
            point("here")


def test_the_rank_of_before_comes_back() -> None:
    with fail_at(0, "here"):
        with fail_at(5, "there", my_rank=5):
            point("here")
        with pytest.raises(InjectedFault):
            point("here")


def test_an_armed_fault_that_never_happened_is_taken_back() -> None:
    with pytest.raises(ZeroDivisionError), fail_at(0, "never"):
        raise ZeroDivisionError
    point("never")


def test_the_syntax() -> None:
    faults = parse("1:save.hashed:kill,*:train.step@40:raise,")
    assert [(f.rank, f.point, f.action, f.spent) for f in faults] == [
        (1, "save.hashed", "kill", False),
        (None, "train.step@40", "raise", False),
    ]
    assert parse("") == []


@pytest.mark.parametrize("text", ["kill", "1:save.begin", "one:save.begin:kill", "1:a:b:c"])
def test_what_does_not_follow_the_syntax(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


WORKER = """
import os, signal, sys
from distdl.testing import faults
got = []
signal.signal(signal.SIGUSR1, lambda n, f: got.append(n))
faults.arm_from_environment(rank=int(sys.argv[1]))
faults.point("train.step", 1)
faults.point("train.step", 2)
print(f"alive {len(got)}", flush=True)
"""


@pytest.mark.parametrize(
    ("fault", "rank", "code", "out"),
    [
        ("", 0, 0, "alive 0"),
        ("1:train.step@2:kill", 1, -signal.SIGKILL, ""),
        ("1:train.step@2:kill", 0, 0, "alive 0"),
        ("*:train.step@2:raise", 0, 1, ""),
        ("0:train.step@1:USR1,0:train.step@2:USR1", 0, 0, "alive 2"),
        ("0:train.step@1:USR1>all", 0, 0, "alive 1"),
        ("0:train.step@1:TERM", 0, -signal.SIGTERM, ""),
    ],
)
def test_faults_from_the_environment(fault: str, rank: int, code: int, out: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(rank)],
        env={**os.environ, "DISTDL_FAIL_AT": fault},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        start_new_session=True,  # `>all` means its process group, and not that of the tests
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.strip() == out
    assert ("InjectedFault: injected at train.step" in done.stderr) == fault.endswith("raise")


def test_a_signal_to_the_launcher() -> None:
    sent: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: sent.append(number))
    try:
        done = subprocess.run(
            [sys.executable, "-c", WORKER, "0"],
            env={
                **os.environ,
                "DISTDL_FAIL_AT": "0:train.step@2:USR1>launcher",
                "DISTDL_LAUNCHER_PID": str(os.getpid()),
            },
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert done.stdout == "alive 0\n"
    assert sent == [signal.SIGUSR1]


def tensors(**values: torch.Tensor) -> dict[str, torch.Tensor]:
    return values


def test_the_same_bits() -> None:
    a = tensors(w=torch.tensor([1.0, math.nan, -0.0]), n=torch.tensor(3), e=torch.empty(0))
    assert_same_bits(a, {k: v.clone() for k, v in a.items()})
    strided = torch.arange(6.0).reshape(2, 3).t()
    assert_same_bits(tensors(w=strided), tensors(w=strided.contiguous()))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1.0]), torch.nextafter(torch.tensor([1.0]), torch.tensor(2.0))),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
        (torch.zeros(1, dtype=torch.int32), torch.zeros(1)),
        (torch.zeros(2), torch.zeros(3)),
    ],
)
def test_a_single_bit_is_seen(a: torch.Tensor, b: torch.Tensor) -> None:
    same = torch.ones(2)
    with pytest.raises(AssertionError, match=r"1 of 2 tensors differ, among them \['w'\]"):
        assert_same_bits(tensors(w=a, same=same), tensors(w=b, same=same))


def test_other_names_are_seen() -> None:
    one, two = tensors(w=torch.ones(1)), tensors(v=torch.ones(1))
    for compare in (assert_same_bits, worst):
        with pytest.raises(AssertionError, match=r"only in one: \['v', 'w'\]"):
            compare(one, two)


def test_the_worst_tensor_is_named() -> None:
    b = tensors(small=torch.tensor([1.0, 0.0]), large=torch.tensor([1000.0]))
    a = tensors(small=torch.tensor([1.0, 0.01]), large=torch.tensor([1000.5]))
    name, error = worst(a, b)
    assert name == "small"
    assert error == pytest.approx(0.01)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    # In float64: the squares of these overflow or vanish in float32.
    assert relative_error(torch.tensor([2e30]), torch.tensor([1e30])) == pytest.approx(1.0)
    assert relative_error(torch.tensor([2e-30]), torch.tensor([1e-30])) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_the_worst(bad: float) -> None:
    b = tensors(v=torch.ones(2), w=torch.ones(2), x=torch.ones(2))
    for name in b:
        a = {**b, "w": torch.tensor([1.0, 1.1]), name: torch.tensor([1.0, bad])}
        assert worst(a, b) == (name, math.inf)
        assert worst(b, a) == (name, math.inf)
    assert relative_error(torch.ones(1), torch.zeros(1)) == math.inf


def test_shapes_are_not_stretched_to_fit() -> None:
    with pytest.raises(AssertionError, match=r"shapes differ: \(3,\) and \(1,\)"):
        relative_error(torch.ones(3), torch.ones(1))


def test_the_kit_is_what_it_says() -> None:
    assert all(callable(getattr(distdl.testing, name)) for name in distdl.testing.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = distdl.testing.nothing
