"""What the accountants of both adjacencies share: a client's history, its checks, and the sizes of a computation.

A history is a list of `(sigma, q, steps)`: `steps` noisy steps, each a Gaussian mechanism of noise
multiplier `sigma` on a Poisson sample that takes every unit with probability `q`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from scipy.fft import rfft

from fedpipe.errors import PrivacyError, nearest

Entry = tuple[float, float, int]

ACCOUNTANTS = ("prv", "rdp")
ADD_REMOVE, REPLACE_ONE, ZERO_OUT = "add-remove", "replace-one", "zero-out"
ADJACENCIES = (ADD_REMOVE, REPLACE_ONE, ZERO_OUT)

# Orders of Rényi divergences: Opacus' own, and more on either side.
ORDERS = tuple([1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64)))
LOW_ORDERS = (1.001, 1.002, 1.003, 1.005, 1.007, 1.01, 1.015, 1.02, 1.03, 1.05, 1.07)
HIGH_ORDERS = (64, 72, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)

EPS_ERROR = 0.01  # of numerical composition
DELTA_ERROR = 1e-3  # of delta
_GRID_MAX = 2**22  # points of the discretised privacy loss: about 0.7 GB while it is composed
_LOSS_MAX = 500.0  # exp() of twice this is beyond float64

_lock = threading.Lock()


def check_entry(sigma: float, q: float, count: int) -> None:
    """Refuse a noise multiplier not above 0, a sampling rate not in [0, 1], or a number of steps below 0."""
    if not (0 < sigma < math.inf and 0 <= q <= 1 and count >= 0 and count == int(count)):
        raise PrivacyError(
            f"history: the entry (sigma={sigma}, q={q}, steps={count}) has no epsilon; "
            "expected sigma above 0, q between 0 and 1, and a whole number of steps"
        )


def merge(history: Iterable[Entry]) -> tuple[Entry, ...]:
    """Add up the steps of equal `(sigma, q)` and sort, since epsilon does not depend on the order.

    Raises
    ------
    PrivacyError
        A noise multiplier is not above 0, a sampling rate not in [0, 1], or a number of steps negative.
    """
    steps: Counter[tuple[float, float]] = Counter()
    for sigma, q, count in history:
        check_entry(sigma, q, count)
        steps[float(sigma), float(q)] += int(count)
    return tuple((sigma, q, count) for (sigma, q), count in sorted(steps.items()) if count)


def spending(history: Iterable[Entry]) -> tuple[Entry, ...]:
    """Return the merged entries that spend anything."""
    return tuple(entry for entry in merge(history) if entry[1] > 0)


def checked_delta(delta: float) -> float:
    """Refuse a delta that is not between 0 and 1."""
    if not 0 < delta < 1:
        raise PrivacyError(f"privacy.delta: found {delta}; expected a number between 0 and 1, such as 1e-5, or auto")
    return float(delta)


def check_accountant(accountant: str) -> None:
    """Refuse an accountant that there is not."""
    if accountant not in ACCOUNTANTS:
        raise PrivacyError(f"privacy.accountant: found '{accountant}'; {nearest(accountant, ACCOUNTANTS)}")


def loss_grid(tails: Iterable[float], total: int, delta_error: float) -> tuple[float, float]:
    """Return the largest loss and the mesh of numerical composition, as Opacus would choose them.

    Parameters
    ----------
    tails : epsilons beyond which the privacy loss has next to no mass
    total : steps that are composed
    delta_error : by how much delta may be off

    Raises
    ------
    ArithmeticError
        The error is within what rounding makes of that many convolutions.
    MemoryError
        The grid would be too large, or the exponential of a loss overflow.
    """
    if delta_error < 4 * np.finfo(float).eps * total:
        raise ArithmeticError(f"delta is within the rounding errors of {total} convolutions")
    loss = max(tails) + 3
    mesh = EPS_ERROR / math.sqrt(total * math.log(12 / delta_error) / 2)
    if not loss <= _LOSS_MAX or 2 * loss / mesh > _GRID_MAX:
        raise MemoryError(f"privacy losses up to {loss:.3g} in steps of {mesh:.3g} do not fit")
    return loss, mesh


def forget_transforms() -> None:
    """Make SciPy let go of what it prepared for the last 16 lengths of a transform, as large as what is transformed.

    Every composition has a length of its own, so that none of it would be used again. Short ones take its place.
    """
    for length in range(2, 18):
        rfft(np.zeros(length))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what Opacus says about the orders and divisions that are dealt with here.

    Python's warning filters are shared by all threads, hence the lock.
    """
    with _lock, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
