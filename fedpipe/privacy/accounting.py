"""How much privacy a sequence of noisy steps has spent, and how much noise a budget needs.

A client's history is a list of `(sigma, q, steps)`: `steps` local steps, each a Gaussian
mechanism of noise multiplier `sigma` on a Poisson sample that takes every record (or group,
or client: every unit) with probability `q`. Epsilon is what their adaptive composition spends
at a given delta, when neighbouring data sets differ by adding or removing one unit
(`add-remove`), or by the value of one (`replace-one`, whose accountants are in `adjacency`).

Two accountants, both of Opacus, give an upper bound on the same number: `rdp` by Rényi
divergences (Mironov, Talwar and Zhang 2019, arXiv:1908.10530), which is never below the
truth, and `prv` by numerical composition (Gopi, Lee and Wutschitz 2021, arXiv:2106.02848),
which is tighter and is trusted here only where its arithmetic can be.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fedpipe.errors import PrivacyError
from fedpipe.privacy.adjacency import replaced_by_prv, replaced_by_renyi
from fedpipe.privacy.history import (
    ACCOUNTANTS,
    ADD_REMOVE,
    DELTA_ERROR,
    EPS_ERROR,
    HIGH_ORDERS,
    LOW_ORDERS,
    ORDERS,
    REPLACE_ONE,
    Entry,
    check_accountant,
    check_entry,
    checked_delta,
    forget_transforms,
    loss_grid,
    merge,
    quiet,
    spending,
)
from fedpipe.privacy.neighbours import neighbours
from fedpipe.privacy.renyi import renyi_curve

__all__ = [
    "ACCOUNTANTS",
    "ADD_REMOVE",
    "REPLACE_ONE",
    "Entry",
    "calibrate",
    "check_entry",
    "delta_auto",
    "epsilon",
    "epsilon_prv",
    "epsilon_rdp",
    "merge",
]

log = logging.getLogger(__name__)

SIGMA_MIN, SIGMA_MAX = 0.01, 1e4


def epsilon_rdp(history: Iterable[Entry], delta: float, adjacency: str = ADD_REMOVE) -> float:
    """Return an upper bound on epsilon at `delta` by Rényi accounting; 0.0 for an empty history.

    The orders are those of Opacus; where the best one is the first or the last of them, more
    orders on that side are tried, which can only tighten the bound.
    """
    by = replaced_by_renyi if _replaces(adjacency) else _epsilon_rdp
    return by(spending(history), checked_delta(delta))


def epsilon_prv(history: Iterable[Entry], delta: float, adjacency: str = ADD_REMOVE) -> float:
    """Return an upper bound on epsilon at `delta` by numerical composition; 0.0 for an empty history.

    Where that composition fails, cannot be trusted or needs too much memory, or is not below
    the bound of `epsilon_rdp`, the latter is returned. It holds in any case. What makes the
    numerical bound untrustworthy: a delta near the rounding errors of its Fourier transforms
    (below about 1e-12 per step it falls under the exact value), and losses so large that
    their exponential overflows.

    Notes
    -----
    The privacy loss is that of removing a record, which dominates that of adding one for this
    mechanism at every epsilon above 0; the tests compare both with a naive composition. That of
    replacing one is in `adjacency`.
    """
    by = replaced_by_prv if _replaces(adjacency) else _epsilon_prv
    return by(spending(history), checked_delta(delta))


def epsilon(history: Iterable[Entry], delta: float, accountant: str, adjacency: str = ADD_REMOVE) -> float:
    """Return an upper bound on epsilon at `delta` by the named accountant, `prv` or `rdp`.

    Parameters
    ----------
    history : `(sigma, q, steps)`; sigma is the noise's standard deviation over the clip norm, for both adjacencies
    adjacency : `add-remove`, or `replace-one`

    Raises
    ------
    PrivacyError
        The accountant or the adjacency is unknown, delta not between 0 and 1, or an entry has no epsilon.
    """
    check_accountant(accountant)
    return (epsilon_prv if accountant == "prv" else epsilon_rdp)(history, delta, adjacency)


def calibrate(
    epsilon: float, delta: float, q: float, steps: int, accountant: str, adjacency: str = ADD_REMOVE
) -> float:
    """Return the smallest noise multiplier whose `steps` steps at rate `q` stay within `epsilon`.

    Smallest among the numbers of four significant digits from 0.01 on, so it is at most one
    part in a thousand above the optimum, prints exactly, and epsilon of what is returned is
    never above what was asked.

    Raises
    ------
    PrivacyError
        Even a noise multiplier of 10 000 spends more.
    """
    if not epsilon > 0 or steps < 1:
        raise PrivacyError(f"privacy.epsilon: found {epsilon} for {steps} steps; expected both above 0")
    by_rdp = _smallest("rdp", adjacency, epsilon, delta, q, steps, start=_index(1.0))
    index = by_rdp if accountant == "rdp" else _smallest(accountant, adjacency, epsilon, delta, q, steps, start=by_rdp)
    return _grid(index)


def delta_auto(sizes: Iterable[int]) -> float:
    """Return min(1e-5, 1 / (10 n)), n the size of the largest client in units."""
    return min(1e-5, 1 / (10 * max(sizes, default=1)))


def _replaces(adjacency: str) -> bool:
    neighbours("record", adjacency)  # refuses one that there is not
    return adjacency == REPLACE_ONE


@functools.lru_cache(maxsize=65536)
def _divergence(sigma: float, q: float, order: float) -> float:
    """Return Opacus' Rényi divergence of one step; infinite where its series fails."""
    from opacus.accountants.analysis.rdp import compute_rdp

    with contextlib.suppress(ArithmeticError, ValueError):
        value = float(compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=float(order)))
        if value >= 0:
            return value
    return math.inf


def _renyi(history: Sequence[Entry], delta: float, orders: tuple[float, ...]) -> tuple[float, float]:
    """Return epsilon and the order that gives it.

    Every order gives a valid bound. Which one gives the smallest is found by `renyi_curve`, and
    the bound itself is Opacus' at the orders that come out best, and at those where the curve
    has no value, as if all had been tried.
    """
    from opacus.accountants.analysis.rdp import get_privacy_spent

    scouted = sum(renyi_curve(sigma, q, orders) * steps for sigma, q, steps in history)
    alpha = np.asarray(orders)
    bounds = scouted - (math.log(delta) + np.log(alpha)) / (alpha - 1) + np.log1p(-1 / alpha)
    best = float(np.nanmin(bounds, initial=math.inf))
    worse = bounds > best + 1e-6 * max(1.0, abs(best))
    near = [order for order, left in zip(orders, worse & np.isfinite(bounds), strict=True) if not left]
    for tried in (near, list(orders)):
        exact = [sum(_divergence(sigma, q, order) * steps for sigma, q, steps in history) for order in tried]
        if min(exact) < math.inf:
            break
    bound, order = get_privacy_spent(orders=tried, rdp=np.array(exact), delta=delta)
    return max(0.0, float(bound)), float(order)


@functools.lru_cache(maxsize=4096)
def _epsilon_rdp(history: tuple[Entry, ...], delta: float) -> float:
    if not history:
        return 0.0
    with quiet():
        best, order = _renyi(history, delta, ORDERS)
        if order == ORDERS[0]:
            best = min(best, _renyi(history, delta, LOW_ORDERS)[0])
        elif order == ORDERS[-1]:
            best = min(best, _renyi(history, delta, HIGH_ORDERS)[0])
    return best


@functools.lru_cache(maxsize=4096)
def _epsilon_prv(history: tuple[Entry, ...], delta: float) -> float:
    if not history:
        return 0.0
    bound = _epsilon_rdp(history, delta)
    try:
        with quiet():
            value = _compose(history, delta)
        if not (math.isfinite(value) and value >= 0):
            raise ArithmeticError(f"it gave {value}")
    except (ArithmeticError, ValueError, RuntimeError, TypeError, IndexError, MemoryError) as error:
        log.warning("epsilon by RDP, %.4g, in place of PRV for %s at delta %g: %s", bound, history, delta, error)
        return bound
    if value > bound + EPS_ERROR:
        log.warning("epsilon by RDP, %.4g, is below that by PRV, %.4g, for %s", bound, value, history)
    return min(value, bound)


def _compose(history: tuple[Entry, ...], delta: float) -> float:
    """Return Opacus' PRV bound, after a look at whether it can be computed and trusted."""
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import Domain

    total = sum(steps for _, _, steps in history)
    delta_error = delta * DELTA_ERROR
    # As in Opacus' compute_safe_domain_size, whose Rényi divergences are here computed once and kept.
    tails = [_renyi(history, delta_error / 4, ORDERS)[0], EPS_ERROR]
    tails += [_renyi([(sigma, q, 1)], delta_error / (8 * total), ORDERS)[0] for sigma, q, _ in history]
    loss, mesh = loss_grid(tails, total, delta_error)

    class Accountant(PRVAccountant):
        def _get_domain(self, **_: object) -> Domain:
            return Domain.create_aligned(-loss, loss, mesh)

    accountant = Accountant()
    accountant.history = list(history)
    try:
        return float(accountant.get_epsilon(delta, eps_error=EPS_ERROR, delta_error=delta_error))
    finally:
        forget_transforms()


def _grid(index: int) -> float:
    """Return the `index`-th number of four significant digits: 0 is 1.000, 9000 is 10.00."""
    exponent, digits = divmod(index, 9000)
    return float(f"{1000 + digits}e{exponent - 3}")


def _index(sigma: float) -> int:
    """Return the index of the smallest number of four digits that is not below `sigma`."""
    exponent = math.floor(math.log10(sigma))
    index = 9000 * exponent + math.floor(sigma / 10.0**exponent * 1000) - 1001
    while _grid(index) < sigma:
        index += 1
    return index


def _smallest(accountant: str, adjacency: str, target: float, delta: float, q: float, steps: int, start: int) -> int:
    """Return the smallest index of the grid whose epsilon is at most `target`, searched for from `start`."""

    @functools.cache
    def excess(index: int) -> float:
        """Return log(epsilon / target), nearly a straight line in log sigma; at most 0 where `index` will do."""
        spent = epsilon([(_grid(index), q, steps)], delta, accountant, adjacency)
        return math.log(max(spent, 1e-9 * target) / target) if spent <= target else max(1e-12, math.log(spent / target))

    low, high = _index(SIGMA_MIN), _index(SIGMA_MAX)
    good = bad = start
    factor = 1.1
    while excess(good) > 0:
        if good == high:
            raise PrivacyError(
                f"privacy.epsilon: {target:g} cannot be reached at privacy.delta {delta:g} with sampling rate {q:.4g} "
                f"and {steps} steps, by any noise up to {SIGMA_MAX:g} times the clip norm; raise privacy.epsilon, "
                "or lower federation.batch_size, federation.local_steps or federation.rounds"
            )
        bad, good = good, min(high, _index(_grid(good) * factor))
        factor *= factor
    while excess(bad) <= 0:
        if bad == low:
            return low
        bad, good = max(low, _index(_grid(bad) / factor)), bad
        factor *= factor
    return _narrow(excess, bad, good)


def _narrow(excess: Callable[[int], float], bad: int, good: int) -> int:
    """Close in on the first index without excess, by interpolation, with a bisection every third time."""
    for turn in itertools.count(1):
        if good - bad <= 1:
            return good
        guess = (bad + good) // 2
        if turn % 3:
            share = excess(bad) / (excess(bad) - excess(good))
            guess = _index(_grid(bad) * (_grid(good) / _grid(bad)) ** share)
        guess = min(max(guess, bad + 1), good - 1)
        bad, good = (guess, good) if excess(guess) > 0 else (bad, guess)
    raise AssertionError("unreachable")
