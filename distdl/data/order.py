"""`Order`: (seed, epoch, position) -> sample id, in constant memory and with random access.

The permutation is a Feistel network over [a] x [b] with a * b just above the number of rows (the unbalanced,
alternating form of Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, also used by
NIST's FF1); an output outside the rows is encrypted again until it falls inside ("cycle walking", same
paper), which keeps the map a bijection. At most a - 1 of the a * b points lie outside: walking is rare.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distdl.keys import key

Ids = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

MAX_ROWS = 2**62
"""Above this, a * b and the sums in a round could leave 64 bits."""

# Each half passes through half of them. Luby and Rackoff need four for large domains; small ones need more
# before rare permutations show up as often as they should.
_ROUNDS = 12


@dataclass(frozen=True)
class Order:
    """The order in which the `rows` samples of a dataset are visited: a permutation for each epoch.

    Pure: no state, no memory that grows with `rows`, the same on every rank, machine and version of numpy.
    With `shuffle` False every epoch is 0, 1, 2, ...
    """

    seed: int
    rows: int
    shuffle: bool

    def __post_init__(self) -> None:
        if not 0 <= self.rows <= MAX_ROWS:
            raise ValueError(f"rows is {self.rows}; an order has 0 to {MAX_ROWS} rows")

    def ids(self, epoch: int, start: int, stop: int) -> Ids:
        """Sample ids (int64 [stop - start]) at positions `start` .. `stop` - 1 of `epoch`."""
        return self.at(epoch, np.arange(start, stop, dtype=np.int64))

    def at(self, epoch: int, positions: Ids) -> Ids:
        """Sample ids (int64, shape of `positions`) at any positions (int64) of `epoch`.

        Raises ValueError for a position outside 0 .. rows - 1.
        """
        if positions.size and not (positions.min() >= 0 and positions.max() < self.rows):
            raise ValueError(
                f"positions {positions.min()} to {positions.max()} asked for; "
                f"an epoch of {self.rows} rows has positions 0 to {self.rows - 1}"
            )
        if not self.shuffle or self.rows < 2:
            return positions.copy()
        keys = _round_keys(self.seed, epoch)
        return _permute(positions.astype(np.uint64), self.rows, keys).astype(np.int64)


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(key(seed, "order", epoch, number) for number in range(_ROUNDS))


def _permute(values: _Words, rows: int, keys: tuple[int, ...]) -> _Words:
    """A bijection of 0 .. rows - 1, element by element."""
    a = math.isqrt(rows - 1) + 1
    b = -(-rows // a)
    out = _feistel(values, a, b, keys)
    outside = np.flatnonzero(out >= rows)
    while outside.size:
        out[outside] = _feistel(out[outside], a, b, keys)
        outside = outside[out[outside] >= rows]
    return out


def _feistel(values: _Words, a: int, b: int, keys: tuple[int, ...]) -> _Words:
    """A bijection of 0 .. a * b - 1: each round shifts one half by a keyed hash of the other."""
    mod_a, mod_b = np.uint64(a), np.uint64(b)
    left, right = values // mod_b, values % mod_b
    for number, round_key in enumerate(keys):
        word = np.uint64(round_key)
        if number % 2 == 0:
            left = (left + _mix(right + word) % mod_a) % mod_a
        else:
            right = (right + _mix(left + word) % mod_b) % mod_b
    return left * mod_b + right


def _mix(words: _Words) -> _Words:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014; constants: Stafford's variant 13)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
