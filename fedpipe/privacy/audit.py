"""What a single training run says about its own epsilon: a lower bound from canaries.

For each of m canary records a fair coin decides whether it takes part in training. After one
run, its scores are turned into guesses of some of the coins. Under (epsilon, delta)
differential privacy, r guesses cannot be right much more often than r coins that each show
heads with probability e^epsilon / (1 + e^epsilon), so too many right guesses refute epsilon
(Steinke, Nasr and Jagielski 2023, arXiv:2305.08846). The largest epsilon that is refuted is a
lower bound on the true one. Above the claimed epsilon, it shows a mistake in the mechanism or
in its accounting; far below, it shows nothing, since most attacks are weak.

All probabilities are computed as logarithms, so that none is rounded to nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logsumexp
from scipy.stats import binom

from fedpipe.errors import AuditError, PrivacyError
from fedpipe.privacy.noise import KeyedStream

_HALVINGS = 40  # of an interval of length 1: the bound is 1e-12 too low at most


@dataclass(frozen=True)
class Verdict:
    """A lower bound on epsilon beside the epsilon that was claimed, both at the same delta.

    `bound` is above the true epsilon with probability `1 - confidence` at most, and
    `ceiling` is what it would have been had all guesses been right: an audit whose ceiling is
    below the claim cannot fail.
    """

    claimed: float
    delta: float
    bound: float
    ceiling: float
    confidence: float

    def __post_init__(self) -> None:
        if not self.claimed >= 0:
            raise PrivacyError(f"audit: found a claimed epsilon of {self.claimed}; expected 0 or more")

    @property
    def fails(self) -> bool:
        """Whether the claim is refuted."""
        return self.bound > self.claimed

    def metrics(self) -> dict[str, float]:
        """Return all numbers by name, `fails` as 0 or 1, for a tracker or a report."""
        return {name: float(value) for name, value in asdict(self).items()} | {"fails": float(self.fails)}

    def check(self) -> None:
        """Raise an `AuditError` where the claim is refuted."""
        if self.fails:
            raise AuditError(
                f"audit: epsilon is above {self.bound:.4f} with confidence {self.confidence:g}, but {self.claimed:.4f} "
                f"is claimed at delta {self.delta:g}; expected a bound below the claim: the noise, the clipping, the "
                "sampling or the accounting of this run is wrong, and its results must not be called private"
            )


@dataclass(frozen=True)
class OneRunVerdict(Verdict):
    """The verdict of `one_run_audit`, for the pair `(k_plus, k_minus)` that gave the largest bound.

    `p_value` is how likely so many right guesses are at most, if the claim is true. Both it
    and the bound are corrected for the number of pairs that were `tried`.
    """

    canaries: int
    k_plus: int
    k_minus: int
    correct: int
    tried: int
    p_value: float


def draw_coins(count: int, key: bytes, *context: str | int) -> NDArray[np.bool_]:
    """Return for each of `count` canaries whether it is included: independent fair coins, (count,) bool.

    They are a keyed stream, the same for a key and a context, and unrelated to the noise and the
    samples of that key. Who audits, and the mechanism itself but through the canaries that it is
    given, must not see them before the guesses are made.
    """
    if count < 1:
        raise PrivacyError(f"audit: found {count} canaries; expected at least 1")
    return KeyedStream(key, "audit coins", *context).bernoulli(count, 0.5)


def guess(scores: ArrayLike, k_plus: int, k_minus: int) -> NDArray[np.int8]:
    """Return 1 (included) for the `k_plus` highest scores, -1 (left out) for the `k_minus` lowest, else 0.

    Equal scores are ordered by position, so positions must not depend on the coins.

    Raises
    ------
    PrivacyError
        A score is not a number, or there are fewer scores than guesses, or no guess is made.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or np.isnan(values).any():
        raise PrivacyError("audit: found scores that are not numbers; expected one number for each canary")
    if min(k_plus, k_minus) < 0 or not 1 <= k_plus + k_minus <= values.size:
        raise PrivacyError(
            f"audit: found k_plus {k_plus} and k_minus {k_minus} for {values.size} canaries; "
            "expected two numbers from 0 on, together at least 1 and at most the number of canaries"
        )
    order, guesses = np.argsort(values, kind="stable"), np.zeros(values.size, dtype=np.int8)
    guesses[order[:k_minus]] = -1
    guesses[order[values.size - k_plus :]] = 1
    return guesses


def log_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Return the logarithm of an upper bound on the probability of `v` or more right guesses.

    Parameters
    ----------
    m, r, v : int
        Canaries, guesses made, and guesses that were right: 0 <= v <= r <= m.
    epsilon, delta : float
        The guarantee that is put to the test.

    Notes
    -----
    With X the right ones of r independent guesses that are right with probability
    1 / (1 + e^-epsilon), the bound is P[X >= v] + 2 m delta max_i P[v - i <= X < v] / i.
    The wrong ones are counted here, whose small probability a float holds exactly.
    """
    if not (0 <= v <= r <= m and epsilon >= 0 and 0 <= delta < 1):
        raise PrivacyError(
            f"audit: found {m} canaries, {r} guesses, {v} right, epsilon {epsilon}, delta {delta}; "
            "expected 0 <= right <= guesses <= canaries, epsilon from 0 on, and delta from 0 to below 1"
        )
    wrong = binom.logpmf(np.arange(r + 1), r, expit(-epsilon))
    total = logsumexp(wrong[: r - v + 1])
    if delta > 0 and v > 0:
        windows = np.logaddexp.accumulate(wrong[r - v + 1 :]) - np.log(np.arange(1, v + 1))
        total = np.logaddexp(total, math.log(2 * m * delta) + windows.max())
    return min(0.0, float(total))


def p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Return the exponential of `log_p_value`."""
    return math.exp(log_p_value(m, r, v, epsilon, delta))


@functools.lru_cache(maxsize=4096)
def epsilon_lower_bound(m: int, r: int, v: int, delta: float, confidence: float = 0.95) -> float:
    """Return the largest epsilon that `v` right ones of `r` guesses about `m` canaries refute; 0.0 if none.

    What is refuted are all epsilons up to a point, which is bracketed by whole numbers and
    then found by halving. The lower end is returned, so that it is itself refuted.

    Raises
    ------
    PrivacyError
        The numbers contradict each other, or `confidence` is not between 0 and 1.
    """
    level = math.log1p(-_checked(confidence))
    if log_p_value(m, r, v, 0.0, delta) >= level:
        return 0.0
    low, high = 0.0, 1.0
    while log_p_value(m, r, v, high, delta) < level:
        low, high = high, high + 1
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if log_p_value(m, r, v, middle, delta) < level else (low, middle)
    return low


def one_run_audit(
    scores: ArrayLike,
    included: ArrayLike,
    options: Sequence[tuple[int, int]],
    *,
    claimed: float,
    delta: float,
    confidence: float = 0.95,
) -> OneRunVerdict:
    """Put a claimed epsilon to the test with the canaries of one run.

    Parameters
    ----------
    scores : array of m floats
        Higher means more likely included; computed without a look at `included`.
    included : array of m bools
        The coins, as `draw_coins` gives them.
    options : sequence of (k_plus, k_minus)
        How many to guess, as in `guess`, fixed before the run. Of several, the best is
        reported, each at a confidence that makes up for the choice (Bonferroni).

    Raises
    ------
    PrivacyError
        Scores, coins or options do not fit each other.
    """
    coins, tried = np.asarray(included, dtype=bool), len(options)
    if tried == 0 or coins.shape != np.shape(scores):
        raise PrivacyError(
            f"audit: found {tried} options, scores of shape {np.shape(scores)} and coins of shape {coins.shape}; "
            "expected at least one option, and one score and one coin for each canary"
        )
    m, each, signs = coins.size, 1 - (1 - _checked(confidence)) / tried, np.where(coins, 1, -1)
    correct = [int(np.sum(guess(scores, *pair) == signs)) for pair in options]
    bounds = [epsilon_lower_bound(m, sum(pair), v, delta, each) for pair, v in zip(options, correct, strict=True)]
    least = min(p_value(m, sum(pair), v, claimed, delta) for pair, v in zip(options, correct, strict=True))
    best = bounds.index(max(bounds))
    return OneRunVerdict(
        claimed=claimed,
        delta=delta,
        bound=bounds[best],
        ceiling=max(epsilon_lower_bound(m, sum(pair), sum(pair), delta, each) for pair in options),
        confidence=confidence,
        canaries=m,
        k_plus=options[best][0],
        k_minus=options[best][1],
        correct=correct[best],
        tried=tried,
        p_value=min(1.0, tried * least),
    )


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise PrivacyError(f"audit: found a confidence of {confidence}; expected one between 0 and 1, such as 0.95")
    return confidence
