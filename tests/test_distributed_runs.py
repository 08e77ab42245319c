"""Rounds with noise in shares: what is charged and when, what the server gets, and what may run so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_secure_rounds import trained
from test_steps import changed, copied

from fedpipe import steps
from fedpipe.client.lost import Lost
from fedpipe.config import Settings
from fedpipe.errors import PrivacyError, SettingsError
from fedpipe.files import read_json, read_tensors
from fedpipe.listing.budget import Budget, shown
from fedpipe.listing.overview import printed
from fedpipe.methods import compose
from fedpipe.plan import Plan, make_plan
from fedpipe.privacy import distributed
from fedpipe.privacy.accounting import epsilon_prv, epsilon_rdp
from fedpipe.privacy.distributed import MECHANISM, Shares
from fedpipe.privacy.ledger import Ledger, LedgerEntry
from fedpipe.privacy.recompute import verify_ledger
from fedpipe.project import Project
from fedpipe.publish import publish
from fedpipe.steps import summing
from fedpipe.steps.summing import Vanished

pytestmark = pytest.mark.usefixtures("fresh_process")

# A run


@pytest.fixture(scope="module")
def settings(tiny: tuple[Project, Settings]) -> Settings:
    return changed(
        tiny[1],
        federation__secure_aggregation=True,
        federation__rounds=3,
        federation__max_participations=2,
        federation__clients_per_round=2,
        privacy__unit="client",
        privacy__noise="distributed",
        privacy__accountant="rdp",
        privacy__delta=1e-3,
    )


@pytest.fixture
def project(tiny: tuple[Project, Settings], tmp_path: Path) -> Project:
    return copied(tiny[0], tmp_path / "copy")


def test_the_plan(settings: Settings) -> None:
    sizes = {f"c{number}": 50 + number for number in range(6)}
    plan = make_plan(changed(settings, federation__clients_per_round=3), sizes)
    assert plan.central is None
    assert (plan.shares.sampling_rate, plan.shares.max_steps, plan.shares.local_steps) == (1.0, 2, 1)
    assert plan.adjacency == "zero out one client with all its records"
    assert plan.step_clip is None
    assert plan.sigmas == [plan.shares.noise_multiplier]
    assert {own.noise_multiplier for own in plan.clients.values()} == {None}
    spent = epsilon_rdp([(plan.shares.noise_multiplier, 1.0, 2)], plan.delta)
    assert 0.99 * plan.epsilon < spent <= plan.epsilon
    assert plan.accounted([(plan.shares.noise_multiplier, 1.0, 2)], "prv") == spent  # RDP is all there is
    assert plan.charged(1).keys() == set(plan.participants[0])
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_run(project: Project, settings: Settings) -> None:
    run = steps.prepare(project, settings).run
    for number in (1, 2, 3):
        steps.run_round(run.root, number)
    run.finish(publish(run, project))
    entries = run.ledger.entries()
    assert {entry.mechanism for entry in entries} == {MECHANISM}
    assert {entry.q for entry in entries} == {1.0}
    taken = {client: run.ledger.participations(client) for client in run.ledger.clients()}
    assert max(taken.values()) == 2
    assert sum(taken.values()) == len(entries) == 6
    verified = verify_ledger(run.root)
    assert verified.kept
    assert verified.largest[0] == verified.largest[1] == run.round_record(3)["epsilon_max"]
    assert verified.largest[0] > epsilon_prv(verified.clients[0].history, run.plan.delta) + 0.05
    report = read_json(project.reports / "ledger.json")
    assert {own["epsilon_prv"] for own in report["clients"].values() if own["participations"] == 2} == {
        verified.largest[0]
    }
    assert {own["records"] for own in report["clients"].values()} == {None}
    assert report["adjacency"] == "zero out one client with all its records"


def test_a_client_is_charged_before_its_share_is_drawn(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cohorts = trained(project, settings)
    assert run.ledger.entries() == ()  # training alone releases nothing
    known: list[int] = []
    real = Shares.share
    monkeypatch.setattr(
        Shares, "share", lambda *args: (known.append(len(Ledger(run.ledger_path).entries())), real(*args))[1]
    )
    steps.sum_updates(run.root, 1, cohorts)
    assert known == [2, 2]


def test_the_state_is_the_noisy_mean(project: Project, settings: Settings) -> None:
    run, cohorts = trained(
        project, changed(settings, federation__clients_per_round=3, federation__max_participations=None)
    )
    start = run.adapter(0)
    held = {path.parent.name: read_tensors(path) for path in (run.root / "clients").glob("*/outbox-0001.safetensors")}
    entry = steps.sum_updates(run.root, 1, cohorts)
    protocol = steps.aggregate(run.root, 1, [entry])["secure_aggregation"]
    after, std = run.adapter_path(1), run.plan.shares.noise_multiplier * run.plan.clip_norm * math.sqrt(3 / 2) / 3
    residual = []
    for name, value in read_tensors(after).items():
        if name in held["c000"]:
            moves = [update[name].double() - start[name].double() for update in held.values()]
            residual.append((value.double() - start[name].double() - sum(moves) / 3).flatten().numpy())
    noise = np.concatenate(residual)
    # Moves are shorter than C here, so that nothing but noise is left.
    assert all(float(sum((u[n].double() - start[n].double()).square().sum() for n in u)) < 1 for u in held.values())
    assert noise.std() == pytest.approx(std, rel=0.2)
    assert protocol["scale"] * protocol["unit"] / run.plan.clip_norm == pytest.approx(
        run.plan.shares.noise_multiplier / math.sqrt(2), rel=1e-4
    )


def test_a_failed_attempt_costs_once_and_draws_the_same_noise(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    everybody = changed(settings, federation__clients_per_round=3, federation__max_participations=None)
    run, cohorts = trained(project, everybody)
    drawn: list[bytes] = []
    real = Shares.share
    monkeypatch.setattr(Shares, "share", lambda *args: (drawn.append((found := real(*args)).tobytes()), found)[1])
    with pytest.raises(PrivacyError, match="run the same command again"):
        summing.sum_updates(run.root, 1, cohorts, Vanished(upload=frozenset(["c000", "c001"])))
    assert len(run.ledger.entries()) == 3
    summing.sum_updates(run.root, 1, cohorts)
    assert len(run.ledger.entries()) == 3
    assert drawn[:3] == drawn[3:]


def test_a_lost_client_is_not_told_apart(project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[int] = []
    real = Lost.mark
    monkeypatch.setattr(Lost, "mark", lambda self, state: (marked.append(1), real(self, state))[1])
    run, cohorts = trained(project, changed(settings, optimizer__lr=1e30))
    assert marked
    entry = steps.sum_updates(run.root, 1, cohorts)
    found = read_json(run.round_dir(1) / entry["file"])
    assert found["absent"] == {}
    assert len(found["survivors"]) == 2


def test_what_32_bits_do_not_hold_is_refused_before_anything_runs(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "MOST_BITS", 3)
    with pytest.raises(PrivacyError, match="too coarse in 32 bits"):
        steps.prepare(project, settings)
    assert not list(project.runs.glob("*/run.json"))


# What may run so


REFUSED = [
    ({"federation__secure_aggregation": False}, "set federation.secure_aggregation to true"),
    ({"privacy__accountant": "prv"}, "privacy.accountant: found prv; .*use rdp"),
    ({"privacy__adjacency": "replace-one"}, "privacy.adjacency: .*use add-remove"),
    ({"privacy__unit": "record"}, "privacy.noise: distributed is for privacy.unit client"),
    ({"method": {"name": "la-lora", "aggregation": "norm-bound"}}, "method.aggregation"),
    ({"method": {"name": "median"}}, "method.aggregation"),
    ({"privacy__diagnostics": True}, "privacy.diagnostics"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(settings: Settings, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        compose(changed(settings, **changes))


def test_central_noise_is_refused_with_secure_aggregation_and_this_is_the_cure(settings: Settings) -> None:
    central = changed(settings, privacy__noise="central", federation__max_participations=None)
    with pytest.raises(SettingsError, match=r"or privacy.noise to distributed"):
        compose(central)
    compose(settings)


def test_a_ledger_knows_what_it_may_account() -> None:
    with pytest.raises(PrivacyError, match="no amplification by sampling"):
        LedgerEntry("c0", 1, 1, 1.0, 0.5, "query", mechanism=MECHANISM)
    with pytest.raises(PrivacyError, match="is not known, nor what it spends"):
        LedgerEntry("c0", 1, 1, 1.0, 0.5, "query", mechanism="laplace")


def test_the_budget_is_that_of_the_plan(settings: Settings) -> None:
    sizes = dict.fromkeys(("c0", "c1", "c2", "c3", "c4"), 60)
    plan = make_plan(settings, sizes)
    budget = Budget(settings, tuple(sizes.values()), settings.privacy.epsilon)
    cost = budget.cost(5)
    assert (cost.sigma, cost.q, cost.steps) == (plan.shares.noise_multiplier, 1.0, 2)
    assert cost.prv == cost.rdp
    assert "zero out one client" in printed(lambda width: shown(budget))
