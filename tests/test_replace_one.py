"""Adjacency replace-one: one choice, the same in calibration, plan, ledger, budget and what is printed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_project, tiny_values

from fedpipe.cli import main
from fedpipe.config import Settings, parse_settings
from fedpipe.errors import PrivacyError, SettingsError
from fedpipe.files import canonical_json, digest
from fedpipe.listing.budget import Budget
from fedpipe.plan import Plan, make_plan
from fedpipe.privacy.accounting import REPLACE_ONE, calibrate, epsilon, epsilon_prv, epsilon_rdp
from fedpipe.privacy.ledger import Ledger, LedgerEntry
from fedpipe.privacy.neighbours import UNITS, adjacency_of, neighbours
from fedpipe.privacy.planning import calibrated, cost, largest_batch, most_steps, sigmas
from fedpipe.privacy.recompute import verify_ledger
from fedpipe.privacy.summary import summary
from fedpipe.project import Project

DELTA, HISTORY = 1e-5, [(1.0, 0.01, 1000)]
SIZES = {"c000": 300, "c001": 900, "c002": 24}


def test_golden_numbers() -> None:
    assert epsilon_prv(HISTORY, DELTA) == pytest.approx(1.8384, abs=6e-5)
    assert epsilon_prv(HISTORY, DELTA, REPLACE_ONE) == pytest.approx(2.8536, abs=6e-5)
    assert epsilon_rdp(HISTORY, DELTA, REPLACE_ONE) == pytest.approx(3.1110, abs=6e-5)
    assert epsilon(HISTORY, DELTA, "prv", REPLACE_ONE) == epsilon_prv(HISTORY, DELTA, REPLACE_ONE)
    # The usual rule, half the noise at the same rate, is far above.
    assert epsilon_prv([(0.5, 0.01, 1000)], DELTA) == pytest.approx(13.3718, abs=6e-5)


@settings(max_examples=5, deadline=None)
@given(
    target=st.floats(0.2, 20), q=st.floats(0.002, 1.0), steps=st.integers(1, 3000), delta=st.sampled_from([1e-5, 1e-7])
)
def test_calibration_never_exceeds_the_target(target: float, q: float, steps: int, delta: float) -> None:
    sigma = calibrate(target, delta, q, steps, "rdp", REPLACE_ONE)
    assert epsilon_rdp([(sigma, q, steps)], delta, REPLACE_ONE) <= target
    assert epsilon_rdp([(0.998 * sigma, q, steps)], delta, REPLACE_ONE) > target
    assert sigma >= calibrate(target, delta, q, steps, "rdp")


@pytest.mark.parametrize(("target", "q", "steps"), [(1.0, 0.02, 200), (8.0, 0.1, 50), (3.0, 1.0, 10), (0.5, 0.3, 4)])
def test_calibration_by_prv_never_exceeds_the_target(target: float, q: float, steps: int) -> None:
    sigma = calibrate(target, DELTA, q, steps, "prv", REPLACE_ONE)
    assert epsilon_prv([(sigma, q, steps)], DELTA, REPLACE_ONE) <= target
    assert sigma <= calibrate(target, DELTA, q, steps, "rdp", REPLACE_ONE)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_without_sampling_it_takes_twice_the_noise(accountant: str) -> None:
    """Exactly so; the numbers differ by the orders that are tried, by what PRV adds, and by four digits."""
    for target, steps in ((2.0, 10), (8.0, 100)):
        once, twice = (calibrate(target, DELTA, 1.0, steps, accountant, *by) for by in ((), (REPLACE_ONE,)))
        assert twice == pytest.approx(2 * once, rel=5e-3)


@settings(max_examples=40, deadline=None)
@given(sigma=st.floats(0.5, 10), q=st.floats(0.001, 0.5), steps=st.integers(1, 500))
def test_epsilon_grows_with_rate_and_steps(sigma: float, q: float, steps: int) -> None:
    """What leaves dominated clients out of a round's accounting rests on it."""
    here = epsilon_rdp([(sigma, q, steps)], DELTA, REPLACE_ONE)
    assert here <= epsilon_rdp([(sigma, min(1.0, 1.3 * q), steps)], DELTA, REPLACE_ONE) + 1e-9
    assert here <= epsilon_rdp([(sigma, q, steps + 1)], DELTA, REPLACE_ONE) + 1e-9
    assert here >= epsilon_rdp([(sigma, q, steps)], DELTA) * (1 - 1e-6)


def test_the_words_and_back() -> None:
    assert neighbours("record") == "add/remove one record of one client"
    assert neighbours("group") == "add/remove one group of records of one client"
    assert neighbours("client") == "add/remove one client with all its records"
    assert neighbours("record", REPLACE_ONE) == "replace one record of one client"
    assert neighbours("none", REPLACE_ONE) is None
    for adjacency in ("add-remove", "replace-one"):
        assert {adjacency_of(neighbours(unit, adjacency)) for unit in UNITS} == {adjacency}
    for unit, adjacency in (("recrd", "add-remove"), ("record", "replace")):
        with pytest.raises(PrivacyError, match="did you mean"):
            neighbours(unit, adjacency)
    with pytest.raises(PrivacyError, match="is not known"):
        adjacency_of("swap one record")
    with pytest.raises(PrivacyError, match=r"privacy\.adjacency"):
        epsilon(HISTORY, DELTA, "prv", "swap")


def test_a_setting_that_there_is_not_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"privacy\.adjacency: found 'replace-on'; did you mean 'replace-one'"):
        parse_settings(tiny_values(tmp_path, privacy={"adjacency": "replace-on"}))


def settings_of(adjacency: str = REPLACE_ONE, **privacy: Any) -> Settings:
    federation = {"rounds": 4, "local_steps": 3, "batch_size": 30}
    return parse_settings(tiny_values(Path("x"), federation=federation, privacy={"adjacency": adjacency, **privacy}))


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_the_plan_is_calibrated_for_it(accountant: str) -> None:
    plan = make_plan(settings_of(accountant=accountant, epsilon=3.0), SIZES)
    added = make_plan(settings_of("add-remove", accountant=accountant, epsilon=3.0), SIZES)
    assert plan.adjacency == "replace one record of one client"
    for client, own in plan.clients.items():
        assert own.noise_multiplier == calibrate(3.0, plan.delta, own.sampling_rate, 12, accountant, REPLACE_ONE)
        assert own.noise_multiplier > added.clients[client].noise_multiplier
        assert plan.accounted(own.history_at_cap) == epsilon(own.history_at_cap, plan.delta, accountant, REPLACE_ONE)
        assert 2.9 < plan.accounted(own.history_at_cap) <= 3.0
        assert plan.accounted(own.history_at_cap, "rdp") == epsilon_rdp(own.history_at_cap, plan.delta, REPLACE_ONE)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_plans_of_before_are_read(tmp_path: Path) -> None:
    plan = make_plan(settings_of("add-remove"), SIZES)
    old = plan.to_json()
    old.pop("central", None)
    assert all(set(client) == {"records", "sampling_rate", "expected_batch", "noise_multiplier", "max_steps",
                               "local_steps"} for client in old["clients"].values())  # fmt: skip
    assert Plan.from_json(old) == plan


def entries(count: int = 5) -> list[LedgerEntry]:
    return [LedgerEntry("c000", 1, step, 1.5, 0.2, "query") for step in range(1, count + 1)]


def test_the_ledger_says_it_and_is_accounted_by_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", "run", "record", REPLACE_ONE)
    ledger.append(entries())
    assert ledger.header["adjacency"] == "replace one record of one client"
    assert Ledger(tmp_path / "ledger.jsonl").adjacency == REPLACE_ONE
    with pytest.raises(PrivacyError, match="is the ledger of"):
        Ledger(tmp_path / "ledger.jsonl", "run", "record")
    verified = verify_ledger(tmp_path / "ledger.jsonl", DELTA)
    history = [(1.5, 0.2, 5)]
    assert verified.adjacency == "replace one record of one client"
    both = epsilon_prv(history, DELTA, REPLACE_ONE), epsilon_rdp(history, DELTA, REPLACE_ONE)
    assert verified.largest == both != (epsilon_prv(history, DELTA), epsilon_rdp(history, DELTA))
    told = summary(ledger, DELTA, "rdp", {"c000": 10}, dp_valid=True, adjacency=REPLACE_ONE)
    assert (told["adjacency"], told["epsilon_max"]) == ("replace one record of one client", both[1])
    with pytest.raises(PrivacyError, match="expected one of unit 'record', add/remove one record"):
        summary(ledger, DELTA, "rdp", {"c000": 10}, dp_valid=True)


def written(path: Path, unit: str, adjacency: str) -> Path:
    header = {"format": 1, "run_id": "run", "unit": unit, "adjacency": adjacency}
    path.write_text(canonical_json({**header, "hash": digest(header)}) + "\n")
    return path


@pytest.mark.parametrize("unit", ["record", "client"])
def test_ledgers_of_before_are_read(unit: str, tmp_path: Path) -> None:
    words = {"record": "add/remove one record of one client", "client": "add/remove one client with all its records"}
    path = written(tmp_path / "ledger.jsonl", unit, words[unit])
    Ledger(path, "run", unit).append(entries())
    verified = verify_ledger(path, DELTA)
    assert verified.largest == (epsilon_prv([(1.5, 0.2, 5)], DELTA), epsilon_rdp([(1.5, 0.2, 5)], DELTA))


@pytest.mark.parametrize("words", ["add/remove one client with all its records", "swap one record of one client"])
def test_a_header_that_contradicts_itself_is_refused(words: str, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match=r"line 1: .*adjacency"):
        Ledger(written(tmp_path / "ledger.jsonl", "record", words))


def test_what_it_would_cost() -> None:
    target, q, sigma = 4.0, 0.1, 1.4
    assert cost(100, 10, 50, sigma, DELTA, REPLACE_ONE).rdp == epsilon_rdp([(sigma, q, 50)], DELTA, REPLACE_ONE)
    assert calibrated(100, 10, 50, target, DELTA, "rdp", REPLACE_ONE).rdp <= target
    steps = most_steps(target, DELTA, q, sigma, "rdp", REPLACE_ONE)
    assert epsilon_rdp([(sigma, q, steps)], DELTA, REPLACE_ONE) <= target
    assert epsilon_rdp([(sigma, q, steps + 1)], DELTA, REPLACE_ONE) > target
    batch = largest_batch(target, DELTA, 100, 50, sigma, "rdp", REPLACE_ONE)
    assert batch < largest_batch(target, DELTA, 100, 50, sigma, "rdp")
    assert sigmas([target], [50], 100, 10, DELTA, "rdp", REPLACE_ONE) == [
        [calibrate(target, DELTA, q, 50, "rdp", REPLACE_ONE)]
    ]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Settings]:
    return make_project(tmp_path_factory.mktemp("replace_one"), privacy={"adjacency": REPLACE_ONE, "accountant": "rdp"})


def test_the_command_tells_of_it(project: tuple[Project, Settings], tmp_path: Path) -> None:
    command = ["budget", "--params", str(project[0].root / "params.yaml"), "--records", "200"]
    done = CliRunner().invoke(main, [*command, "--picture", str(tmp_path / "budget.svg")])
    assert done.exit_code == 0, done.output
    assert "replace one record of one client" in " ".join(done.output.split())
    sigma = make_plan(project[1], {"c": 200}).clients["c"].noise_multiplier
    assert f"{sigma:.4g}" in done.output
    asked = Budget(project[1], (200,), 8.0)
    assert asked.cost(200).sigma == sigma
    spent = replace(asked, sigma=sigma).cost(200)
    assert spent.rdp == epsilon_rdp([(sigma, spent.q, spent.steps)], asked.delta, REPLACE_ONE) <= 8.0
    other = CliRunner().invoke(main, [*command, "--set", "privacy.adjacency=add-remove"])
    assert "add/remove one record of one client" in " ".join(other.output.split())
    assert f"{sigma:.4g} " not in other.output
    groups = ["--set", "privacy.unit=group", "--set", "privacy.group=topic"]
    grouped = CliRunner().invoke(main, [*command, *groups])
    assert "groups" in grouped.output
    assert "replace one group of records of one client" in " ".join(grouped.output.split())
    none = CliRunner().invoke(main, [*command[:3], *groups])
    assert none.exit_code != 0
    assert "the partition has no groups" in none.output
