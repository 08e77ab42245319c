"""Malicious clients: who they are, what they send, and which rules do not care."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_rounds import flat, make_round
from safetensors.torch import load
from test_faults import changed, sent, trained
from tiny import make_project

from fedpipe import steps
from fedpipe.config import AttackSettings, Settings
from fedpipe.errors import SettingsError
from fedpipe.methods import AXES, CATALOGUE
from fedpipe.models.factors import GlobalState
from fedpipe.models.task import Encoded
from fedpipe.project import Project
from fedpipe.publish import publish
from fedpipe.server.attacks import attacked, malicious, with_wrong_labels
from fedpipe.server.round import Updates, server_round

pytestmark = pytest.mark.usefixtures("fresh_process")

NAMES = [f"c{number:03d}" for number in range(10)]
ROUND, HONEST = make_round(clients=7, dtype=torch.float32)


class TestWho:
    def test_it_is_drawn_from_the_seed(self) -> None:
        few = AttackSettings(kind="scaling", clients=3)
        assert malicious(few, 1, NAMES) == malicious(few, 1, NAMES[::-1])
        assert len(set(malicious(few, 1, NAMES))) == 3
        assert len({malicious(few, seed, NAMES) for seed in range(20)}) > 5

    @pytest.mark.parametrize(("asked", "count"), [(0.2, 2), (0.01, 1), (0.25, 2), (10, 10), (1, 1)])
    def test_a_number_or_a_share(self, asked: float, count: int) -> None:
        assert len(malicious(AttackSettings(kind="scaling", clients=asked), 1, NAMES)) == count

    def test_nobody_without_an_attack_and_not_more_than_there_are(self) -> None:
        assert malicious(AttackSettings(clients=3), 1, NAMES) == ()
        with pytest.raises(SettingsError, match=r"federation\.attack\.clients: found 11; .* 10 clients"):
            malicious(AttackSettings(kind="scaling", clients=11), 1, NAMES)


class TestWhat:
    update = HONEST["client-000"]

    def move(self, kind: str, **options: Any) -> torch.Tensor:
        found = attacked(AttackSettings(kind=kind, **options), self.update, ROUND.start, 1, 2, "client-000")
        assert all(found[name].dtype == tensor.dtype for name, tensor in self.update.items())
        return flat(found) - flat({name: ROUND.start[name] for name in found})

    def test_moves(self) -> None:
        own = flat(self.update) - flat({name: ROUND.start[name] for name in self.update})
        torch.testing.assert_close(self.move("sign-flip", strength=1.0), -own, rtol=0, atol=1e-6)
        torch.testing.assert_close(self.move("scaling", strength=10.0), 10 * own, rtol=0, atol=1e-5)
        torch.testing.assert_close(self.move("label-flip"), own, rtol=0, atol=0)
        assert not self.move("free-rider").any()

    def test_the_noise_of_a_free_rider(self) -> None:
        first, again = (self.move("free-rider", noise=0.1) for _ in range(2))
        assert (first == again).all()
        assert 0.05 < first.std() < 0.15

    def test_labels(self) -> None:
        records = Encoded(np.arange(6), np.arange(7), np.array([0, 1, 2, 0, 1, 2]), 0)
        found = with_wrong_labels(records, 3)
        assert found.labels.tolist() == [1, 2, 0, 1, 2, 0]
        assert (found.tokens is records.tokens, records.labels[0]) == (True, 0)


ROBUST: dict[str, dict[str, Any]] = {
    "median": {},
    "trimmed-mean": {},
    "krum": {"attackers": 1},
    "multi-krum": {"attackers": 1},
    "bulyan": {"attackers": 1},
    "geometric-median": {},
    "norm-bound": {},
}


def error_of(rule: str, kind: str, **options: Any) -> float:
    """How far from the mean of the honest clients a rule ends, in lengths of their move, with one liar among them."""
    liar = "client-003"
    updates = dict(HONEST)
    updates[liar] = attacked(AttackSettings(kind=kind, strength=1000.0), HONEST[liar], ROUND.start, 1, 1, liar)
    method = replace(CATALOGUE["dp-lora"], aggregation=AXES["aggregation"][rule](**options))
    read = {name: (lambda own=own: dict(own)) for name, own in updates.items()}
    result = server_round(method, ROUND, GlobalState(ROUND.start), {}, Updates(read), 7, lambda name: torch.zeros(6, 5))
    honest = sum(flat(own) for name, own in HONEST.items() if name != liar) / 6
    start = flat({name: ROUND.start[name] for name in HONEST[liar]})
    found = flat({name: result.state.adapter[name] for name in HONEST[liar]})
    return float((found - honest).norm() / (honest - start).norm())


@pytest.mark.parametrize("kind", ["scaling", "sign-flip"])
def test_a_mean_is_carried_away_and_robust_rules_are_not(kind: str) -> None:
    assert error_of("mean", kind) > 100
    for rule, options in ROBUST.items():
        assert error_of(rule, kind, **options) < 1, rule


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Settings]:
    return make_project(
        tmp_path_factory.mktemp("attacks") / "project",
        partition={"clients": 4},
        federation={"rounds": 1},
        method={"name": "dp-lora"},
        privacy={"accountant": "rdp"},
    )


@pytest.mark.parametrize("kind", ["sign-flip", "label-flip"])
def test_in_a_run_it_is_the_malicious_only_and_the_record_says_so(
    base: tuple[Project, Settings], tmp_path: Path, kind: str
) -> None:
    for name in ("data", "models", "records.csv", "params.yaml"):
        (tmp_path / name).symlink_to(base[0].root / name)
    project, attack = Project(tmp_path), {"kind": kind, "clients": 1, "strength": 2.0}
    run = steps.prepare(project, changed(base[1], federation={"attack": attack})).run
    (liar,) = malicious(run.settings.federation.attack, run.settings.seed, list(run.plan.clients))
    found, start = sent_after(run), run.adapter(0)
    # The same run with the attack switched off where it acts; a run without it would be another query.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedpipe.steps.sending.malicious", lambda *args: ())
        honest = sent_after(run)
    assert {name for name in found if found[name] != honest[name]} == {liar}
    if kind == "sign-flip":
        moved, own = load(found[liar]), load(honest[liar])
        for name, tensor in moved.items():
            expected = start[name] - 2 * (own[name] - start[name])
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)
    record = steps.run_round(run.root, 1)
    assert record["refused"] == {}  # nobody at the server knows
    metrics = publish(run, project)
    assert (metrics["attack"], metrics["attackers"]) == (kind, 1)


def sent_after(run: Any) -> dict[str, bytes]:
    """Train round 1 anew, and return what was sent."""
    for path in run.round_dir(1).glob("cohort-*.json"):
        path.unlink()
    trained(run)
    return sent(run)
