"""`World`'s collectives, in real processes."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from distdl import errors
from distdl.comm import PeerFailed, World, together
from distdl.testing import WorldFailed, run_world

VALUES: list[Any] = [
    None,
    {"name": "ü" * 3000, "list": [1, 2.5, True, None]},
    [],
]


def collectives(world: World) -> dict[str, Any]:
    rank = world.rank
    world.barrier()
    rows = torch.arange(rank * 10, rank * 10 + 4 * rank, dtype=torch.float64).reshape(-1, 2)
    counts = [2 * r for r in range(world.size)]
    signed = torch.tensor([[-0.0, float("nan")]] * (1 - rank % 2))
    return {
        "main": world.is_main,
        "sum": world.sum_ints([rank, 1, 2**52 + rank]),
        "gather": world.gather(VALUES[rank]),
        "from_main": world.from_main({"path": "x"} if world.is_main else "ignored"),
        "rows": world.gather_rows(rows, counts),
        "signed": world.gather_rows(signed.reshape(-1, 2), [1 - r % 2 for r in range(world.size)]),
        "initialised": torch.distributed.is_initialized(),
    }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_collectives(size: int) -> None:
    found = run_world(collectives, size)
    ranks = range(size)
    assert [f["main"] for f in found] == [r == 0 for r in ranks]
    expected_rows = torch.cat(
        [torch.arange(r * 10, r * 10 + 4 * r, dtype=torch.float64).reshape(-1, 2) for r in ranks]
    )
    for f in found:
        assert f["sum"] == [sum(ranks), size, size * 2**52 + sum(ranks)]
        assert f["gather"] == VALUES[:size]
        assert f["from_main"] == {"path": "x"}
        assert torch.equal(f["rows"], expected_rows)
        assert f["signed"].shape == ((size + 1) // 2, 2)
        assert torch.signbit(f["signed"][:, 0]).all()
        assert f["signed"][:, 1].isnan().all()
        assert f["initialised"] == (size > 1)


def one_rank_fails(world: World, kind: str) -> str:
    def action() -> int:
        if world.rank == 1:
            raise errors.DataError("no rows") if kind == "ours" else KeyError("label")
        return world.rank

    try:
        together(world, action)
    except Exception as error:
        problem = error
    world.barrier()  # all of them are still in step
    return f"{type(problem).__name__}: {problem}"


def test_an_error_on_one_rank_is_raised_on_both() -> None:
    other, own = run_world(one_rank_fails, 2, "ours")
    assert own == "DataError: no rows"
    assert other.startswith("DataError: [rank 1/2 on ")
    assert other.endswith("] no rows")
    other, own = run_world(one_rank_fails, 2, "theirs")
    assert own == "KeyError: 'label'"
    assert other.startswith(f"{PeerFailed.__name__}: [rank 1/2 on ")
    assert other.endswith("KeyError: 'label'")


def breaks(world: World, how: str) -> None:
    if world.rank == 1:
        if how == "raise":
            raise ValueError("of rank 1")
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


@pytest.mark.parametrize(
    ("how", "says"), [("raise", "ValueError: of rank 1"), ("kill", "died without a word")]
)
def test_run_world_tells_every_ranks_story(how: str, says: str) -> None:
    with pytest.raises(WorldFailed, match=f"(?s)--- rank 1 of 2 ---.*{says}"):
        run_world(breaks, 2, how)


def cannot_be_told(world: World) -> Any:
    return lambda: None


def test_run_world_needs_results_that_pickle() -> None:
    with pytest.raises(WorldFailed, match=r"(?s)--- rank 0 of 1 ---.*[Pp]ickle"):
        run_world(cannot_be_told, 1)


def waits_for_ever(world: World) -> None:
    signal.pause()


def test_run_world_has_a_deadline() -> None:
    with pytest.raises(WorldFailed, match=r"no answer within 0\.5 s"):
        run_world(waits_for_ever, 1, deadline_s=0.5)
