from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distdl.checkpoint.sharing import share_out

sizes = st.dictionaries(st.text(max_size=6), st.integers(0, 1 << 40), max_size=40)


@given(sizes, st.integers(1, 9))
def test_every_tensor_goes_to_exactly_one_rank(sizes: dict[str, int], world: int) -> None:
    shares = share_out(sizes, [0] * world)
    assert len(shares) == world
    assert sorted(n for share in shares for n in share) == sorted(sizes)


@given(sizes, st.integers(1, 9))
def test_no_rank_writes_more_than_the_mean_and_the_largest(sizes: dict[str, int], world: int) -> None:
    loads = [sum(sizes[n] for n in share) for share in share_out(sizes, [0] * world)]
    assert max(loads) * world <= sum(sizes.values()) + max(sizes.values(), default=0) * world


@given(sizes, st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_order_of_names_does_not_matter(sizes: dict[str, int], world: int, random: object) -> None:
    shuffled = list(sizes.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert share_out(dict(shuffled), [0] * world) == share_out(sizes, [0] * world)


def test_a_known_case() -> None:
    assert share_out({"a": 5, "b": 4, "c": 3, "d": 1}, [0, 0]) == [["a", "d"], ["b", "c"]]
    assert share_out({"a": 1}, [0, 0, 0]) == [["a"], [], []]


@given(sizes, st.lists(st.integers(0, 1 << 40), min_size=1, max_size=9))
def test_what_ranks_write_in_any_case_is_counted(sizes: dict[str, int], loads: list[int]) -> None:
    """A rank gets something only while no other has less."""
    shares = share_out(sizes, loads)
    total = [load + sum(sizes[n] for n in share) for load, share in zip(loads, shares, strict=True)]
    for rank, share in enumerate(shares):
        if share:
            assert total[rank] - min(sizes[n] for n in share) <= min(total)
