"""Epsilon: against published golden numbers, Opacus, closed forms and a naive composition."""

from __future__ import annotations

import itertools
import logging
import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from scipy.fft import irfft, rfft
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from fedpipe.errors import PrivacyError
from fedpipe.privacy import accounting
from fedpipe.privacy.accounting import calibrate, delta_auto, epsilon, epsilon_prv, epsilon_rdp, merge
from fedpipe.privacy.renyi import renyi_curve

DELTA = 1e-5

GOLDEN = [
    ([(1.0, 0.01, 1000)], 2.1014, 1.8384),
    ([(0.8, 0.005, 2000)], 2.5933, 2.0972),
    ([(1.0, 1.0, 1)], 4.7285, 4.3874),
    ([(2.0, 0.1, 100)], 2.5806, 2.3476),
    ([(1.0, 0.01, 500), (1.5, 0.02, 200)], 1.8530, 1.5787),
]


@pytest.fixture(autouse=True)
def _fresh_caches():
    accounting._epsilon_prv.cache_clear()
    accounting._epsilon_rdp.cache_clear()


def gaussian_delta(eps: float, mu: float) -> float:
    """Exact delta of a Gaussian mechanism of sensitivity mu and noise 1 (Balle and Wang 2018)."""
    return ndtr(mu / 2 - eps / mu) - math.exp(eps + log_ndtr(-mu / 2 - eps / mu))


def gaussian_epsilon(mu: float, delta: float) -> float:
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    return brentq(lambda eps: gaussian_delta(eps, mu) - delta, 0, mu * mu + 60 * mu + 1, xtol=1e-10)


def composed_epsilon(history, delta: float, mesh: float, width: float, adding: bool) -> float:
    """Naive composition, with every loss rounded down to the mesh: never above the exact epsilon."""
    size = int(2 * width / mesh)
    transform = 1.0
    for sigma, q, steps in history:
        edges = np.arange(-size // 2, size // 2 + 1) * mesh
        with np.errstate(all="ignore"):
            # The point x at which log((1 - q) + q exp((2 x - 1) / 2 sigma^2)), the loss, is at an edge.
            points = np.log((np.expm1(-edges if adding else edges) + q) / q) * sigma**2 + 0.5
        points = np.where(np.isnan(points), -np.inf, points)
        if adding:  # the loss is the negative one, of a record-free draw
            cumulative = ndtr(-points / sigma)
        else:
            cumulative = (1 - q) * ndtr(points / sigma) + q * ndtr((points - 1) / sigma)
        mass = np.diff(cumulative)
        transform = transform * rfft(np.roll(mass, size // 2)) ** steps
    mass = np.roll(irfft(transform, size), size // 2)
    losses = np.arange(-size // 2, size // 2) * mesh

    def excess(eps: float) -> float:
        above = losses > eps
        return float(np.sum(mass[above] * -np.expm1(eps - losses[above]))) - delta

    return brentq(excess, 0, width) if excess(0) > 0 else 0.0


@pytest.mark.parametrize(("history", "rdp", "prv"), GOLDEN)
def test_golden_numbers(history, rdp, prv):
    assert epsilon_rdp(history, DELTA) == pytest.approx(rdp, abs=6e-5)
    assert epsilon_prv(history, DELTA) == pytest.approx(prv, abs=6e-5)


@pytest.mark.parametrize("history", [case[0] for case in GOLDEN])
@pytest.mark.filterwarnings("ignore")
def test_equals_opacus(history):
    for ours, accountant in ((epsilon_rdp, RDPAccountant()), (epsilon_prv, PRVAccountant())):
        accountant.history = history
        assert ours(history, DELTA) == accountant.get_epsilon(DELTA)


@pytest.mark.parametrize(("sigma", "q"), [(1.0, 0.01), (0.5, 0.3), (3.0, 0.5), (2.0, 0.99), (0.4, 0.04), (20.0, 0.2)])
def test_the_curve_that_finds_the_order_is_opacus_curve(sigma, q):
    for orders in (accounting.ORDERS, accounting.LOW_ORDERS, accounting.HIGH_ORDERS):
        expected = [compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=float(order)) for order in orders]
        assert renyi_curve(sigma, q, orders) == pytest.approx(expected, rel=1e-4, abs=1e-8)


@settings(max_examples=30, deadline=None)
@example(entries=[(0.3046875, 0.9999999999999999, 14)], delta=0.01)
@given(
    entries=st.lists(st.tuples(st.floats(0.3, 30), st.floats(1e-4, 1.0), st.integers(1, 500)), min_size=1, max_size=3),
    delta=st.floats(-9, -2).map(lambda exponent: 10.0**exponent),
)
def test_the_order_that_is_found_is_the_best_of_all(entries, delta):
    orders = list(accounting.ORDERS)
    curves = [compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=orders) for sigma, q, steps in entries]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best, _ = get_privacy_spent(orders=orders, rdp=sum(curves), delta=delta)
        found, _ = accounting._renyi(entries, delta, accounting.ORDERS)
    assert found == pytest.approx(max(0.0, best), rel=1e-12)


def test_without_a_curve_every_order_is_tried(monkeypatch):
    expected = epsilon_rdp([(1.0, 0.01, 1000)], DELTA)
    accounting._epsilon_rdp.cache_clear()
    for wrong in (math.inf, math.nan):
        monkeypatch.setattr(accounting, "renyi_curve", lambda sigma, q, orders: np.full(len(orders), wrong))  # noqa: B023
        assert epsilon_rdp([(1.0, 0.01, 1000)], DELTA) == expected
        accounting._epsilon_rdp.cache_clear()


def test_mechanisms_that_spend_nothing():
    for history in ([], [(1.0, 0.1, 0)], [(1.0, 0.0, 50)]):
        assert epsilon_rdp(history, DELTA) == epsilon_prv(history, DELTA) == 0.0
    assert epsilon_prv([(1.0, 0.0, 50), (1.0, 0.01, 5)], DELTA) == epsilon_prv([(1.0, 0.01, 5)], DELTA)


@settings(max_examples=12, deadline=None)
@given(
    sigma=st.floats(0.3, 20),
    steps=st.integers(1, 300),
    delta=st.floats(-9, -2).map(lambda exponent: 10.0**exponent),
)
def test_bounds_enclose_the_exact_epsilon_without_sampling(sigma, steps, delta):
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    prv, rdp = epsilon_prv([(sigma, 1.0, steps)], delta), epsilon_rdp([(sigma, 1.0, steps)], delta)
    assert exact <= prv <= rdp
    assert prv <= exact + 0.02 or prv == rdp
    assert rdp <= 1.15 * exact + 0.3


@settings(max_examples=25, deadline=None)
@given(sigma=st.floats(0.5, 5), q=st.floats(1e-3, 0.99), delta=st.floats(1e-7, 1e-4))
def test_bounds_enclose_the_exact_epsilon_of_one_sampled_step(sigma, q, delta):
    # Amplification by sampling: delta(eps) = q delta_gaussian(log(1 + (exp(eps) - 1) / q)).
    unsampled = gaussian_epsilon(1 / sigma, delta / q) if delta < q else 0.0
    exact = math.log1p(q * math.expm1(unsampled))
    prv = epsilon_prv([(sigma, q, 1)], delta)
    assert exact <= prv <= min(exact + 0.015, epsilon_rdp([(sigma, q, 1)], delta))


@pytest.mark.parametrize(
    "history",
    [[(1.2, 0.2, 50)], [(0.8, 0.05, 100)], [(4.0, 0.9, 30)], [(1.0, 0.3, 10), (2.0, 0.05, 40), (5.0, 1.0, 3)]],
)
def test_prv_is_above_a_naive_composition_in_both_directions(history):
    removing, adding = (composed_epsilon(history, DELTA, 2e-4, 40.0, adding) for adding in (False, True))
    prv = epsilon_prv(history, DELTA)
    rounding = 2e-4 * sum(steps for *_, steps in history)
    assert max(removing, adding) < prv < removing + rounding + 0.015


@pytest.mark.filterwarnings("ignore")
def test_orders_are_extended_at_both_ends():
    for history in ([(0.03, 1.0, 3)], [(1000.0, 1.0, 1)]):
        accountant = RDPAccountant()
        accountant.history = history
        (sigma, _, steps), *_ = history
        narrow, wide = accountant.get_epsilon(DELTA), epsilon_rdp(history, DELTA)
        assert gaussian_epsilon(math.sqrt(steps) / sigma, DELTA) < wide < narrow


@pytest.mark.filterwarnings("ignore")
def test_prv_is_not_used_where_its_arithmetic_is_too_coarse(caplog):
    history, delta = [(50.0, 1.0, 2000)], 1e-12
    accountant = PRVAccountant()
    accountant.history = history
    exact = gaussian_epsilon(math.sqrt(2000) / 50, delta)
    assert accountant.get_epsilon(delta) < exact  # the case exists
    assert exact < epsilon_prv(history, delta) == epsilon_rdp(history, delta)
    assert "in place of PRV" in caplog.text


@pytest.mark.parametrize("history", [[(0.02, 0.5, 10)], [(0.2, 0.02, 100_000)], [(0.01, 1.0, 10**9)]])
def test_absurd_noise_falls_back_to_rdp(history, caplog):
    value = epsilon_prv(history, DELTA)
    assert value == epsilon_rdp(history, DELTA)
    assert 100 < value < math.inf
    assert "in place of PRV" in caplog.text


@pytest.mark.parametrize(
    "result", [math.nan, math.inf, -0.1, RuntimeError("mean"), MemoryError("size"), ValueError("x")]
)
def test_a_failing_composition_falls_back_to_rdp(monkeypatch, caplog, result):
    def compose(history, delta):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(accounting, "_compose", compose)
    history = [(1.0, 0.01, 1000)]
    assert epsilon_prv(history, DELTA) == epsilon_rdp(history, DELTA)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_composition_above_rdp_is_not_reported(monkeypatch, caplog):
    monkeypatch.setattr(accounting, "_compose", lambda history, delta: 7.0)
    assert epsilon_prv([(1.0, 0.01, 1000)], DELTA) == epsilon_rdp([(1.0, 0.01, 1000)], DELTA)
    assert "is below that by PRV" in caplog.text


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_monotone(accountant):
    def at(sigma=1.0, q=0.05, steps=100, delta=DELTA):
        return epsilon([(sigma, q, steps)], delta, accountant)

    for curve in (
        [at(sigma=sigma) for sigma in (4.0, 2.0, 1.0, 0.7)],
        [at(q=q) for q in (0.01, 0.05, 0.2, 0.7, 1.0)],
        [at(steps=steps) for steps in (1, 10, 11, 100, 1000)],
        [at(delta=delta) for delta in (1e-3, 1e-5, 1e-7)],
    ):
        assert all(a < b for a, b in itertools.pairwise(curve))


@given(st.permutations([(1.0, 0.01, 30), (2.0, 0.01, 5), (1.0, 0.02, 7), (1.0, 0.01, 12), (2.0, 0.01, 0)]))
@settings(max_examples=10, deadline=None)
def test_order_and_grouping_do_not_matter(history):
    assert merge(history) == ((1.0, 0.01, 42), (1.0, 0.02, 7), (2.0, 0.01, 5))
    assert epsilon_prv(history, DELTA) == epsilon_prv(merge(history), DELTA)
    assert merge(merge(history)) == merge(history)


def test_results_are_cached(monkeypatch):
    calls = []
    monkeypatch.setattr(accounting, "_compose", lambda *key: calls.append(key) or 1.0)
    for history in ([(1.0, 0.01, 1000)], [(1.0, 0.01, 400), (1.0, 0.01, 600)]):
        epsilon_prv(history, DELTA)
    assert len(calls) == 1


def test_warning_filters_are_left_alone():
    before = list(warnings.filters)
    epsilon_prv([(1.0, 1.0, 2)], DELTA)
    assert warnings.filters == before


IMPOSSIBLE = [(sigma, 0.1, 1) for sigma in (0.0, -1.0, math.nan, math.inf)]
IMPOSSIBLE += [(1.0, q, 1) for q in (1.1, -0.1, math.nan)] + [(1.0, 0.1, steps) for steps in (-1, 1.5)]


@pytest.mark.parametrize("entry", IMPOSSIBLE)
def test_impossible_entries_are_refused(entry):
    with pytest.raises(PrivacyError, match="expected sigma above 0"):
        merge([entry])


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_impossible_deltas_are_refused(delta):
    for bound in (epsilon_rdp, epsilon_prv):
        with pytest.raises(PrivacyError, match=r"privacy\.delta"):
            bound([(1.0, 0.1, 1)], delta)


def test_unknown_accountant():
    with pytest.raises(PrivacyError, match=r"privacy\.accountant: found 'pvr'; did you mean 'prv'"):
        epsilon([], DELTA, "pvr")


@settings(max_examples=8, deadline=None)
@given(
    target=st.floats(0.05, 30),
    q=st.floats(0.001, 1.0),
    steps=st.integers(1, 200),
    accountant=st.sampled_from(["rdp", "prv"]),
)
def test_calibration_is_tight_and_never_above_the_target(target, q, steps, accountant):
    sigma = calibrate(target, DELTA, q, steps, accountant)
    assert epsilon([(sigma, q, steps)], DELTA, accountant) <= target
    assert float(f"{sigma:.4g}") == sigma
    assert epsilon([(sigma * (1 - 1.001e-3), q, steps)], DELTA, accountant) > target


def test_calibration_is_the_first_of_the_grid_within_the_target():
    for target in np.linspace(0.3, 9.7, 60):
        index = accounting._index(calibrate(target, DELTA, 1.0, 20, "rdp"))
        here, before = (epsilon_rdp([(accounting._grid(i), 1.0, 20)], DELTA) for i in (index, index - 1))
        assert here <= target < before


def test_calibration_by_prv_needs_less_noise_and_keeps_published_pairs():
    # Noise multipliers for epsilon 3, 2 and 1 at batch 16 of 3367 records and 2000 steps, by RDP and by PRV.
    for target, rdp, prv in ((3, 0.751, 0.703), (2, 0.867, 0.800), (1, 1.177, 1.079)):
        assert calibrate(target, DELTA, 16 / 3367, 2000, "rdp") == pytest.approx(rdp, abs=2e-3)
        assert calibrate(target, DELTA, 16 / 3367, 2000, "prv") == pytest.approx(prv, abs=2e-3)


def test_calibration_that_is_impossible_names_the_knobs():
    with pytest.raises(PrivacyError) as error:
        calibrate(1e-4, 1e-5, 1.0, 1000, "prv")
    for word in ("privacy.epsilon", "0.0001", "privacy.delta", "1e-05", "sampling rate 1", "1000 steps", "batch_size"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_calibration_of_a_huge_budget_stops_at_the_floor():
    assert calibrate(1e6, DELTA, 0.1, 10, "rdp") == accounting.SIGMA_MIN


@given(st.floats(0.01, 1e4))
@settings(max_examples=200)
def test_the_grid_has_four_digits_and_no_gaps(sigma):
    index = accounting._index(sigma)
    assert accounting._grid(index - 1) < sigma <= accounting._grid(index)
    assert accounting._grid(index) <= accounting._grid(index - 1) * 1.0011
    assert len(f"{accounting._grid(index):g}".replace(".", "").lstrip("0").rstrip("0")) <= 4


def test_delta_auto():
    assert delta_auto([200, 3000]) == 1e-5
    assert delta_auto([200, 50_000]) == 1 / 500_000
    assert delta_auto([]) == 1e-5
