"""Random numbers of a row that depend on a key and the row alone, with the same bits on every machine.

numpy promises the raw stream of a bit generator for ever, and that of a `Generator` method such as `normal`
only until it finds a better algorithm (NEP 19). log and cos differ in their last bit from one C library to
another. So everything here is made of raw words by integer arithmetic and by +, -, *, / and sqrt, which IEEE
754 rounds alike everywhere.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from distdl.data.order.permutation import mix
from distdl.data.table.ragged import span_index

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]


def row_words(key: int, rows: int, columns: int) -> Words:
    """Uniform 64-bit words [rows, columns] from Philox under `key`; row i is the same for any `rows`."""
    raw = np.random.Philox(key=key).random_raw(rows * columns)
    return np.asarray(raw, dtype=np.uint64).reshape(rows, columns)


def item_words(key: int, lengths: Ints) -> Words:
    """Uniform 64-bit words [sum of lengths]: `lengths[i]` of them for row i, whatever the other lengths are.

    Row i is the stream of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) that its word from Philox seeds: a
    Philox of its own for each row would be a Python object for each row.
    """
    seeds = row_words(key, len(lengths), 1)[:, 0]
    steps = span_index(np.ones_like(lengths), lengths).astype(np.uint64)
    return mix(np.repeat(seeds, lengths) + steps * np.uint64(0x9E3779B97F4A7C15))


def below(words: Words, limit: int) -> Ints:
    """Integers in 0 .. limit - 1, uniform to within limit / 2**32 (multiply and shift)."""
    return (((words >> np.uint64(32)) * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)


def uniform(words: Words) -> Floats:
    """Multiples of 2**-53 in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(words: Words) -> Floats:
    """Standard normal numbers, by the inverse of the distribution at (top 32 bits + 1/2) / 2**32.

    The largest is 6.3. Algorithm AS 241, PPND16 (Wichura, Applied Statistics 37, 1988), accurate to 1e-14;
    its third range, beyond 6.6, is out of reach of 32 bits.
    """
    p = ((words >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    q = p - 0.5
    out = q * _ratio(0.180625 - q * q, _CENTRE_OVER, _CENTRE_UNDER)
    tail = np.flatnonzero(np.abs(q) > 0.425)
    r = np.sqrt(-_log(np.minimum(p[tail], 1.0 - p[tail]))) - 1.6
    out[tail] = np.copysign(_ratio(r, _TAIL_OVER, _TAIL_UNDER), q[tail])
    return out


# Coefficients of AS 241, the highest power first.
_CENTRE_OVER = (
    2.5090809287301226727e3,
    3.3430575583588128105e4,
    6.7265770927008700853e4,
    4.5921953931549871457e4,
    1.3731693765509461125e4,
    1.9715909503065514427e3,
    1.3314166789178437745e2,
    3.3871328727963666080e0,
)
_CENTRE_UNDER = (
    5.2264952788528545610e3,
    2.8729085735721942674e4,
    3.9307895800092710610e4,
    2.1213794301586595867e4,
    5.3941960214247511077e3,
    6.8718700749205790830e2,
    4.2313330701600911252e1,
    1.0,
)
_TAIL_OVER = (
    7.74545014278341407640e-4,
    2.27238449892691845833e-2,
    2.41780725177450611770e-1,
    1.27045825245236838258e0,
    3.64784832476320460504e0,
    5.76949722146069140550e0,
    4.63033784615654529590e0,
    1.42343711074968357734e0,
)
_TAIL_UNDER = (
    1.05075007164441684324e-9,
    5.47593808499534494600e-4,
    1.51986665636164571966e-2,
    1.48103976427480074590e-1,
    6.89767334985100004550e-1,
    1.67638483018380384940e0,
    2.05319162663775882187e0,
    1.0,
)


def _ratio(x: Floats, over: tuple[float, ...], under: tuple[float, ...]) -> Floats:
    return _polynomial(x, over) / _polynomial(x, under)


def _polynomial(x: Floats, coefficients: tuple[float, ...]) -> Floats:
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total *= x
        total += coefficient
    return total


def _log(x: Floats) -> Floats:
    """Natural logarithm of numbers above 0: 2 atanh((m - 1) / (m + 1)) + e log 2 for x = m * 2**e."""
    m, e = np.frexp(x)
    low = m < math.sqrt(0.5)
    m, e = np.where(low, m * 2, m), e - low
    s = (m - 1) / (m + 1)  # within 0.172, so that eleven terms of the series leave less than 1e-18
    series = _polynomial(s * s, tuple(2 / (2 * n + 1) for n in range(10, -1, -1)))
    total: Floats = s * series + e * 0.6931471805599453
    return total
