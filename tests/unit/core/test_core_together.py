"""Errors as values: what fails on one rank fails on all, with its cause. On ranks that are threads."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from core_support import on_threads

from distdl import errors
from distdl.comm import PeerFailed, World, share_problem, together


def outcome(size: int, action: Callable[[int], Any]) -> list[Any]:
    return on_threads(size, lambda world: together(world, lambda: action(world.rank)))


def test_values_where_all_succeed() -> None:
    assert outcome(3, lambda rank: rank * 10) == [0, 10, 20]
    assert together(World(), lambda: "alone") == "alone"


def raises(error: Exception, on: int) -> Callable[[int], int]:
    def action(rank: int) -> int:
        if rank == on:
            raise error
        return rank

    return action


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.RecipeError("r"), errors.RecipeError),
        (errors.PlanError("r"), errors.RecipeError),
        (errors.EnvironmentProblem("r"), errors.EnvironmentProblem),
        (errors.CheckpointError("r"), errors.CheckpointError),
        (errors.Incompatible("r"), errors.CheckpointError),
        (errors.Corrupt("r"), errors.CheckpointError),
        (errors.DataError("r"), errors.DataError),
        (errors.Diverged("r"), errors.Diverged),
        (errors.EngineError("r"), errors.EngineError),
    ],
)
def test_a_distdl_error_is_raised_on_all_with_its_code(
    error: errors.DistdlError, kind: type[errors.DistdlError]
) -> None:
    found = outcome(3, raises(error, on=1))
    assert found[1] is error
    for other in (found[0], found[2]):
        assert type(other) is kind
        assert other.exit_code == error.exit_code
        assert str(other) == f"[rank 1/3 on {socket.gethostname()}] r"


def test_any_other_error_is_a_peers_failure() -> None:
    error = KeyError("label")
    found = outcome(2, raises(error, on=0))
    assert found[0] is error
    assert type(found[1]) is PeerFailed
    assert str(found[1]) == f"[rank 0/2 on {socket.gethostname()}] KeyError: 'label'"
    assert found[1].exit_code == errors.RANK_FAILED


def test_every_failing_rank_keeps_its_own_and_the_rest_hear_the_first() -> None:
    mine = {1: errors.DataError("one"), 2: errors.Corrupt("two")}

    def action(rank: int) -> None:
        if rank in mine:
            raise mine[rank]

    found = outcome(4, action)
    assert found[1] is mine[1]
    assert found[2] is mine[2]
    assert [type(found[r]) for r in (0, 3)] == [errors.DataError] * 2
    assert all("[rank 1/4 on" in str(found[r]) for r in (0, 3))


def test_alone() -> None:
    with pytest.raises(errors.DataError, match=r"^r$"):
        together(World(), lambda: raises(errors.DataError("r"), on=0)(0))
    share_problem(World(), None)


def test_a_request_to_end_the_process_is_not_held_back() -> None:
    """Nor does it take part in a collective while it unwinds."""

    def leave() -> None:
        raise KeyboardInterrupt

    class Alone(World):
        def gather(self, value: Any) -> list[Any]:
            raise AssertionError("a collective while an exception unwinds")

    with pytest.raises(KeyboardInterrupt):
        together(Alone(), leave)
