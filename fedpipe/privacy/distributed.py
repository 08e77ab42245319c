"""Noise in shares: the distributed discrete Gaussian mechanism (Kairouz, Liu and Steinke 2021, arXiv 2102.06387).

For unit `client`, without a server to trust. Each client clips its move to l2 norm C, counts it in a
small unit, rounds it to whole numbers and adds discrete Gaussian noise of its own; secure aggregation
adds them up modulo 2^32, and the server sees the sum. One share is too little to protect its client.
All shares of those who stay are together as much as the server would have added, and as they are whole
numbers, nothing is lost by the masks.

The sum of n discrete Gaussians of scale s is nearly one of scale sqrt(n) s (the paper's proposition on
convolutions, for s >= 1/2). With it, a sum over n clients in d numbers, of which one client changes l2
norm Delta at the most, has concentrated differential privacy of eps^2 / 2 with

    eps = min( sqrt(Delta^2 / (n s^2) + tau d / 2),  Delta / (sqrt(n) s) + tau sqrt(d) ),
    tau = 10 sum_{k=1}^{n-1} exp(-2 pi^2 s^2 k / (k + 1)),

which is, at every Rényi order, that of a Gaussian of noise multiplier 1 / eps: the *effective* sigma. It is a
statement on Rényi divergences only, so the RDP accountant is the only one for it.

It is read backwards here: sigma is what the budget needs, and the unit follows. s is a power of two,
as large as 32 bits allow, n the fewest clients that may stay, and Delta what the formula then leaves.
Rounding moves a number by less than 1, a vector of d numbers by less than sqrt(d); so moves are scaled to
norm Delta - sqrt(d), and the noise needs no correction. Who stays beyond the fewest adds more noise.

A sum can wrap round modulo 2^32 only where the noise is beyond `Z` standard deviations, for the clients'
own numbers cannot add up to that much. That would spoil the sum; it would not open it, for what
is done to the sum afterwards, modulo included, costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedpipe.errors import PrivacyError
from fedpipe.privacy.discrete import MOST_BITS, discrete_gaussian
from fedpipe.privacy.noise import KeyedStream

MECHANISM = "distributed-discrete-gaussian"  # in the ledger

Z = 12.0  # of 2^31 numbers in a run, one is beyond it with a probability below 2^-71
_LEAST_BITS = 4  # s = 16: tau is below 10^-1000 then
_HALF = 2**31


def effective_sigma(clients: int, scale: float, size: int, sensitivity: float, most: int | None = None) -> float:
    """Return the noise multiplier of the Gaussian that the sum over `clients` clients is as good as.

    Parameters
    ----------
    clients : n, whose noise is in the sum
    scale : s, the scale of each client's discrete Gaussian; at least 1/2
    size : d, numbers in a vector
    sensitivity : Delta, the largest l2 norm of a client's whole numbers
    most : tau is for so many clients, and does not fall with them; None for `clients`
    """
    if scale < 0.5:
        raise PrivacyError(f"distributed noise: found shares of scale {scale:g}; sums of them are known from 0.5 on")
    drift, ratio = tau(most or clients, scale), sensitivity / (math.sqrt(clients) * scale)
    return 1 / min(math.sqrt(ratio**2 + drift * size / 2), ratio + drift * math.sqrt(size))


def tau(clients: int, scale: float) -> float:
    """Return how far the sum of so many discrete Gaussians is from one."""
    return 10 * sum(math.exp(-2 * math.pi**2 * scale**2 * k / (k + 1)) for k in range(1, clients))


@dataclass(frozen=True)
class Shares:
    """How the clients of a round count their moves, and how much noise each adds.

    Parameters
    ----------
    clip_norm
        C, the largest l2 norm of a client's move.
    sigma
        The effective noise multiplier that the sum must have, whoever of those allowed drops out.
    chosen, least
        Clients of the round, and the fewest of them that a sum is opened of.
    size
        d, the numbers of a vector.

    Raises
    ------
    PrivacyError
        32 bits do not hold the sum with noise fine enough for these; says what to change.
    """

    clip_norm: float
    sigma: float
    chosen: int
    least: int
    size: int

    def __post_init__(self) -> None:
        # Beyond a tenth lost to rounding the settings are beside what the mechanism is for.
        if self.bits < _LEAST_BITS or self.radius < 0.9 * self.sensitivity:
            raise PrivacyError(
                f"privacy.noise: distributed noise for {self.chosen} clients, {self.size:,} numbers and sigma "
                f"{self.sigma:g} is too coarse in 32 bits; lower federation.clients_per_round or lora.rank, or "
                "raise federation.secure_threshold"
            )

    @cached_property
    def bits(self) -> int:
        """k, where each client's noise has scale 2^k: the largest with which the sum does not wrap round."""
        signal = self.chosen * math.sqrt(self.least) / self.sigma
        room = _HALF / (signal + Z * math.sqrt(self.chosen) + 1)
        return min(MOST_BITS, math.floor(math.log2(room)))

    @property
    def scale(self) -> int:
        return 2**self.bits

    @cached_property
    def sensitivity(self) -> float:
        """Delta: the largest l2 norm of a client's whole numbers, after rounding."""
        left = 1 / self.sigma**2 - tau(self.chosen, self.scale) * self.size / 2
        delta = math.sqrt(self.least * max(left, 0.0)) * self.scale * (1 - 1e-12)
        found = effective_sigma(self.least, self.scale, self.size, delta, self.chosen) if delta else 0.0
        if delta and found < self.sigma:
            raise PrivacyError(f"distributed noise: it is as good as sigma {found}, expected {self.sigma}")
        return delta

    @property
    def radius(self) -> float:
        """The largest l2 norm of a client's numbers before rounding."""
        return self.sensitivity - math.sqrt(self.size)

    @property
    def unit(self) -> float:
        """The move that one whole number stands for."""
        return self.clip_norm / self.radius

    def counted(self, move: np.ndarray, stream: KeyedStream) -> np.ndarray:
        """Return a move, (d,) float64, clipped and rounded to whole numbers, (d,) int64; no noise is in them.

        A move that is not finite counts as none: that it was so is told to nobody. Rounding is
        up or down by chance, so that it keeps the expectation.
        """
        if move.shape != (self.size,):
            raise PrivacyError(f"distributed noise: found a move of shape {move.shape}; expected {self.size} numbers")
        with np.errstate(over="ignore", invalid="ignore"):
            norm = float(np.linalg.norm(move))
            if not math.isfinite(norm):
                return np.zeros(self.size, dtype=np.int64)
            numbers = move * (self.radius / max(norm, self.clip_norm) * (1 - 1e-9))
        lower = np.floor(numbers)
        uniform = (stream.uint64(self.size) >> np.uint64(11)) * 2.0**-53
        whole = lower.astype(np.int64) + (uniform < numbers - lower)
        if square_norm(whole) > self.sensitivity**2:
            raise PrivacyError("distributed noise: a client's numbers are longer than they are accounted for")
        return whole

    def share(self, move: np.ndarray, key: bytes, query: str, round: int) -> np.ndarray:
        """Return what a client puts into the sum, (d,) int64: its move in whole numbers and its share of the noise.

        `key` is the client's own. The same query draws the same noise, whatever becomes of the round.
        """
        whole = self.counted(move, KeyedStream(key, "rounding of a share", query, round))
        return whole + discrete_gaussian(KeyedStream(key, "noise share", query, round), self.size, self.bits)


def square_norm(numbers: np.ndarray) -> int:
    """Return the sum of squares of whole numbers below 2^31, exactly: by halves whose squares 64 bits hold."""
    size = np.abs(numbers).astype(np.uint64)
    high, low = size >> np.uint64(16), size & np.uint64(0xFFFF)
    parts = ((high * high, 2**32), (high * low, 2**17), (low * low, 1))
    return sum(int(part.sum(dtype=np.uint64)) * weight for part, weight in parts)
