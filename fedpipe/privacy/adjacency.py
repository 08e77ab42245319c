"""Epsilon when neighbouring data sets differ in the value of one record, not in its presence.

Let A be the noise N(0, sigma² C²). In a step, the record that is replaced takes part with probability
q and moves A to N(u) in the one data set, to N(v) in the other, with |u| and |v| at most C: so far
as 2 C apart. What dominates every such pair, for Poisson samples and in units of C, is

    P = (1 - q) N(0, sigma²) + q N(1, sigma²),   Q = (1 - q) N(0, sigma²) + q N(-1, sigma²).

Proof. Let H_a(P, Q) be the integral of max(0, P - a Q). For a >= 1 it is q times H_(a+b)(N(u), R),
where b = (a - 1)(1 - q) / q and R mixes N(v) and A by weights a : b (advanced joint convexity: Balle,
Barthe and Gaboardi 2018, arXiv:1807.01647). An event of probability p under N(u) has at least
Phi(Phi^-1(p) - |w - u| / sigma) under N(w), by Neyman and Pearson. That falls with |w - u|, which is at
most 2 for v and 1 for A; u = 1 and v = -1 have both, and half-lines reach both bounds at once. For
a < 1, H_a(P, Q) = 1 - a + a H_(1/a)(Q, P), and the pair is its own mirror image. What all the other
records add is a random shift; H is jointly convex, so it helps nobody. Dominating pairs compose
adaptively (Zhu, Dong and Wang 2022, arXiv:2106.08567).

The usual rule, sigma / 2 at the same q, is far above, and proven by the above for one step only. Its
pair does not dominate at a < 1: the loss of adding a record is at most -log(1 - q), that of replacing
one has no bound. Without sampling, q = 1, the two are the same.

All this holds for any unit: a record, a group whose mean gradient is clipped, a client.
"""

from __future__ import annotations

import functools
import logging
import math

import numpy as np
from scipy.integrate import simpson
from scipy.special import logsumexp, ndtr

from fedpipe.privacy.history import (
    DELTA_ERROR,
    EPS_ERROR,
    HIGH_ORDERS,
    LOW_ORDERS,
    ORDERS,
    Entry,
    forget_transforms,
    loss_grid,
    quiet,
)

log = logging.getLogger(__name__)

_ORDERS = (*LOW_ORDERS, *ORDERS, *HIGH_ORDERS)
_POINTS_MAX = 2**16  # of one integral; orders that need more matter only where noise is large, and then need few
_WIDTH = 14.0  # standard deviations; beyond it lies 1e-44


class _Loss:
    """The privacy loss log P/Q of one step under P, within [-bound, bound]."""

    def __init__(self, sigma: float, q: float, bound: float) -> None:
        self._sigma, self._q, self._bound = sigma, q, bound
        self._low, self._high = self._below(np.array([-bound, bound]))

    def _point(self, loss: np.ndarray) -> np.ndarray:
        """Return where the loss has this value: it increases with the point."""
        odds = (1 - self._q) / self._q * math.exp(0.5 / self._sigma**2)
        return self._sigma**2 * (loss / 2 + np.arcsinh(odds * np.sinh(loss / 2)))

    def _below(self, loss: np.ndarray) -> np.ndarray:
        point = self._point(loss)
        return (1 - self._q) * ndtr(point / self._sigma) + self._q * ndtr((point - 1) / self._sigma)

    def cdf(self, loss: np.ndarray) -> np.ndarray:
        inside = self._below(np.clip(loss, -self._bound, self._bound))
        return (inside - self._low) / (self._high - self._low)

    def mean(self) -> float:
        reach = self._point(np.array([-self._bound, self._bound]))
        points = np.linspace(*np.clip(reach, -_WIDTH * self._sigma, 1 + _WIDTH * self._sigma), 40_001)
        log_q, loss = _densities(self._sigma, self._q, points)
        return float(simpson(np.exp(log_q + loss) * loss, x=points)) / (self._high - self._low)


def _densities(sigma: float, q: float, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log Q and log P/Q at the points, both (points,) float64."""
    with np.errstate(divide="ignore"):
        out, taken = np.log1p(-q), np.log(q)
    plus, minus = (np.logaddexp(out, taken + (sign * points - 0.5) / sigma**2) for sign in (1, -1))
    return minus - points**2 / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi)), plus - minus


def _divergence(sigma: float, q: float, order: float) -> float:
    """Return the Rényi divergence of P from Q, by the trapezoidal rule, which is exact to rounding here."""
    # The integrand's narrowest feature is as wide as sigma, or as 2 sigma² / sqrt(order) where P and Q bend.
    mesh = min(sigma, 2 * sigma**2 / math.sqrt(order)) / 8
    left, right = -1 - _WIDTH * sigma, 2 * order + _WIDTH * sigma
    whole = 2 * order / sigma**2  # without sampling, which bounds it by convexity
    if (right - left) / mesh > _POINTS_MAX:
        return whole
    log_q, loss = _densities(sigma, q, np.arange(left, right, mesh))
    if np.max(log_q + order * loss) > 600:
        return min(whole, (float(logsumexp(log_q + order * loss)) + math.log(mesh)) / (order - 1))

    def change(power: float) -> np.ndarray:
        """Return Q ((P/Q)^power - 1) without cancellation or overflow."""
        small = np.exp(log_q) * np.expm1(np.minimum(power * loss, 30.0))
        return np.where(power * loss < 30, small, np.exp(log_q + power * loss))

    # P and Q both have mass 1: what is subtracted is 0, and keeps what is added up from cancelling.
    excess = mesh * float(np.sum(change(order) - order * change(1.0)))
    return min(whole, math.log1p(max(0.0, excess)) / (order - 1))


@functools.lru_cache(maxsize=1024)
def _curve(sigma: float, q: float) -> np.ndarray:
    return np.array([_divergence(sigma, q, order) for order in _ORDERS])


@functools.lru_cache(maxsize=4096)
def replaced_by_renyi(history: tuple[Entry, ...], delta: float) -> float:
    """Return the smallest bound of all orders (Canonne, Kamath and Steinke 2020, arXiv:2004.00010).

    Parameters
    ----------
    history
        As `history.spending` returns it; sigma is the noise's standard deviation over the clip
        norm C, not over the 2 C by which a sum can change.
    """
    if not history:
        return 0.0
    alpha = np.array(_ORDERS)
    spent = sum(steps * _curve(sigma, q) for sigma, q, steps in history)
    bounds = spent - (math.log(delta) + np.log(alpha)) / (alpha - 1) + np.log1p(-1 / alpha)
    return max(0.0, float(np.min(bounds)))


@functools.lru_cache(maxsize=4096)
def replaced_by_prv(history: tuple[Entry, ...], delta: float) -> float:
    """Return epsilon by numerical composition (Gopi, Lee and Wutschitz 2021, arXiv:2106.02848).

    Or the bound by Rényi divergences where it cannot be trusted or is not below it.
    """
    if not history:
        return 0.0
    bound = replaced_by_renyi(history, delta)
    try:
        with quiet(), np.errstate(over="raise"):
            value = _compose(history, delta)
        if not (math.isfinite(value) and value >= 0):
            raise ArithmeticError(f"it gave {value}")
    except (ArithmeticError, ValueError, RuntimeError, IndexError, MemoryError) as error:
        log.warning("epsilon by RDP, %.4g, in place of PRV for %s at delta %g: %s", bound, history, delta, error)
        return bound
    return min(value, bound)


def _compose(history: tuple[Entry, ...], delta: float) -> float:
    """Return the upper bound of numerical composition, where it fits."""
    from opacus.accountants.analysis.prv import Domain, compose_heterogeneous, discretize

    total, slack = sum(steps for _, _, steps in history), delta * DELTA_ERROR
    tails = [replaced_by_renyi(history, slack / 4), EPS_ERROR]
    tails += [replaced_by_renyi(((sigma, q, 1),), slack / (8 * total)) for sigma, q, _ in history]
    loss, mesh = loss_grid(tails, total, slack)
    domain = Domain.create_aligned(-loss, loss, mesh)
    steps = [discretize(_Loss(sigma, q, loss), domain) for sigma, q, _ in history]
    try:
        composed = compose_heterogeneous(steps, [count for _, _, count in history])
        return float(composed.compute_epsilon(delta, slack, EPS_ERROR)[2])
    finally:
        forget_transforms()
