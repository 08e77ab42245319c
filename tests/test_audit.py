"""The one-run audit against exact enumeration, published numbers, and mechanisms whose epsilon is known."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from fedpipe.errors import PrivacyError
from fedpipe.privacy.audit import (
    OneRunVerdict,
    Verdict,
    draw_coins,
    epsilon_lower_bound,
    guess,
    log_p_value,
    one_run_audit,
    p_value,
)

GOLDEN = [
    (1000, 100, 100, 0.0, 3.4930),
    (1000, 100, 100, 1e-5, 3.4654),
    (1000, 100, 95, 1e-5, 2.1652),
    (1000, 100, 90, 1e-5, 1.6261),
    (1000, 200, 180, 1e-5, 1.7963),
    (1000, 1000, 600, 1e-5, 0.2972),
    (100, 50, 45, 1e-5, 1.3928),
    (200, 40, 40, 1e-5, 2.5482),
    (500, 100, 70, 1e-5, 0.4704),
    (1000, 1000, 500, 1e-5, 0.0),
]
DELTAS = st.floats(-8, -1).map(lambda x: 10.0**x) | st.just(0.0)
EPSILONS = st.floats(0, 8)


@st.composite
def guesses_made(draw: st.DrawFn) -> tuple[int, int, int]:
    r = draw(st.integers(0, 60))
    return r + draw(st.integers(0, 200)), r, draw(st.integers(0, r))


def by_definition(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """The formula of the paper, with scipy's probabilities of right guesses and a loop over the windows."""
    p = 1 / (1 + math.exp(-epsilon))
    windows = [(binom.cdf(v - 1, r, p) - binom.cdf(v - i - 1, r, p)) / i for i in range(1, v + 1)]
    return min(1.0, binom.sf(v - 1, r, p) + 2 * m * delta * max(windows, default=0.0))


@pytest.mark.parametrize(("m", "r", "v", "delta", "bound"), GOLDEN)
def test_golden_bounds(m: int, r: int, v: int, delta: float, bound: float) -> None:
    assert epsilon_lower_bound(m, r, v, delta) == pytest.approx(bound, abs=5.1e-5)


@given(st.integers(1, 8), st.integers(1, 9), st.data())
@settings(max_examples=40, deadline=None)
def test_p_value_is_that_of_all_outcomes_counted_one_by_one(r: int, odds: int, data: st.DataObject) -> None:
    v, m = data.draw(st.integers(0, r)), r + data.draw(st.integers(0, 5))
    delta, right = (
        data.draw(st.sampled_from([Fraction(0), Fraction(1, 1000), Fraction(1, 7)])),
        Fraction(odds, odds + 1),
    )
    chance = [Fraction(0)] * (r + 1)
    for outcome in product((0, 1), repeat=r):
        chance[sum(outcome)] += right ** sum(outcome) * (1 - right) ** (r - sum(outcome))
    alpha = max((sum(chance[v - i : v]) / i for i in range(1, v + 1)), default=Fraction(0))
    exact = min(Fraction(1), sum(chance[v:]) + 2 * m * delta * alpha)
    assert p_value(m, r, v, math.log(odds), float(delta)) == pytest.approx(float(exact), rel=1e-11)


@given(guesses_made(), EPSILONS, DELTAS)
@settings(max_examples=150, deadline=None)
def test_p_value_is_the_formula(made: tuple[int, int, int], epsilon: float, delta: float) -> None:
    assert p_value(*made, epsilon, delta) == pytest.approx(by_definition(*made, epsilon, delta), rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("v", [10_000, 9_990, 9_000])
def test_tails_below_the_smallest_float(v: int) -> None:
    # At epsilon 0 every outcome has the same probability, so the tail is a whole number over 2^10000.
    ways = term = math.comb(10_000, v)
    for k in range(v, 10_000):
        term = term * (10_000 - k) // (k + 1)
        ways += term
    exact = math.log(ways) - 10_000 * math.log(2)
    assert exact < math.log(1e-300)
    assert log_p_value(10_000, 10_000, v, 0.0, 0.0) == pytest.approx(exact, rel=1e-10)


def test_the_term_of_delta_survives_where_the_tail_does_not() -> None:
    # All mass is below v, so the best window is the one that starts at the mass: about 2 m delta / (v - r / 2).
    found = p_value(10_000, 10_000, 10_000, 0.0, 1e-6)
    assert 2e-2 / 5_300 < found < 2e-2 / 4_700


@pytest.mark.parametrize("v", [10, 9, 0])
@pytest.mark.parametrize("epsilon", [100.0, 7463.0, math.inf])
def test_claims_without_any_privacy_are_never_refuted(v: int, epsilon: float) -> None:
    assert p_value(10, 10, v, epsilon, 1e-5) == pytest.approx(1.0, abs=1e-12)


@given(st.integers(5, 10_000))
@settings(max_examples=30, deadline=None)
def test_perfect_guesses_reach_the_closed_form(r: int) -> None:
    p = 0.05 ** (1 / r)
    assert epsilon_lower_bound(2 * r, r, r, 0.0) == pytest.approx(math.log(p / (1 - p)), abs=1e-8)


@given(guesses_made(), DELTAS)
@settings(max_examples=60, deadline=None)
def test_the_bound_is_the_end_of_what_is_refuted(made: tuple[int, int, int], delta: float) -> None:
    bound = epsilon_lower_bound(*made, delta)
    refuted = [p_value(*made, epsilon, delta) < 0.05 for epsilon in np.linspace(0, 8, 41)]
    assert refuted == [bool(epsilon < bound) for epsilon in np.linspace(0, 8, 41)]  # one stretch, from 0 on
    assert p_value(*made, bound + 1e-9, delta) >= 0.05 * (1 - 1e-9)
    assert bound == 0 or p_value(*made, bound, delta) < 0.05


@given(guesses_made(), DELTAS, st.floats(0.5, 0.999))
@settings(max_examples=60, deadline=None)
def test_bounds_move_the_way_they_must(made: tuple[int, int, int], delta: float, confidence: float) -> None:
    m, r, v = made
    bound = epsilon_lower_bound(m, r, v, delta, confidence)
    assert epsilon_lower_bound(m + 1, r + 1, v + 1, 0.0, confidence) >= epsilon_lower_bound(m, r, v, 0.0, confidence)
    assert v == r or epsilon_lower_bound(m, r, v + 1, delta, confidence) >= bound - 1e-9
    assert epsilon_lower_bound(m + 50, r, v, delta, confidence) <= bound + 1e-9
    assert epsilon_lower_bound(m, r, v, min(0.5, 2 * delta), confidence) <= bound + 1e-9
    assert epsilon_lower_bound(m, r, v, delta, (1 + confidence) / 2) <= bound + 1e-9


@given(st.lists(st.integers(-3, 3) | st.just(math.inf), min_size=1, max_size=20), st.data())
@settings(max_examples=80, deadline=None)
def test_guesses_are_the_ends_of_the_sorted_scores(scores: list[float], data: st.DataObject) -> None:
    k_plus = data.draw(st.integers(0, len(scores)))
    k_minus = data.draw(st.integers(0 if k_plus else 1, max(len(scores) - k_plus, 0 if k_plus else 1)))
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    expected = [0] * len(scores)
    for place, i in enumerate(order):
        expected[i] = -1 if place < k_minus else 1 if place >= len(scores) - k_plus else 0
    assert guess(scores, k_plus, k_minus).tolist() == expected


def coins_for(count: int, seed: int) -> NDArray[np.bool_]:
    return draw_coins(count, seed.to_bytes(32, "big"), "query", "c000")


def test_coins_are_fair_independent_and_repeatable() -> None:
    coins = coins_for(40_000, 7)
    assert coins.dtype == bool
    assert np.array_equal(coins, coins_for(40_000, 7))
    key = (7).to_bytes(32, "big")
    others = [coins_for(40_000, 8), draw_coins(40_000, key, "query", "c001"), draw_coins(40_000, key, "other", "c000")]
    others += [np.roll(coins, 1), np.random.default_rng(7).integers(2, size=40_000) == 1]
    for share in [coins.mean(), *((coins == other).mean() for other in others)]:
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(40_000)


def test_an_audit_counts_right_guesses_of_both_kinds() -> None:
    included = [True, True, False, False, True, False, False, True]
    scores = [9, 1, 2, 8, 7, 0, 3, 4]  # two highest: right, wrong; three lowest: right, wrong, right
    verdict = one_run_audit(scores, included, [(2, 3)], claimed=1.0, delta=0.0)
    assert (verdict.canaries, verdict.k_plus, verdict.k_minus, verdict.correct, verdict.tried) == (8, 2, 3, 3, 1)
    assert verdict.bound == 0.0
    assert verdict.p_value == p_value(8, 5, 3, 1.0, 0.0)
    assert verdict.ceiling == epsilon_lower_bound(8, 5, 5, 0.0)


def noisy(coins: NDArray[np.bool_], spread: float, seed: int) -> NDArray[np.float64]:
    return coins + spread * np.random.default_rng(seed).normal(size=coins.size)


def test_several_options_are_paid_for() -> None:
    coins, options = coins_for(400, 5), [(40, 40), (100, 0), (200, 200)]
    scores = noisy(coins, 0.5, 4)
    verdict = one_run_audit(scores, coins, options, claimed=2.0, delta=1e-5)
    signs, bounds, values = np.where(coins, 1, -1), [], []
    for k_plus, k_minus in options:
        v, r = int(np.sum(guess(scores, k_plus, k_minus) == signs)), k_plus + k_minus
        bounds.append(epsilon_lower_bound(400, r, v, 1e-5, 1 - 0.05 / 3))
        values.append(by_definition(400, r, v, 2.0, 1e-5))
    assert verdict.bound == pytest.approx(max(bounds))
    assert (verdict.k_plus, verdict.k_minus) == options[int(np.argmax(bounds))]
    assert verdict.p_value == pytest.approx(min(1.0, 3 * min(values)))
    assert verdict.ceiling == pytest.approx(epsilon_lower_bound(400, 400, 400, 1e-5, 1 - 0.05 / 3))
    alone = one_run_audit(scores, coins, [(verdict.k_plus, verdict.k_minus)], claimed=2.0, delta=1e-5)
    assert 0 < verdict.bound < alone.bound < alone.ceiling


@pytest.mark.parametrize("options", [[(50, 50)], [(50, 50), (20, 0), (0, 100)]])
def test_bound_p_value_and_failure_agree(options: list[tuple[int, int]]) -> None:
    coins = coins_for(300, 5)
    scores = noisy(coins, 0.4, 6)
    bound = one_run_audit(scores, coins, options, claimed=0.0, delta=1e-5).bound
    assert bound > 1
    for claimed, fails in [(bound - 1e-6, True), (bound, False), (bound + 1e-6, False), (math.inf, False)]:
        verdict = one_run_audit(scores, coins, options, claimed=claimed, delta=1e-5)
        assert verdict.fails is fails
        assert verdict.metrics()["fails"] == fails
        assert claimed == bound or (verdict.p_value < 0.05) is fails


def refuting_count(m: int, r: int, epsilon: float, delta: float) -> int:
    """The smallest number of right guesses that puts the bound above epsilon."""
    return next((v for v in range(r + 1) if epsilon_lower_bound(m, r, v, delta) > epsilon), r + 1)


@pytest.mark.parametrize("epsilon", [0.25, 1.0, 2.5])
@pytest.mark.parametrize("r", [12, 60, 100])
def test_a_true_claim_is_refuted_with_at_most_the_stated_probability(r: int, epsilon: float) -> None:
    # Randomised response, whose right guesses are binomial: the probability is exact.
    right = 1 / (1 + math.exp(-epsilon))
    least = refuting_count(100, r, epsilon, 0.0)
    assert binom.sf(least - 1, r, right) < 0.05
    assert binom.sf(least - 2, r, right) >= 0.05  # and no count is wasted
    # With probability delta the mechanism gives all coins away, or each coin for itself.
    delta = 1e-3
    least = refuting_count(100, r, epsilon, delta)
    assert delta + (1 - delta) * binom.sf(least - 1, r, right) < 0.05
    assert binom.sf(least - 1, r, delta + (1 - delta) * right) < 0.05


def randomised_response(epsilon: float, run: int, claimed: float) -> OneRunVerdict:
    coins = coins_for(80, run)
    lies = np.random.default_rng([1, run]).random(80) >= 1 / (1 + math.exp(-epsilon))
    return one_run_audit(coins ^ lies, coins, [(15, 15)], claimed=claimed, delta=0.0)


def test_randomised_response_is_refuted_in_one_of_twenty_audits_at_most() -> None:
    verdicts = [randomised_response(1.0, run, claimed=1.0) for run in range(400)]
    assert sum(verdict.fails for verdict in verdicts) <= 20
    assert sum(verdict.fails for verdict in verdicts) >= 1  # the bound is not merely loose
    assert np.mean([verdict.bound for verdict in verdicts]) > 0.2


def test_a_mechanism_that_claims_too_little_is_caught() -> None:
    assert sum(randomised_response(4.0, run, claimed=1.0).fails for run in range(50)) >= 48


def test_a_refuted_claim_is_loud() -> None:
    with pytest.raises(PrivacyError, match=r"epsilon is above 2\.5000 .* but 1\.0000 is claimed at delta 1e-05"):
        Verdict(claimed=1.0, delta=1e-5, bound=2.5, ceiling=3.0, confidence=0.95).check()
    Verdict(claimed=2.5, delta=1e-5, bound=2.5, ceiling=3.0, confidence=0.95).check()


def test_mistakes_are_named() -> None:
    ok = {"claimed": 1.0, "delta": 0.0}
    with pytest.raises(PrivacyError, match="0 canaries"):
        draw_coins(0, bytes(32))
    with pytest.raises(PrivacyError, match="not numbers"):
        guess([1.0, math.nan], 1, 1)
    for pair in [(0, 0), (2, 1), (-1, 2), (1, -1)]:
        with pytest.raises(PrivacyError, match="for 2 canaries"):
            guess([1.0, 2.0], *pair)
    for m, r, v, epsilon, delta in [
        (3, 4, 1, 1, 0),
        (4, 3, 4, 1, 0),
        (4, 3, -1, 1, 0),
        (4, 3, 1, -1, 0),
        (4, 3, 1, 1, 1),
    ]:
        with pytest.raises(PrivacyError, match="right <= guesses <= canaries"):
            p_value(m, r, v, epsilon, delta)
    for confidence in [0.0, 1.0, 95.0, math.nan]:
        with pytest.raises(PrivacyError, match="confidence"):
            epsilon_lower_bound(10, 10, 10, 0.0, confidence)
    with pytest.raises(PrivacyError, match="0 options"):
        one_run_audit([1.0, 2.0], [True, False], [], **ok)
    with pytest.raises(PrivacyError, match=r"coins of shape \(3,\)"):
        one_run_audit([1.0, 2.0], [True, False, True], [(1, 1)], **ok)
    with pytest.raises(PrivacyError, match="claimed epsilon of nan"):
        Verdict(claimed=math.nan, delta=0.0, bound=0.0, ceiling=1.0, confidence=0.95)
