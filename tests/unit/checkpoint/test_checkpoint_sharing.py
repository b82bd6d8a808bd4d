from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distdl.checkpoint.sharing import share_out

sizes = st.dictionaries(st.text(max_size=6), st.integers(0, 1 << 40), max_size=40)


@given(sizes, st.integers(1, 9))
def test_every_tensor_goes_to_exactly_one_rank(sizes: dict[str, int], world: int) -> None:
    shares = share_out(sizes, world)
    assert len(shares) == world
    assert sorted(n for share in shares for n in share) == sorted(sizes)


@given(sizes, st.integers(1, 9))
def test_no_rank_writes_more_than_the_mean_and_the_largest(sizes: dict[str, int], world: int) -> None:
    loads = [sum(sizes[n] for n in share) for share in share_out(sizes, world)]
    assert max(loads) * world <= sum(sizes.values()) + max(sizes.values(), default=0) * world


@given(sizes, st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_order_of_names_does_not_matter(sizes: dict[str, int], world: int, random: object) -> None:
    shuffled = list(sizes.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert share_out(dict(shuffled), world) == share_out(sizes, world)


def test_a_known_case() -> None:
    assert share_out({"a": 5, "b": 4, "c": 3, "d": 1}, 2) == [["a", "d"], ["b", "c"]]
    assert share_out({"a": 1}, 3) == [["a"], [], []]
