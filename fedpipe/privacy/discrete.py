"""The discrete Gaussian, sampled exactly: integers in, integers out, no logarithm and no rounding.

N_Z(0, s^2) gives every integer y a probability proportional to exp(-y^2 / (2 s^2)). The sampler is that of
Canonne, Kamath and Steinke (2020, arXiv 2004.00010, algorithms 1 to 3): a two-sided geometric variable
is proposed, and accepted with a probability exp(-a) for a rational a, which is the probability that a
simple game of coins with rational chances is won. Whoever knows the keys knows the sample; to all
others it is exactly the distribution that the theorems are about.

Here s is a power of two, s = 2^k, and the proposal has the same scale. All chances are then
fractions over powers of two, up to a small whole divisor, and 64 bits hold every number, so whole
arrays are sampled at once. That s be a power of two is no restriction where the unit in which a
vector is counted may be chosen.
"""

from __future__ import annotations

import math

import numpy as np

from fedpipe.errors import PrivacyError
from fedpipe.privacy.noise import KeyedStream

MOST_BITS = 24  # of s: squares of 64 s then fit into 64 bits
_FAR = 64  # in units of s; a proposal is farther with a probability below exp(-63), an accepted one below exp(-2000)


def discrete_gaussian(stream: KeyedStream, count: int, bits: int) -> np.ndarray:
    """Return independent samples of N_Z(0, 4^bits), (count,) int64.

    Raises
    ------
    PrivacyError
        `bits` is not from 0 to `MOST_BITS`; or, once in exp(63) proposals, one is too far for 64 bits.
    """
    if not 0 <= bits <= MOST_BITS:
        raise PrivacyError(f"discrete Gaussian: found a scale of 2^{bits}; expected 2^0 to 2^{MOST_BITS}")
    found, missing = np.empty(count, dtype=np.int64), np.arange(count)
    while missing.size:
        proposed = _discrete_laplace(stream, missing.size, bits)
        # exp(-(|y| - s)^2 / (2 s^2)): the numerator over 2^(2 bits + 1).
        distance = np.abs(proposed) - (1 << bits)
        accepted = _exp(stream, (distance * distance).astype(np.uint64), 2 * bits + 1)
        found[missing[accepted]] = proposed[accepted]
        missing = missing[~accepted]
    return found


def _discrete_laplace(stream: KeyedStream, count: int, bits: int) -> np.ndarray:
    """Return samples with probabilities proportional to exp(-|y| / 2^bits), (count,) int64."""
    found, missing = np.empty(count, dtype=np.int64), np.arange(count)
    while missing.size:
        low = _uniform_bits(stream, missing.size, bits)
        kept = _exp(stream, low, bits)
        high = np.zeros(missing.size, dtype=np.int64)
        going = np.flatnonzero(kept)
        while going.size:
            going = going[_exp_of_one(stream, going.size)]
            high[going] += 1
        if high.max(initial=0) >= _FAR:
            raise PrivacyError("discrete Gaussian: a proposal is too far for 64 bits; nothing was released")
        value = (high << bits) + low.astype(np.int64)
        negative = _uniform_bits(stream, missing.size, 1).astype(bool)
        kept &= ~(negative & (value == 0))  # or zero would be twice as likely
        found[missing[kept]] = np.where(negative, -value, value)[kept]
        missing = missing[~kept]
    return found


def _exp(stream: KeyedStream, numerators: np.ndarray, bits: int) -> np.ndarray:
    """Return coins that are true with probability exp(-numerator / 2^bits), (n,) bool."""
    whole, rest = numerators >> np.uint64(bits), numerators & np.uint64((1 << bits) - 1)
    won = _exp_below_one(stream, rest, bits)
    going = np.flatnonzero(won & (whole > 0))
    left = whole[going]
    while going.size:
        coins = _exp_of_one(stream, going.size)
        won[going[~coins]] = False
        going, left = going[coins], left[coins] - np.uint64(1)
        going, left = going[left > 0], left[left > 0]
    return won


def _exp_of_one(stream: KeyedStream, count: int) -> np.ndarray:
    return _exp_below_one(stream, np.ones(count, dtype=np.uint64), 0)


def _exp_below_one(stream: KeyedStream, numerators: np.ndarray, bits: int) -> np.ndarray:
    """Return coins that are true with probability exp(-x), x = numerator / 2^bits from 0 to 1, (n,) bool.

    Coins of chance x / 1, x / 2, x / 3, ... are thrown until one fails, and it is true if that is one of
    odd number: the chance is 1 - x + x^2 / 2 - ... (algorithm 1).
    """
    true = np.zeros(numerators.size, dtype=bool)
    going, number = np.arange(numerators.size), 1
    while going.size:
        chance = _below(stream, going.size, number) == 0
        chance &= _uniform_bits(stream, going.size, bits) < numerators[going]
        true[going[~chance]] = bool(number % 2)
        going, number = going[chance], number + 1
    return true


def _uniform_bits(stream: KeyedStream, count: int, bits: int) -> np.ndarray:
    """Return uniform integers of so many bits, (count,) uint64; with none, zeros, and nothing is drawn."""
    return stream.uint64(count) >> np.uint64(64 - bits) if bits else np.zeros(count, dtype=np.uint64)


def _below(stream: KeyedStream, count: int, bound: int) -> np.ndarray:
    """Return uniform integers from 0 to `bound` - 1, (count,) uint64: draws beyond a multiple of it are drawn again."""
    if bound == 1:
        return np.zeros(count, dtype=np.uint64)
    limit = np.uint64((2**64 // bound) * bound - 1)
    words = stream.uint64(count)
    while (beyond := np.flatnonzero(words > limit)).size:
        words[beyond] = stream.uint64(beyond.size)
    return words % np.uint64(bound)


def tail(z: float, numbers: int) -> float:
    """Bound the probability that one of `numbers` sums of samples is beyond z times its standard deviation.

    A discrete Gaussian, and with it a sum of independent ones, is subgaussian with the variance of the
    continuous one (the same paper), so each is beyond it with 2 exp(-z^2 / 2) at the most.
    """
    return 2 * numbers * math.exp(-(z**2) / 2)
