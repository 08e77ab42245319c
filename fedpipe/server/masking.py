"""Vectors as integers modulo 2^32, and masks that hide them.

Masks hide a number completely only where numbers are finitely many: the sum of any integer and a
uniform one, modulo 2^32, is uniform. So a vector is clipped to [-c, c] and rounded to `levels`
equidistant integers. The sum of clients * (levels - 1) must stay below the modulus. If it could
pass it, sums would wrap round and nobody would notice: the numbers decoded are wrong, not an error.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from fedpipe.errors import PrivacyError, SettingsError, TrainingError
from fedpipe.privacy.noise import KeyedStream

MODULUS = 2**32


@dataclass(frozen=True)
class Sum:
    """What secure aggregation gives: the weighted sum over `clients` clients, and nothing of one of them.

    `values` is (numbers,) float64, the sum of weight * vector; `weight` the sum of the weights,
    which is the number of clients where all weigh the same.
    """

    values: np.ndarray
    weight: int
    clients: int

    @property
    def mean(self) -> np.ndarray:
        """The weighted mean, (numbers,) float64."""
        return self.values / self.weight


@dataclass(frozen=True)
class Codec:
    """How vectors become integers in [0, levels - 1], and a sum of them becomes numbers again.

    Parameters
    ----------
    clip
        c: numbers beyond [-c, c] are moved to its ends, in the unit of the vectors.
    levels
        q. With an odd number zero is a level. A number that does not train then costs no error;
        with an even one, rounding to the nearest would add up half a step of every client.
    max_weight
        W, where clients have weights 1 to W: what is rounded is vector * weight / W, and the weight
        is one more masked number. None: all weigh the same, and no weight is sent.
    stochastic
        Round up with the probability that keeps the expectation, or else to the nearest.

    Notes
    -----
    Of K clients with vectors inside [-c, c], each number of the sum is off by less than
    K W 2c / (q - 1), and by at most half of it where rounding is to the nearest.
    """

    clip: float = 8.0
    levels: int = 2**22 - 1
    max_weight: int | None = None
    stochastic: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.clip < math.inf:
            raise SettingsError(f"secure aggregation, clip: found {self.clip}; expected a finite number above 0")
        lowest = max(2, 1 + (self.max_weight or 0))  # a weight must not be above what the guard reckons with
        if self.levels < lowest:
            raise SettingsError(f"secure aggregation, levels: found {self.levels}; expected {lowest} or more")
        if self.max_weight is not None and self.max_weight < 1:
            raise SettingsError(f"secure aggregation, max_weight: found {self.max_weight}; expected 1 or more, or none")

    @property
    def step(self) -> float:
        """The distance of two levels, in the unit of the vectors."""
        return 2 * self.clip / (self.levels - 1)

    def check_overflow(self, clients: int) -> None:
        """Raise `SettingsError` if the sum over so many clients could reach the modulus."""
        if clients * (self.levels - 1) >= MODULUS:
            raise SettingsError(
                f"secure aggregation, levels: the sum of {clients} clients with {self.levels} levels can reach "
                f"2^32 and would wrap round; expected at most {(MODULUS - 1) // clients + 1} levels, or fewer clients"
            )

    def encode(self, vector: np.ndarray, weight: int | None, stream: KeyedStream) -> np.ndarray:
        """Return a vector as uint32, (numbers,) or with a weight (numbers + 1,); `stream` rounds it.

        Raises
        ------
        TrainingError
            A number is not finite.
        PrivacyError
            The weight is missing, not asked for, or outside 1 to `max_weight`.
        """
        ratio = self._ratio(weight)
        if not np.isfinite(vector).all():
            raise TrainingError("secure aggregation: a vector has a number that is not finite; a sum would hide it")
        places = np.clip(np.asarray(vector, dtype=np.float64) / self.clip, -1, 1)
        places *= ratio
        places += 1
        places *= (self.levels - 1) / 2
        rounded = self._rounded(places, stream)
        return rounded if weight is None else np.append(rounded, np.uint32(weight))

    def decode(self, total: np.ndarray, clients: int) -> Sum:
        """Return the sum of vectors whose encodings have the sum `total` (modulo 2^32), over `clients` clients."""
        weight = clients if self.max_weight is None else int(total[-1])
        integers = (total if self.max_weight is None else total[:-1]).astype(np.int64)
        centred = 2 * integers - clients * (self.levels - 1)
        return Sum(centred * (self.clip * (self.max_weight or 1) / (self.levels - 1)), weight, clients)

    def _ratio(self, weight: int | None) -> float:
        if self.max_weight is None and weight is None:
            return 1.0
        if self.max_weight is None or weight is None or not 1 <= weight <= self.max_weight:
            expected = "none" if self.max_weight is None else f"1 to {self.max_weight}"
            raise PrivacyError(f"secure aggregation: found weight {weight}; expected {expected}")
        return weight / self.max_weight

    def _rounded(self, places: np.ndarray, stream: KeyedStream) -> np.ndarray:
        if not self.stochastic:
            return np.rint(places).astype(np.uint32)
        lower = np.floor(places)
        uniform = (stream.uint64(places.size) >> np.uint64(11)) * 2.0**-53
        return lower.astype(np.uint32) + (uniform < places - lower)


@dataclass(frozen=True)
class Whole:
    """A codec for vectors that are whole numbers already, of either sign; nothing is clipped or rounded.

    The sum is right while it is within 2^31 of zero, which is for them to see to who made the numbers.

    Parameters
    ----------
    unit
        What the number 1 stands for.
    """

    unit: float
    max_weight: int | None = None

    def check_overflow(self, clients: int) -> None:
        """Do nothing: noise has no bound that a sum could be checked against (see `fedpipe.privacy.distributed`)."""

    def encode(self, vector: np.ndarray, weight: int | None, stream: KeyedStream) -> np.ndarray:
        """Return the numbers modulo 2^32, (numbers,) uint32."""
        if weight is not None or not np.issubdtype(vector.dtype, np.integer):
            raise PrivacyError(
                f"secure aggregation: found {vector.dtype} of weight {weight}; expected whole numbers, of none"
            )
        return (vector.astype(np.int64) % MODULUS).astype(np.uint32)

    def decode(self, total: np.ndarray, clients: int) -> Sum:
        """Return the sum of vectors whose encodings have the sum `total` (modulo 2^32), over `clients` clients."""
        return Sum(total.astype(np.uint32).view(np.int32) * self.unit, clients, clients)


@dataclass(frozen=True)
class Terms:
    """What all parties know and agree on before a round of secure aggregation.

    Parameters
    ----------
    query, round
        What the vectors are, and of which round: part of the name of every mask.
    clients
        All that were chosen, in the order that decides who adds and who subtracts a mask.
    threshold
        t: how many must be there to the end. Fewer than t clients that pool what they have with the
        server open no more than the one sum, of t vectors or more (in which they know their own). It is
        more than half of the clients, so that no two groups of t could be told different things.
    size
        Numbers in a vector.
    codec
        How they become integers.

    Raises
    ------
    SettingsError
        One of these does not hold, or the sum could overflow: before any party has sent anything.
    """

    query: str
    round: int
    clients: tuple[str, ...]
    threshold: int
    size: int
    codec: Codec | Whole = Codec()

    def __post_init__(self) -> None:
        count = len(self.clients)
        if count < 2 or len(set(self.clients)) < count:
            raise SettingsError(f"secure aggregation: found clients {self.clients}; expected at least 2, all different")
        if not count < 2 * self.threshold <= 2 * count:
            raise SettingsError(
                f"secure aggregation, threshold: found {self.threshold}; expected {count // 2 + 1} to {count}, "
                f"more than half of the {count} clients"
            )
        if self.size < 1:
            raise SettingsError(f"secure aggregation: found vectors of {self.size} numbers; expected at least 1")
        self.codec.check_overflow(count)

    @property
    def entries(self) -> int:
        """The integers of a message: the numbers, and the weight where there is one."""
        return self.size + (self.codec.max_weight is not None)

    @cached_property
    def points(self) -> dict[str, int]:
        """The point at which each client's share is taken, from 1."""
        return {client: point for point, client in enumerate(self.clients, start=1)}

    @cached_property
    def name(self) -> str:
        """All of the terms as one string, for the name of a stream."""
        return json.dumps(asdict(self), sort_keys=True)


def seed(key: bytes, *context: str | int) -> bytes:
    """Return 32 bytes that are a function of a key and a context, and look random without the key."""
    return KeyedStream(key, *context).uint64(4).astype("<u8").tobytes()


def add_mask(numbers: np.ndarray, mask_seed: bytes, sign: int) -> None:
    """Add (`sign` 1) or subtract (-1) the mask of a seed, modulo 2^32, in place; (entries,) uint32."""
    words = KeyedStream(mask_seed, "mask").uint64((numbers.size + 1) // 2)
    mask = words.astype("<u8", copy=False).view("<u4")[: numbers.size]
    if sign > 0:
        numbers += mask
    else:
        numbers -= mask
