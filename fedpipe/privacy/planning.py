"""What privacy would cost, before anything is trained: epsilon for settings, or settings for an epsilon.

All of it follows from public numbers: how many records (or groups of them) clients have, and the
settings. For one noise multiplier epsilon grows with the steps and with the sampling rate, so the
largest number of either that stays within an epsilon is found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedpipe.errors import PrivacyError
from fedpipe.privacy.accounting import ADD_REMOVE, calibrate, epsilon, epsilon_prv, epsilon_rdp

MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class Cost:
    """What a client spends that takes all its steps.

    Attributes
    ----------
    records, batch : its records (groups, where these are the unit), and the expected size of its Poisson batch
    steps : noisy steps
    sigma : noise multiplier
    prv, rdp : epsilon by both accountants
    """

    records: int
    batch: int
    steps: int
    sigma: float
    prv: float
    rdp: float

    @property
    def q(self) -> float:
        """The sampling rate."""
        return self.batch / self.records

    @property
    def noise(self) -> float:
        """Standard deviation of the noise in a number of a step's mean gradient, over the clip norm."""
        return self.sigma / self.batch


def cost(records: int, batch_size: int, steps: int, sigma: float, delta: float, adjacency: str = ADD_REMOVE) -> Cost:
    """Return what `steps` steps of noise multiplier `sigma` cost a client; its batch is at most all it has."""
    batch = min(batch_size, records)
    history = [(sigma, batch / records, steps)]
    both = epsilon_prv(history, delta, adjacency), epsilon_rdp(history, delta, adjacency)
    return Cost(records, batch, steps, sigma, *both)


def calibrated(
    records: int,
    batch_size: int,
    steps: int,
    target: float,
    delta: float,
    accountant: str,
    adjacency: str = ADD_REMOVE,
) -> Cost:
    """Return the cost at the smallest noise multiplier that stays within epsilon `target`.

    Raises
    ------
    PrivacyError
        No noise multiplier does.
    """
    batch = min(batch_size, records)
    sigma = calibrate(target, delta, batch / records, steps, accountant, adjacency)
    return cost(records, batch, steps, sigma, delta, adjacency)


def most_steps(
    target: float, delta: float, q: float, sigma: float, accountant: str, adjacency: str = ADD_REMOVE
) -> int:
    """Return the most steps of noise multiplier `sigma` at rate `q` within epsilon `target`; 0 if one is too many.

    At most a million.
    """
    return _largest(lambda steps: epsilon([(sigma, q, steps)], delta, accountant, adjacency) <= target, MOST_STEPS)


def largest_batch(
    target: float,
    delta: float,
    records: int,
    steps: int,
    sigma: float,
    accountant: str,
    adjacency: str = ADD_REMOVE,
) -> int:
    """Return the largest expected batch, at most all records, within epsilon `target`; 0 if one is too many."""

    def allowed(batch: int) -> bool:
        return epsilon([(sigma, batch / records, steps)], delta, accountant, adjacency) <= target

    return _largest(allowed, records)


def sigmas(
    targets: Sequence[float],
    steps: Sequence[int],
    records: int,
    batch_size: int,
    delta: float,
    accountant: str,
    adjacency: str = ADD_REMOVE,
) -> list[list[float | None]]:
    """Return the noise multiplier for each epsilon (rows) and number of steps (columns); None where there is none."""
    q = min(batch_size, records) / records

    def one(target: float, count: int) -> float | None:
        try:
            return calibrate(target, delta, q, count, accountant, adjacency)
        except PrivacyError:
            return None

    return [[one(target, count) for count in steps] for target in targets]


def _largest(allowed: Callable[[int], bool], most: int) -> int:
    """Return the largest number from 0 to `most` that is allowed, of numbers that are allowed up to one of them."""
    if not allowed(1):
        return 0
    good, bad = 1, 2
    while bad <= most and allowed(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if allowed(middle) else (good, middle)
    return good
