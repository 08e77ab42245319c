"""Noise in shares: an exact sampler, the accountant's formula, and a sum that is noisy enough whoever drops out."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as limited
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare, kstest, norm

from fedpipe.errors import PrivacyError
from fedpipe.privacy.discrete import _exp, _exp_below_one, _uniform_bits, discrete_gaussian, tail
from fedpipe.privacy.distributed import Shares, Z, effective_sigma, square_norm, tau
from fedpipe.privacy.noise import KeyedStream
from fedpipe.server.masking import MODULUS, Terms, Whole
from fedpipe.server.secure import Client, secure_sum

KEY = bytes(range(32))


def stream(*context: str | int) -> KeyedStream:
    return KeyedStream(KEY, *context)


# The sampler


def pmf(values: np.ndarray, scale: float) -> np.ndarray:
    """The discrete Gaussian, by its definition."""
    far = math.ceil(40 * scale)
    total = math.fsum(math.exp(-(y**2) / (2 * scale**2)) for y in range(-far, far + 1))
    return np.exp(-(values.astype(float) ** 2) / (2 * scale**2)) / total


@pytest.mark.parametrize("bits", [0, 1, 2, 5])
def test_samples_have_the_probabilities_of_the_definition(bits: int) -> None:
    count, scale = 200_000, 2**bits
    found = discrete_gaussian(stream("pmf", bits), count, bits)
    values = np.arange(-6 * scale, 6 * scale + 1)
    expected = count * pmf(values, scale)
    common = expected > 25
    observed = np.array([(found == value).sum() for value in values[common]])
    rest = count - observed.sum(), count - expected[common].sum()
    assert chisquare([*observed, rest[0]], [*expected[common], rest[1]]).pvalue > 1e-4


@pytest.mark.parametrize("bits", [12, 24])
def test_wide_samples_are_those_of_a_gaussian(bits: int) -> None:
    """Beyond a scale of a few the discrete one cannot be told from the rounded continuous one."""
    count, scale = 100_000, 2**bits
    found = discrete_gaussian(stream("wide", bits), count, bits) / scale
    assert kstest(found, norm.cdf).pvalue > 1e-4
    for moment, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((found**moment).mean() - expected) < 5 * math.sqrt(spread / count)
    # The lowest bits are uniform: nothing was sampled coarsely and scaled.
    low = discrete_gaussian(stream("low", bits), count, bits) % 16
    assert chisquare(np.bincount(low, minlength=16)).pvalue > 1e-4


def test_the_same_key_draws_the_same_samples_and_another_others() -> None:
    first, again, other = (discrete_gaussian(stream("a", n), 500, 10) for n in (1, 1, 2))
    assert (first == again).all()
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.25
    # Golden: changed numbers mean that a round run again after an update would draw other noise.
    assert discrete_gaussian(stream("golden"), 8, 4).tolist() == GOLDEN
    assert discrete_gaussian(stream("none"), 0, 4).tolist() == []
    for bits in (-1, 25):
        with pytest.raises(PrivacyError, match="found a scale of"):
            discrete_gaussian(stream("x"), 1, bits)


GOLDEN = [-14, -5, -5, 11, 9, 17, 0, 16]


@pytest.mark.parametrize(("numerator", "bits"), [(0, 3), (1, 3), (5, 3), (8, 3), (13, 2), (1, 0), (3, 1)])
def test_coins_of_exponential_chance(numerator: int, bits: int) -> None:
    count, chance = 200_000, math.exp(-numerator / 2**bits)
    won = _exp(stream("coin", numerator, bits), np.full(count, numerator, dtype=np.uint64), bits)
    assert abs(won.mean() - chance) <= 5 * math.sqrt(chance * (1 - chance) / count)


def test_a_coin_is_the_alternating_series_to_the_last_bit() -> None:
    """Every outcome of the game, by exact fractions: the chance of a first failure at an odd coin."""
    for numerator, bits in ((1, 1), (3, 2), (7, 3)):
        x, term, odd = Fraction(numerator, 2**bits), Fraction(1), Fraction(0)
        for number in range(1, 30):
            term_next = term * x / number
            odd += (term - term_next) * (number % 2)
            term = term_next
        assert abs(float(odd) - math.exp(-x)) < 1e-15
    # The chance of each coin is exact: uniform bits below a numerator, of all 2^bits there are.
    words = _uniform_bits(stream("bits"), 4096, 3)
    assert set(words.tolist()) == set(range(8))
    assert _exp_below_one(stream("zero"), np.zeros(100, dtype=np.uint64), 5).all()


def test_the_tail_bound_holds() -> None:
    scale, found = 2**6, np.abs(discrete_gaussian(stream("tail"), 400_000, 6))
    for z in (1.0, 2.0, 3.0, 4.0):
        assert (found > z * scale).mean() <= tail(z, 1) + 1e-5
    assert tail(Z, 2**31) < 2**-71


# The formula


def naive_epsilon(n: int, s: float, d: int, delta: float) -> float:
    """Theorem of Kairouz, Liu and Steinke 2021 as it is printed, term by term."""
    drift = 0.0
    for k in range(1, n):
        drift += 10 * math.exp(-2 * math.pi**2 * s**2 * (k / (k + 1)))
    first = math.sqrt(delta**2 / (n * s**2) + drift * d / 2)
    second = delta / (math.sqrt(n) * s) + drift * math.sqrt(d)
    return min(first, second)


@limited(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 500),
    s=st.floats(0.5, 1e6),
    d=st.integers(1, 10**7),
    delta=st.floats(0.1, 1e7),
)
def test_the_effective_sigma_is_the_formula_read_backwards(n: int, s: float, d: int, delta: float) -> None:
    assert effective_sigma(n, s, d, delta) == pytest.approx(1 / naive_epsilon(n, s, d, delta), rel=1e-12)
    # Never better than a Gaussian of the summed variance.
    assert effective_sigma(n, s, d, delta) <= math.sqrt(n) * s / delta * (1 + 1e-12)


def test_what_the_sum_is_off_by_is_felt_where_shares_are_small() -> None:
    assert tau(1, 0.5) == 0
    assert effective_sigma(10, 0.7, 1000, 3.0) < 0.6 * math.sqrt(10) * 0.7 / 3.0
    assert effective_sigma(10, 16, 10**7, 3.0) == pytest.approx(math.sqrt(10) * 16 / 3.0, rel=1e-12)
    with pytest.raises(PrivacyError, match="found shares of scale 0"):
        effective_sigma(3, 0.4, 10, 1.0)


def test_the_divergence_of_a_real_sum_is_below_the_formula() -> None:
    """Two shares, convolved by their definition, at orders 1.5 to 8: against the sum moved by Delta."""
    for scale, delta in ((0.6, 1), (0.9, 1), (1.5, 2)):
        one = pmf(np.arange(-60, 61), scale)
        with np.errstate(divide="ignore"):
            log = np.log(np.convolve(one, one))
        first, moved = log[delta:], log[:-delta]
        inside = (first > -500) & (moved > -500)
        epsilon = 1 / effective_sigma(2, scale, 1, delta)
        for order in (1.5, 2.0, 4.0, 8.0):
            terms = order * first[inside] + (1 - order) * moved[inside]
            divergence = math.log(math.fsum(np.exp(terms))) / (order - 1)
            assert 0 < divergence <= order * epsilon**2 / 2 + 1e-9


# Shares


SHAPES = st.tuples(st.integers(2, 200), st.integers(1, 10**6), st.floats(0.3, 60.0), st.floats(0.01, 50.0))


@limited(max_examples=100, deadline=None)
@given(shape=SHAPES, share=st.floats(0.5, 1.0))
def test_the_fewest_clients_are_as_good_as_asked_and_more_are_better(
    shape: tuple[int, int, float, float], share: float
) -> None:
    chosen, size, sigma, clip = shape
    least = max(chosen // 2 + 1, math.ceil(share * chosen))
    made = Shares(clip, sigma, chosen, least, size)
    found = [
        effective_sigma(n, made.scale, size, made.sensitivity, chosen)
        for n in range(least, chosen + 1, 1 + chosen // 9)
    ]
    assert found[0] >= sigma
    assert found[0] == pytest.approx(sigma, rel=1e-6)
    assert found == sorted(found)
    # Below the noise that is really there: what rounding costs is paid for.
    assert found[0] < math.sqrt(least) * made.scale * made.unit / clip
    # The clients' own numbers, all in one place, and Z deviations of noise stay within 31 bits.
    assert chosen * made.sensitivity + Z * math.sqrt(chosen) * made.scale < 2**31


@limited(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 300),
    seed=st.integers(0, 2**32),
    length=st.sampled_from([0.0, 1e-9, 0.5, 1.0, 1.0 + 1e-15, 7.0, 1e200]),
    sparse=st.booleans(),
)
def test_whole_numbers_are_never_longer_than_accounted(size: int, seed: int, length: float, sparse: bool) -> None:
    made, generator = Shares(1.0, 40.0, 4, 3, size), np.random.default_rng(seed)
    move = generator.standard_normal(size)
    if sparse:
        move[1:] = 0
    move *= length / np.linalg.norm(move)
    whole = made.counted(move, stream("rounding", seed))
    assert square_norm(whole) == sum(int(number) ** 2 for number in whole)
    assert square_norm(whole) <= made.sensitivity**2
    if length <= 1:
        assert np.abs(whole * made.unit - move).max() <= made.unit * 1.01 + 1e-8 * length
    elif length < 1e100:
        assert np.linalg.norm(whole * made.unit) == pytest.approx(1.0, rel=1e-3)


def test_square_norms_are_exact_at_their_largest() -> None:
    numbers = np.array([2**31 - 1, -(2**31 - 1), 2**16, -3], dtype=np.int64)
    assert square_norm(numbers) == 2 * (2**31 - 1) ** 2 + 2**32 + 9


def test_rounding_keeps_the_expectation() -> None:
    made = Shares(1.0, 2.0, 4, 3, 50_000)
    move = np.full(made.size, 0.5 * made.unit)  # half a whole number
    whole = made.counted(move, stream("half"))
    assert set(whole.tolist()) == {0, 1}
    assert abs(whole.mean() - 0.5) < 5 * 0.5 / math.sqrt(made.size)


def test_a_move_that_is_no_number_counts_as_none() -> None:
    made = Shares(1.0, 2.0, 4, 3, 3)
    for bad in (np.nan, np.inf, -np.inf):
        assert not made.counted(np.array([0.1, bad, 0.2]), stream("x")).any()
        # Its share of the noise is there all the same.
        assert made.share(np.array([0.1, bad, 0.2]), KEY, "query", 1).any()
    with pytest.raises(PrivacyError, match="expected 3 numbers"):
        made.counted(np.zeros(4), stream("x"))


def test_too_coarse_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"too coarse in 32 bits; lower federation.clients_per_round"):
        Shares(1.0, 0.3, 500_000, 300_000, 1)  # shares of scale 2
    with pytest.raises(PrivacyError, match="too coarse"):
        Shares(1.0, 9000.0, 4, 3, 10**8)


def test_noise_is_that_of_its_client_query_and_round_and_of_nothing_else() -> None:
    made, move = Shares(1.0, 2.0, 4, 3, 2000), np.full(2000, 0.01)
    first = made.share(move, KEY, "query", 1)
    assert (first == made.share(move, KEY, "query", 1)).all()
    for other in (
        made.share(move, bytes(32), "query", 1),
        made.share(move, KEY, "other", 1),
        made.share(move, KEY, "query", 2),
    ):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.12
    # It does not depend on the move: what differs between two moves is the moves.
    difference = (made.share(np.zeros(2000), KEY, "query", 1) - first) * made.unit
    assert np.abs(difference + move * 1.0).max() < 3 * made.unit


# The sum


@pytest.mark.parametrize(("chosen", "gone"), [(3, 0), (3, 1), (5, 0), (5, 1), (5, 2)])
def test_the_noise_of_every_allowed_sum_is_at_least_that_asked_for(chosen: int, gone: int) -> None:
    size, sigma, clip, least = 40_000, 1.7, 0.3, 3 if chosen == 5 else 2
    made = Shares(clip, sigma, chosen, least, size)
    names = tuple(f"c{number}" for number in range(chosen))
    terms = Terms("query", 1, names, least, size, Whole(made.unit))
    moves = {name: np.random.default_rng(place).standard_normal(size) * 1e-4 for place, name in enumerate(names)}
    keys = {name: bytes([place + 1] * 32) for place, name in enumerate(names)}
    clients = [Client(name, keys[name], terms, made.share(moves[name], keys[name], "query", 1)) for name in names]
    found = secure_sum(terms, clients, lost=names[:gone])
    noise = found.values - sum(moves[name] for name in names[gone:])
    asked = (sigma * clip) ** 2
    # One-sided, at a chance of 1e-6: the sample variance is not below what was asked for.
    assert noise.var() * size >= asked * chi2.ppf(1e-6, size)
    assert noise.var() == pytest.approx((chosen - gone) / least * asked, rel=0.05)
    assert abs(noise.mean()) < 5 * math.sqrt(noise.var() / size)
    assert kstest(noise / noise.std(), norm.cdf).pvalue > 1e-4


def test_sums_of_whole_numbers_come_back_with_their_signs() -> None:
    codec = Whole(0.5)
    encoded = codec.encode(np.array([-1, 2, -(2**31), 2**31 - 1]), None, stream("unused"))
    assert encoded.dtype == np.uint32
    assert encoded[0] == MODULUS - 1
    assert codec.decode(encoded, 7).values.tolist() == [-0.5, 1.0, -(2.0**30), (2**31 - 1) / 2]
    assert codec.decode(encoded, 7).mean[1] == 1.0 / 7
    with pytest.raises(PrivacyError, match="float64"):
        codec.encode(np.zeros(2), None, stream("unused"))
    with pytest.raises(PrivacyError, match="weight 3"):
        codec.encode(np.zeros(2, dtype=np.int64), 3, stream("unused"))
