"""The claims: golden numbers, bounds that enclose the truth, and a document that says what the code computes."""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr, logsumexp, ndtr
from test_accounting import gaussian_epsilon

from fedpipe.claims import TABLE, Claim, load
from fedpipe.claims.check import HOLDS, NOT_SHOWN, TOO_LOW, Bounds, Checked, bounds, check, counting_bound, shortcut
from fedpipe.claims.show import WIDE, lines, markdown, rounded, written
from fedpipe.errors import DataError, PrivacyError
from fedpipe.privacy import accounting

DOCUMENT = Path(__file__).parents[1] / "docs" / "claims.md"

# Epsilon by RDP at orders in steps of 0.05, as printed; by PRV to 0.1, - where there is none.
# data: (claimed 3, 2, 1), every round, then with the expected participation.
RDP = {
    "SST-2": ("35.4 9.3 1.4", "20.2 6.2 1.01"),
    "QNLI": ("115.5 32.2 3.2", "60 19.4 2.5"),
    "QQP": ("3511 452 87.0", "920 292 54"),
    "MNLI": ("7463 552 103.4", "1710 328 64"),
    "CIFAR-100": ("170.7 49.5 5.1", "122 38 4.5"),
    "Tiny-ImageNet": ("734 257 36.4", "480 184 29"),
}
PRV = {
    "SST-2": ("31.0 7.9 1.19", "17.0 5.0 .60"),
    "QNLI": ("101.8 27.9 2.5", "51 16 1.7"),
    "QQP": ("- - 75.9", "- - -"),
    "MNLI": ("- - 90.7", "- - -"),
    "CIFAR-100": ("148.8 43.0 4.2", "106 33 3.6"),
    "Tiny-ImageNet": ("- - 31.1", "- - -"),
}
NEEDED = {
    "SST-2": (".751 .867 1.177", ".703 .800 1.079"),
    "QNLI": (".682 .781 1.035", ".633 .706 .869"),
    "QQP": (".613 .709 .934", ".557 .613 .704"),
    "MNLI": (".608 .704 .928", ".551 .607 .696"),
    "CIFAR-100": (".661 .756 .981", ".611 .679 .818"),
    "Tiny-ImageNet": (".597 .684 .884", ".545 .601 .695"),
}
LA = [claim for claim in load() if claim.paper == "LA-LoRA"]
NAMES = [f"{claim.dataset}-{claim.epsilon:g}" for claim in LA]


SOME = (
    "SST-2 3",
    "SST-2 2",
    "SST-2 1",
    "QNLI 2",
    "QQP 3",
    "MNLI 3",
    "MNLI 2",
    "CIFAR-100 1",
    "Tiny-ImageNet 3",
    "SST-2 6",
)


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def results(request: pytest.FixtureRequest) -> dict[str, Checked]:
    """What is valid for each claim, by its data and epsilon."""
    claims = {f"{claim.dataset} {claim.epsilon:g}": claim for claim in load()}
    names = SOME if request.param == "some" else tuple(claims)
    return dict(zip(names, check(claims[name] for name in names), strict=True))


def printed(table: dict[str, tuple[str, str]], claim: Claim, column: int) -> str:
    return table[claim.dataset][column].split()[[3, 2, 1].index(int(claim.epsilon))]


def published(results: dict[str, Checked]) -> list[Checked]:
    return [result for result in results.values() if result.claim.paper == "LA-LoRA"]


def half_a_digit(text: str) -> float:
    """Return by how much a printed number may be off for its rounding."""
    return 0.51 * 10.0 ** -len(text.partition(".")[2])


def test_the_table_has_the_eighteen_settings() -> None:
    assert sorted((claim.dataset, claim.epsilon) for claim in LA) == sorted(
        (name, eps) for name in RDP for eps in (1, 2, 3)
    )
    sizes = {claim.dataset: claim.records for claim in LA}
    assert sizes == dict(zip(RDP, (3367, 5237, 18192, 19635, 6250, 12500), strict=True))
    assert {claim.expected_steps for claim in LA} == {400, 1000}


@pytest.mark.parametrize("claim", LA, ids=NAMES)
def test_golden_rdp(claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "ORDERS", tuple([1 + x / 20 for x in range(1, 200)] + list(range(12, 64))))
    monkeypatch.setattr(accounting, "LOW_ORDERS", (1.05,))  # the golden numbers were made without lower ones
    for column, steps in enumerate((claim.steps, claim.expected_steps)):
        expected = printed(RDP, claim, column)
        history = ((claim.sigma, claim.rate, steps),)
        found = accounting._epsilon_rdp.__wrapped__(history, claim.delta)
        assert found == pytest.approx(float(expected), abs=half_a_digit(expected))


def test_golden_prv(results: dict[str, Checked]) -> None:
    compared = 0
    for result in published(results):
        for column, found in enumerate((result.every, result.expected)):
            expected = printed(PRV, result.claim, column)
            if expected == "-":
                continue
            slack = half_a_digit(expected)
            if found.fallback:
                assert found.least <= float(expected) <= found.rdp
            else:
                # The golden numbers are of an accountant that was allowed up to ten times our error.
                assert -slack <= float(expected) - found.prv <= 0.1 + slack
                compared += 1
    assert compared >= 10


def test_rdp_is_not_far_above_the_golden_numbers(results: dict[str, Checked]) -> None:
    for result in published(results):
        for column, found in enumerate((result.every, result.expected)):
            expected = printed(RDP, result.claim, column)
            assert found.rdp <= 1.08 * float(expected) + half_a_digit(expected)


def test_golden_noise(results: dict[str, Checked]) -> None:
    for result in published(results):
        assert result.needed_rdp == pytest.approx(float(printed(NEEDED, result.claim, 0)), rel=0.01)
        assert result.needed_prv == pytest.approx(float(printed(NEEDED, result.claim, 1)), rel=0.005)


def test_the_bounds_are_in_order_and_the_needed_noise_suffices(results: dict[str, Checked]) -> None:
    for result in results.values():
        claim = result.claim
        for found in (result.every, result.expected):
            assert 0 < found.least < found.prv <= found.rdp
        assert result.expected.prv <= result.every.prv
        assert result.expected.least <= result.every.least
        needed = bounds(result.needed_prv, claim.rate, claim.steps, claim.delta)
        assert needed.verdict(claim.epsilon) == HOLDS


def test_verdicts(results: dict[str, Checked]) -> None:
    assert Bounds(rdp=3.5, prv=3.0, least=1.0).verdict(3.0) == HOLDS
    assert Bounds(rdp=3.5, prv=3.1, least=3.0).verdict(3.0) == NOT_SHOWN
    assert Bounds(rdp=3.5, prv=3.1, least=3.01).verdict(3.0) == TOO_LOW
    verdicts = {name: (result.verdict, result.expected_verdict) for name, result in results.items()}
    assert verdicts.pop("SST-2 6") == (HOLDS, HOLDS)
    assert verdicts.pop("SST-2 1") == (NOT_SHOWN, HOLDS)
    assert set(verdicts.values()) == {(TOO_LOW, TOO_LOW)}
    low = [c for c in LA if counting_bound(c.sigma, c.rate, c.steps, c.delta) > c.epsilon]
    assert len(low) == 17


@settings(max_examples=60, deadline=None)
@given(sigma=st.floats(0.2, 20), steps=st.integers(1, 300), delta=st.floats(-9, -2).map(lambda power: 10.0**power))
def test_the_counting_bound_is_below_the_exact_epsilon(sigma: float, steps: int, delta: float) -> None:
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    assert counting_bound(sigma, 1.0, steps, delta) <= exact + 1e-9


@settings(max_examples=40, deadline=None)
@given(sigma=st.floats(0.05, 5), q=st.floats(1e-4, 0.9), steps=st.integers(1, 3000), delta=st.floats(1e-7, 1e-3))
def test_the_counting_bound_is_below_rdp(sigma: float, q: float, steps: int, delta: float) -> None:
    assert counting_bound(sigma, q, steps, delta) <= accounting.epsilon_rdp([(sigma, q, steps)], delta)


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta"), [(0.5, 1.0, 1, 1e-5), (1.0, 0.1, 20, 1e-3), (0.067, 8e-4, 60, 1e-6)]
)
def test_the_counting_bound_is_the_best_of_all_attacks(sigma: float, q: float, steps: int, delta: float) -> None:
    def log_tail(log_p: float, log_rest: float, k: int) -> float:
        """log P[at least k of the steps], term by term."""
        return float(
            logsumexp([math.log(math.comb(steps, i)) + i * log_p + (steps - i) * log_rest for i in range(k, steps + 1)])
        )

    best = 0.0
    for t in np.linspace(0.5, 1 + 4 * sigma, 126):
        absent = log_ndtr(-t / sigma), log_ndtr(t / sigma)
        sides = [(absent[0], log_ndtr((1 - t) / sigma)), (absent[1], log_ndtr((t - 1) / sigma))]
        present = [float(logsumexp(side, b=[1 - q, q])) for side in sides]
        for k in range(1, steps + 1):
            found = math.exp(log_tail(*present, k))
            if found > delta:
                best = max(best, math.log(found - delta) - log_tail(*absent, k))
    assert counting_bound(sigma, q, steps, delta) == pytest.approx(best, rel=1e-6)


def test_what_has_no_bound_is_refused() -> None:
    assert counting_bound(1.0, 0.1, 0, 1e-5) == 0.0
    assert counting_bound(50.0, 0.001, 10, 1e-2) == 0.0
    for arguments in ((0.0, 0.1, 10), (1.0, 1.1, 10), (1.0, 0.1, -1)):
        with pytest.raises(PrivacyError, match="sigma above 0"):
            counting_bound(*arguments, 1e-5)


def test_the_shortcut_is_how_the_eighteen_were_made_and_is_no_bound() -> None:
    for claim in LA:
        level = math.log(1 / claim.delta)
        gap = math.sqrt(level + claim.epsilon) - math.sqrt(level)
        made = claim.rate * math.sqrt(claim.steps / 2) / gap
        assert made == pytest.approx(claim.sigma, rel=0.05)
        assert shortcut(made, claim.rate, claim.steps, claim.delta) == pytest.approx(claim.epsilon)
    assert counting_bound(0.36, 16 / 3367, 2000, 1e-5) > 7 * shortcut(0.36, 16 / 3367, 2000, 1e-5)


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (0.3, 7), (5.0, 100)])
def test_without_sampling_the_shortcut_is_a_bound(sigma: float, steps: int) -> None:
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, 1e-5)
    assert exact < shortcut(sigma, 1.0, steps, 1e-5) < 1.5 * exact


def test_other_tables(tmp_path: Path) -> None:
    source = json.loads(TABLE.read_text(encoding="utf-8"))[0]
    source["settings"] = [{"dataset": "own", "records": 20000, "delta": 1e-5, "claims": [[8, 2.0], [0.01, 2.0]]}]
    source["steps"] = 100
    path = tmp_path / "own.json"
    path.write_text(json.dumps([source]), encoding="utf-8")
    claims = load(path)
    assert [(claim.records, claim.rate, claim.epsilon) for claim in claims] == [(1000, 0.016, 8), (1000, 0.016, 0.01)]
    assert [result.verdict for result in check(claims)] == [HOLDS, TOO_LOW]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"0\.steps: Input should be greater than 0; found 0"),
        ({"participation": 1.5}, r"0\.participation: .*found 1\.5"),
        ({"arxiv": "somewhere"}, r"0\.arxiv: .*found \"somewhere\""),
        ({"sigma": 1.0}, r"0\.sigma: Extra inputs are not permitted"),
        ({"batch": 4000}, "SST-2: 67349 records for 20 clients are 3367 each, fewer than a batch of 4000"),
        (
            {"settings": [{"dataset": "x", "records": 9999, "delta": 1e-5, "claims": [[3, 0]]}]},
            r"claims\.0\.1: .*found 0",
        ),
        ({"settings": []}, r"0\.settings: "),
    ],
)
def test_mistakes_in_a_table(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = json.loads(TABLE.read_text(encoding="utf-8"))[0] | change
    path = tmp_path / "own.json"
    path.write_text(json.dumps([source]), encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "missing.json")
    (tmp_path / "no.json").write_text("[{", encoding="utf-8")
    with pytest.raises(DataError, match="Invalid JSON"):
        load(tmp_path / "no.json")
    (tmp_path / "no.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load(tmp_path / "no.json")


def test_the_accountant_is_quiet_while_claims_are_checked_and_only_then(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("fedpipe.privacy.accounting")
    claim = replace(LA[0], sigma=0.0611)  # a setting of no other test, since results are kept
    for checked in check([claim]):
        assert checked.every.fallback
        assert not log.disabled
    assert not caplog.records
    with pytest.raises(PrivacyError):
        list(check([replace(claim, delta=2.0)]))
    assert not log.disabled


def test_the_document_has_the_table(results: dict[str, Checked]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    head, rule, *rows = markdown(list(results.values())).splitlines()
    assert [line for line in text.splitlines() if line in (head, rule)] == [head, rule]
    stated = [line for line in text.splitlines() if line.startswith(("| LA-LoRA ", "| FFA-LoRA "))]
    assert len(stated) == len(load())
    assert set(rows) <= set(stated)
    if len(rows) == len(stated):
        assert written(text, list(results.values())) == text


def test_the_document_says_the_numbers(results: dict[str, Checked]) -> None:
    text = " ".join(DOCUMENT.read_text(encoding="utf-8").split())
    over = [counting_bound(c.sigma, c.rate, c.steps, c.delta) / c.epsilon for c in LA]
    low = [factor for factor in over if factor > 1]
    assert f"18 settings, {len(low)} certainly spend more" in text
    assert f"factors of at least {min(low):.1f} to {max(low):.0f}" in text
    assert f"valid bound is {rounded(results['SST-2 1'].every.valid)}" in text

    q = results["SST-2 3"].claim.rate
    for sigma in (1, 0.36):
        factor = math.log1p(q * q * math.expm1(1 / sigma**2)) / (q / sigma) ** 2
        assert f"{factor:.3g} for sigma = {sigma}" in text

    mnli = results["MNLI 3"].claim
    assert f"sigma {mnli.sigma}, q = {mnli.batch} / {mnli.records}, {mnli.steps} steps" in text
    right = 1 - (1 - mnli.rate) ** mnli.steps
    wrong = mnli.steps * ndtr(-0.5 / mnli.sigma)
    assert text.count(f"probability {right:.3f}") == 2
    assert f"stands {1 / mnli.sigma:.1f} standard deviations" in text
    assert f"wrong with probability {wrong:.2g}" in text
    assert f"right with probability {math.exp(mnli.epsilon) * wrong + mnli.delta:.4g}." in text


def test_the_example_of_the_document_is_a_table(tmp_path: Path) -> None:
    (example,) = re.findall(r"^    \{\n.*?^    \}$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "own.json").write_text(f"[{example}]", encoding="utf-8")
    (claim,) = load(tmp_path / "own.json")
    assert (claim.records, claim.sigma) == (3367, 0.36)


def test_both_forms_in_a_terminal_say_the_same(results: dict[str, Checked]) -> None:
    wide, narrow = list(lines(WIDE, results.values())), list(lines(72, results.values()))
    assert max(map(len, wide)) <= WIDE
    assert max(map(len, narrow)) <= 72
    mnli = next(line for line in wide if line.startswith("MNLI "))
    assert mnli.split()[:4] == ["MNLI", "3", "0.067", "3.007"]
    assert mnli.endswith("too low (too low)")
    place = narrow.index("MNLI: 3 claimed with sigma 0.067 (q^2: 3.007)")
    both = results["MNLI 3"].every, results["MNLI 3"].expected
    for line, found in zip(narrow[place + 1 : place + 3], both, strict=True):
        assert f"RDP {rounded(found.rdp)}, PRV -, least {rounded(found.least)}; too low" in line
