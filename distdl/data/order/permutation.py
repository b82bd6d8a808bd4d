"""Keyed permutations of 0 .. size - 1, computed element by element: what every shuffled order is made of.

A permutation is a Feistel network over [a] x [b] with a * b just above the size (the unbalanced, alternating
form of Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, also used by NIST's FF1); an
output outside is encrypted again until it falls inside ("cycle walking", same paper), which keeps the map a
bijection. At most a - 1 of the a * b points lie outside: walking is rare.

A *tweak* (Liskov, Rivest, Wagner, "Tweakable Block Ciphers", CRYPTO 2002) chooses one of a family of
permutations under the same keys, element by element. So one call serves positions of many windows, each of
which is permuted by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distdl.keys import key

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

MAX_ROWS = 2**62
"""Above this, a * b and the sums in a round could leave 64 bits."""

# Each half passes through half of them. Luby and Rackoff need four for large domains; small ones need more
# before rare permutations show up as often as they should.
_ROUNDS = 12


@functools.lru_cache(maxsize=256)
def round_keys(seed: int, purpose: str, *numbers: int) -> tuple[int, ...]:
    """The 64-bit keys of a permutation, one a round; `purpose` and `numbers` as in `distdl.keys.key`."""
    return tuple(key(seed, purpose, *numbers, number) for number in range(_ROUNDS))


def permute(values: Ints, size: int | Ints, keys: tuple[int, ...], tweak: int | Words | None = None) -> Ints:
    """Where the permutation takes `values` (int64 [n], each 0 .. size - 1) -> int64 [n].

    `size` and `tweak` are one for all values, or arrays [n] with one for each value: values that share both
    are permuted among themselves. Only integer arithmetic: the same on every machine. `values` that are not
    below their size give nonsense; the caller checks. Time: one pass of 12 rounds, whatever the size.
    """
    if not values.size:
        return values.copy()
    domain = _domain(size, tweak)
    out = _feistel(values.astype(np.uint64), domain, keys)
    outside = np.flatnonzero(out >= domain.size)
    while outside.size:
        out[outside] = _feistel(out[outside], domain.of(outside), keys)
        outside = outside[out[outside] >= domain.of(outside).size]
    return out.astype(np.int64)


def check_positions(positions: Ints, rows: int) -> None:
    """Refuse positions that an epoch of `rows` rows does not have. Raises ValueError."""
    if positions.size and not (positions.min() >= 0 and positions.max() < rows):
        raise ValueError(
            f"positions {positions.min()} to {positions.max()} asked for; "
            f"an epoch of {rows} rows has positions 0 to {rows - 1}"
        )


def check_rows(rows: int) -> None:
    """Refuse a number of rows that no permutation here can have. Raises ValueError."""
    if not 0 <= rows <= MAX_ROWS:
        raise ValueError(f"rows is {rows}; an order has 0 to {MAX_ROWS} rows")


_AT_ONCE = 1 << 14
"""Tweaks that are mixed for all rounds in one go: for few, to call numpy takes longer than to compute."""
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(words: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014; constants: Stafford's variant 13)."""
    return _mixed(words.copy())


def _mixed(words: Words) -> Words:
    """`mix`, written over `words`: fresh memory for each step would take as long as the arithmetic."""
    shifted = words >> _S30
    words ^= shifted
    words *= _M1
    np.right_shift(words, _S27, out=shifted)
    words ^= shifted
    words *= _M2
    np.right_shift(words, _S31, out=shifted)
    words ^= shifted
    return words


@dataclass(frozen=True)
class _Domain:
    """Sizes, halves and tweaks: uint64 arrays of one element for all values, or of one for each."""

    size: Words
    a: Words
    b: Words
    tweak: Words | None

    def of(self, chosen: npt.NDArray[np.intp]) -> _Domain:
        """The domain of some of the values."""
        size, a, b = (_chosen(field, chosen) for field in (self.size, self.a, self.b))
        return _Domain(size, a, b, None if self.tweak is None else _chosen(self.tweak, chosen))


def _chosen(field: Words, chosen: npt.NDArray[np.intp]) -> Words:
    return field if field.size == 1 else field[chosen]


def _domain(size: int | Ints, tweak: int | Words | None) -> _Domain:
    sizes = _one_if_equal(np.atleast_1d(np.asarray(size, dtype=np.uint64)))
    tweaks = None
    if tweak is not None:
        tweaks = _one_if_equal(np.atleast_1d(np.asarray(tweak, dtype=np.uint64)))
    if sizes.size == 1:
        a, b = _halves(int(sizes[0]))
        return _Domain(sizes, _word(a), _word(b), tweaks)
    distinct, place = np.unique(sizes, return_inverse=True)
    table = np.array([_halves(int(one)) for one in distinct], dtype=np.uint64)
    return _Domain(sizes, table[place, 0], table[place, 1], tweaks)


def _one_if_equal(field: Words) -> Words:
    """One element broadcasts, and is mixed once: most batches lie in one window."""
    return field[:1] if field.size > 1 and (field == field[0]).all() else field


def _word(number: int) -> Words:
    return np.array([number], dtype=np.uint64)


def _halves(size: int) -> tuple[int, int]:
    """a, b: near the square root, a * b >= size. In integers: a float's root is wrong above 2**52."""
    a = math.isqrt(size - 1) + 1
    return a, -(-size // a)


def _feistel(values: Words, domain: _Domain, keys: tuple[int, ...]) -> Words:
    """A bijection of 0 .. a * b - 1: each round shifts one half by a keyed hash of the other."""
    a, b = domain.a, domain.b
    left, right = values // b, values % b
    for number, word in enumerate(_words(keys, domain.tweak)):
        if number % 2 == 0:
            left = _shifted(left, _mixed(right + word), a)
        else:
            right = _shifted(right, _mixed(left + word), b)
    left *= b
    left += right
    return left


def _words(keys: tuple[int, ...], tweak: Words | None) -> Iterable[Words]:
    """By round, what is added before the hash: its key, mixed with the tweaks if there are any."""
    words = np.array(keys, dtype=np.uint64)[:, None]
    if tweak is None:
        return words
    if tweak.size > _AT_ONCE:
        return (_mixed(tweak + word) for word in words)
    return _mixed(tweak + words)


def _shifted(half: Words, by: Words, size: Words) -> Words:
    """(half + by) % size for half < size <= 2**32, written over `by`. Two thirds of the time that `%` takes:
    numpy divides by one number with multiplications, but has no such way to a remainder.
    """
    whole = by // size
    whole *= size
    by -= whole
    by += half
    np.subtract(by, size, out=whole)
    np.minimum(by, whole, out=by)  # below zero wraps round to a number that is not the minimum
    return by
