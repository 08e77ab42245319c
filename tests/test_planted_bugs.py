"""Every planted bug is found by a named check, and no check finds anything in the code as it is.

The bugs are those that implementations of private federated training really had (`planted.bugs`). The checks
know nothing of them: they ask for properties of the mechanism (`planted.of_steps`, `planted.of_accounts`).
Some bugs do not get so far, because the program itself refuses to go on; that is shown too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from planted import bugs, of_accounts, of_steps, of_units, unit_bugs  # noqa: F401 (they register what is in them)
from planted.checks import CHECKS, ViolationError
from planted.planting import BUGS, Bug, Planting
from planted.world import BATCH, CLIENTS, QUERY, Lab, unfiltered

from fedpipe import budget, plan
from fedpipe.client.optimizers import Optimizer
from fedpipe.errors import FedpipeError, PrivacyError, TrainingError
from fedpipe.privacy.accounting import epsilon_prv

# What the code says where it is the code itself that refuses, in the middle of a check.
REFUSALS = {"audit": "^audit: epsilon is above", "delta_rule": r"^privacy\.delta: found 0\.000333"}
DOCS = Path(__file__).parents[1] / "docs" / "privacy.md"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def plant(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Planting]:
    def planted(name: str, images: bool = False) -> Planting:
        planting = Planting(monkeypatch, lab.images if images else lab.text)
        BUGS[name].plant(planting)
        return planting

    return planted


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_finds_nothing_in_the_code_as_it_is(lab: Lab, check: str) -> None:
    CHECKS[check](lab)


@pytest.mark.parametrize(("bug", "check"), [(bug.name, check) for bug in BUGS.values() for check in bug.checks])
def test_a_planted_bug_is_found_by_its_check(lab: Lab, plant: Callable[..., Planting], bug: str, check: str) -> None:
    planting = plant(bug, check == "window_sensitivity")
    with pytest.raises((ViolationError, PrivacyError)) as found:
        CHECKS[check](lab)
    assert isinstance(found.value, ViolationError) or re.search(REFUSALS[check], str(found.value))
    assert all(planting.calls.values()), f"never called: {planting.calls}"


def test_all_seventeen_are_planted_and_every_check_is_needed() -> None:
    assert sorted(bug.number for bug in BUGS.values()) == list(range(1, len(BUGS) + 1))
    assert {check for bug in BUGS.values() for check in bug.checks} == set(CHECKS)


# What the program itself refuses


def refused(planting: Planting, error: type[FedpipeError], match: str, run: Callable[[], object]) -> None:
    with pytest.raises(error, match=match):
        run()
    assert all(planting.calls.values())


def test_the_first_step_shows_that_an_empty_batch_was_skipped(lab: Lab, plant: Callable[..., Planting]) -> None:
    planting = plant("empty_batches_skipped")
    refused(planting, TrainingError, "stood still", lambda: lab.text.run(sigma=1.0, q=1e-6))


def test_the_first_step_shows_that_a_resting_factor_drifts(lab: Lab, plant: Callable[..., Planting]) -> None:
    planting = plant("only_inactive_factors_noised")
    specs = lab.text.model.specs

    def step(real: Callable[..., None], self: Optimizer, state: dict, gradients: dict, active: object) -> None:
        drift = {spec.name: gradients.get(spec.name, 0.01 + 0 * state[spec.name]) for spec in specs}
        real(self, state, drift, specs)

    planting.around(Optimizer, "step", step)
    match = "moved in a step that does not train it"
    refused(planting, TrainingError, match, lambda: lab.text.run(method=unfiltered("ffa-lora")))


def test_a_round_is_not_closed_while_steps_are_uncounted(lab: Lab, plant: Callable[..., Planting]) -> None:
    planting = plant("half_of_the_alternating_steps_counted")
    trace = lab.text.run(sigma=1.0, q=BATCH / 16, steps=4, lr=0.05)
    run = SimpleNamespace(ledger=trace.ledger, plan=trace.plan, ledger_path=trace.ledger.path)
    refused(planting, PrivacyError, "holds 2 of the 4", lambda: budget.check_round_spent(run, 1, QUERY, CLIENTS))


def test_a_ledger_above_the_target_stops_the_run(lab: Lab, plant: Callable[..., Planting]) -> None:
    """Noise for one round of six, and a ledger that knows all of them."""
    planting = plant("noise_calibrated_for_one_round")
    settings = lab.settings(federation={"rounds": 6, "local_steps": 2, "batch_size": 8}, privacy={"epsilon": 3.0})
    made, ledger = plan.make_plan(settings, dict.fromkeys(CLIENTS, 16)), lab.text.new_ledger()
    run = SimpleNamespace(ledger=ledger, plan=made)
    lab.text.run(plan=made, ledger=ledger, lr=0.01)
    budget.epsilon_so_far(run)
    for round in range(2, 7):
        lab.text.run(plan=made, ledger=ledger, lr=0.01, round=round)
    refused(planting, PrivacyError, "above the target 3", lambda: budget.epsilon_so_far(run))


@pytest.mark.parametrize("delta", [1 / 400, 8 / 400])
def test_a_delta_of_one_over_records_or_batches_is_refused(lab: Lab, delta: float) -> None:
    with pytest.raises(PrivacyError, match=r"privacy\.delta: .* publishes one random record"):
        plan.make_plan(lab.settings(privacy={"delta": delta}), {"c000": 400})


# The table in the documentation


def told(bug: Bug) -> list[str]:
    """Return what the documentation says of a bug, its description left out."""
    claimed = f"{epsilon_prv(bug.claimed, bug.claimed_delta):.2f}"
    checks = ", ".join(f"`{check}`" for check in bug.checks)
    return [str(bug.number), f"`{bug.name}`", claimed, _true(bug), checks]


def _true(bug: Bug) -> str:
    if bug.true is None:
        return "no bound"
    epsilon = epsilon_prv(bug.true, bug.true_delta)
    return f"{epsilon:.2f}" if epsilon < 1000 else "over 1000"


def test_the_documentation_has_each_bug_with_its_epsilon_and_its_checks() -> None:
    lines = DOCS.read_text().split("## Planted bugs\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    found = [[*cells[:2], *cells[3:]] for cells in rows if len(cells) == 6 and cells[0].isdigit()]
    assert found == [told(bug) for bug in sorted(BUGS.values(), key=lambda bug: bug.number)]
