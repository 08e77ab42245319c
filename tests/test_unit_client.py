"""Unit `client`: the noisy sum of clipped moves, its plan, its coins, and what may not be combined with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from made_rounds import make_specs
from tiny import make_project, tiny_values
from torch import Tensor

from fedpipe.cli import main
from fedpipe.client.lost import Lost
from fedpipe.config import Settings, parse_settings
from fedpipe.errors import PrivacyError, SettingsError, StateError
from fedpipe.methods import CATALOGUE, compose
from fedpipe.methods.whole import not_for_clients
from fedpipe.models.lora import TensorSpec
from fedpipe.plan import Plan, make_plan
from fedpipe.privacy.accounting import epsilon_prv, epsilon_rdp
from fedpipe.privacy.ledger import EVERY
from fedpipe.privacy.noise import KeyedStream, client_key
from fedpipe.server.central import Release, clipped_sum, taking_part

KEY, C = bytes(range(32)), 0.7
State = dict[str, Tensor]


def release(**changes: Any) -> Release:
    given = {"clip_norm": C, "noise_multiplier": 1.3, "expected": 4.0, "round": 2, "query": "q", "key": KEY}
    return Release(**(given | changes))


def drawn(specs: list[TensorSpec], generator: np.random.Generator, size: float = 1.0) -> State:
    return {s.name: torch.from_numpy(size * generator.normal(size=s.shape)).float() for s in specs}


def updates_of(specs: list[TensorSpec], start: State, clients: int, seed: int, bad: str = "") -> dict[str, State]:
    """Clients that moved by anything from nothing to a million, some of them no number at all."""
    generator = np.random.default_rng(seed)
    made = {}
    for client in range(clients):
        move = drawn(specs, generator, 10.0 ** generator.uniform(-3, 6))
        made[f"c{client}"] = {name: start[name] + move[name] for name in start}
    for place, kind in enumerate(bad):
        tensor = made[f"c{place % clients}"][specs[place % len(specs)].name]
        tensor.view(-1)[0] = {"n": torch.nan, "i": torch.inf, "h": 1e38}[kind]
    return made


def readers(updates: Mapping[str, State]) -> dict[str, Any]:
    return {name: lambda own=own: own for name, own in updates.items()}


def flat(tensors: Mapping[str, Tensor]) -> np.ndarray:
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])


def naive_sum(start: State, updates: Mapping[str, State]) -> np.ndarray:
    """The sum of what each client moved, all tensors as one vector, at most C long; nothing for what is no number."""
    total = np.zeros(len(flat(start)))
    for own in updates.values():
        move = flat(own) - flat(start)
        length = np.sqrt((move**2).sum()) if np.isfinite(move).all() else np.inf
        if length <= 1e6:  # farther than a server takes
            total += move if length <= C else move / length * C
    return total


shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3)


class TestSum:
    @hypothesis_settings(max_examples=60, deadline=None)
    @given(shapes, st.integers(1, 6), st.integers(0, 2**31), st.text("nih", max_size=3))
    def test_one_client_moves_it_by_the_clip_norm_at_most(
        self, layers: list[tuple[int, int]], clients: int, seed: int, bad: str
    ) -> None:
        specs = make_specs(layers)
        start = drawn(specs, np.random.default_rng(seed + 1))
        updates = updates_of(specs, start, clients, seed, bad)
        whole = flat(clipped_sum(start, specs, readers(updates), C))
        assert whole == pytest.approx(naive_sum(start, updates), abs=1e-9)
        for gone in updates:
            rest = {name: own for name, own in updates.items() if name != gone}
            moved = whole - flat(clipped_sum(start, specs, readers(rest), C))
            assert np.linalg.norm(moved) <= C * (1 + 1e-9)

    def test_the_norm_is_one_over_all_tensors(self) -> None:
        """Clipped one by one, g tensors would move it by sqrt(g) C."""
        specs = make_specs()
        start = drawn(specs, np.random.default_rng(0))
        far = {"c0": {name: tensor + 100 for name, tensor in start.items()}}
        assert np.linalg.norm(flat(clipped_sum(start, specs, readers(far), C))) == pytest.approx(C)

    def test_the_order_of_an_updates_tensors_changes_no_bit(self) -> None:
        specs = make_specs([(6, 5), (4, 7), (3, 3)])
        start = drawn(specs, np.random.default_rng(0))
        for seed in range(30):
            updates = updates_of(specs, start, 1, seed)
            turned = {name: dict(reversed(own.items())) for name, own in updates.items()}
            one, other = (flat(clipped_sum(start, specs, readers(u), C)) for u in (updates, turned))
            assert (one == other).all()

    def test_others_count_the_same_whoever_is_there(self) -> None:
        specs = make_specs()
        start = drawn(specs, np.random.default_rng(0))
        updates = updates_of(specs, start, 5, 1)
        spoilt = updates | {"c2": {name: torch.full_like(t, torch.nan) for name, t in updates["c2"].items()}}
        without = {name: own for name, own in updates.items() if name != "c2"}
        one, other = (flat(clipped_sum(start, specs, readers(u), C)) for u in (spoilt, without))
        assert (one == other).all()

    def test_an_update_that_cannot_be_read_does_not_tell_whose_it_is(self) -> None:
        def gone() -> State:
            raise StateError("updates/c017.safetensors: damaged")

        with pytest.raises(StateError) as caught:
            clipped_sum({}, [], {"c017": gone}, C)
        assert "c017" not in str(caught.value)
        assert caught.value.__cause__ is None


class TestRelease:
    def test_it_is_the_formula(self) -> None:
        specs = make_specs()
        start = drawn(specs, np.random.default_rng(0))
        updates = updates_of(specs, start, 5, 1)
        made = release().of(start, specs, readers(updates))
        noise = {
            s.name: torch.from_numpy(
                KeyedStream(client_key(KEY, EVERY), "noise", "q", 2, EVERY, 1, s.name).gaussian(s.shape)
            )
            for s in specs
        }
        moved = (naive_sum(start, updates) + 1.3 * C * flat(noise)) / 4.0
        assert flat(made.adapter) == pytest.approx(flat(start) + moved, rel=1e-6, abs=1e-6)
        assert made.norm == pytest.approx(np.linalg.norm(moved))
        assert {t.dtype for t in made.adapter.values()} == {torch.float32}

    def test_noise_has_the_planned_deviation_in_every_tensor(self) -> None:
        specs = make_specs([(40, 30)], rank=8, head=20)
        start = {s.name: torch.zeros(s.shape, dtype=torch.float64) for s in specs}
        draws = [release(query=str(query)).of(start, specs, {}).adapter for query in range(40)]
        for spec in specs:
            values = np.stack([draw[spec.name].numpy().ravel() for draw in draws])
            deviation = 1.3 * C / 4.0
            assert values.std() == pytest.approx(deviation, rel=5 / np.sqrt(2 * values.size))
            assert abs(values.mean()) < 5 * deviation / np.sqrt(values.size)
            together = np.corrcoef(values)[~np.eye(len(draws), dtype=bool)]
            assert abs(together.mean()) < 5 / np.sqrt(values.shape[1] * len(together) / 2)

    def test_the_denominator_is_the_expected_number(self) -> None:
        """However many took part: what was drawn is a secret, and dividing by it would double the sensitivity."""
        specs = make_specs()
        start = {s.name: torch.zeros(s.shape, dtype=torch.float64) for s in specs}
        one = updates_of(specs, start, 1, 3)
        nobody = flat(release().of(start, specs, {}).adapter)
        for copies in (1, 2, 7):
            many = {f"c{place}": one["c0"] for place in range(copies)}
            moved = flat(release().of(start, specs, readers(many)).adapter) - nobody
            assert moved == pytest.approx(copies * naive_sum(start, one) / 4.0)

    def test_an_empty_round_is_noise_alone(self) -> None:
        specs = make_specs()
        start = drawn(specs, np.random.default_rng(0))
        made = release().of(start, specs, {})
        assert all((made.adapter[s.name] != start[s.name]).all() for s in specs)

    @pytest.mark.parametrize("change", [{"query": "other"}, {"round": 3}, {"key": bytes(32)}])
    def test_another_query_round_or_key_has_other_noise(self, change: dict[str, Any]) -> None:
        specs = make_specs()
        start = drawn(specs, np.random.default_rng(0))
        made = [flat(release(**changes).of(start, specs, {}).adapter) for changes in ({}, {}, change)]
        assert (made[0] == made[1]).all()
        assert abs(np.corrcoef(made[0] - flat(start), made[2] - flat(start))[0, 1]) < 0.6


class TestCoins:
    NAMES = tuple(f"c{number:03d}" for number in range(50))

    def test_everyone_takes_part_as_often_as_planned_and_by_itself(self) -> None:
        rate, rounds = 0.3, 800
        chosen = np.zeros((rounds, 50))
        for number in range(rounds):
            members = taking_part(KEY, f"q{number}", number, self.NAMES, rate)
            assert list(members) == sorted(members)
            chosen[number, [self.NAMES.index(name) for name in members]] = 1
        spread = np.sqrt(rate * (1 - rate))
        assert abs(chosen.mean(0) - rate).max() < 5 * spread / np.sqrt(rounds)
        # A fixed number a round would have no variance; coins of their own have that of a binomial.
        assert chosen.sum(1).var() == pytest.approx(50 * spread**2, rel=0.25)
        pairs = np.corrcoef(chosen.T)[~np.eye(50, dtype=bool)]
        assert abs(pairs).max() < 6 / np.sqrt(rounds)

    def test_they_are_the_keys_and_the_queries(self) -> None:
        first = taking_part(KEY, "q", 1, self.NAMES, 0.5)
        assert first == taking_part(KEY, "q", 1, self.NAMES, 0.5)
        others = [(bytes(32), "q", 1), (KEY, "r", 1), (KEY, "q", 2)]
        assert all(taking_part(*other, self.NAMES, 0.5) != first for other in others)

    def test_all_or_nobody(self) -> None:
        assert taking_part(KEY, "q", 1, self.NAMES, 1.0) == self.NAMES
        assert taking_part(KEY, "q", 1, self.NAMES, 1e-12) == ()


def settings_of(clients: int = 20, **sections: dict[str, Any]) -> Settings:
    values = tiny_values(Path("x"), **sections)
    values["partition"] = {"scheme": "iid", "clients": clients, "min_records": 20}
    values["privacy"] = {"unit": "client", "accountant": "rdp", **sections.get("privacy", {})}
    return parse_settings(values)


class TestPlan:
    @pytest.mark.parametrize(
        ("clients", "expected", "rounds", "sigma", "rdp", "prv"),
        [
            (1000, 50, 100, 1.0, 4.04, 3.51),
            (100, 10, 100, 1.0, 7.90, 7.06),
            (100, 10, 100, 2.0, 2.58, 2.35),
            (20, 4, 100, 1.0, 15.97, 14.54),
            (20, 20, 50, 4.0, 9.24, 8.61),
        ],
    )
    def test_golden(self, clients: int, expected: int, rounds: int, sigma: float, rdp: float, prv: float) -> None:
        """The noise that these epsilons ask for is the one that they were computed from."""
        per_round = None if expected == clients else expected
        settings = settings_of(
            clients,
            federation={"rounds": rounds, "clients_per_round": per_round},
            privacy={"epsilon": rdp + 0.01, "delta": 1e-5},
        )
        plan = make_plan(settings, {f"c{number:04d}": 30 for number in range(clients)})
        assert plan.central.noise_multiplier == pytest.approx(sigma, rel=4e-3)
        history = [(sigma, plan.central.sampling_rate, plan.central.max_steps)]
        assert epsilon_rdp(history, 1e-5) == pytest.approx(rdp, abs=6e-3)
        assert epsilon_prv(history, 1e-5) == pytest.approx(prv, abs=6e-3)

    def test_it_is_of_clients_and_not_of_records(self) -> None:
        sizes = {f"c{number:03d}": 30 + 100 * number for number in range(20)}
        plan = make_plan(settings_of(federation={"rounds": 5, "clients_per_round": 4}), sizes)
        assert plan.delta == min(1e-5, 1 / 200)
        assert plan.adjacency == "add/remove one client with all its records"
        assert (plan.central.records, plan.central.sampling_rate, plan.central.expected_batch) == (20, 0.2, 4.0)
        assert plan.accounted(plan.central.history_at_cap) <= plan.epsilon
        assert (plan.step_clip, plan.clip_norm) == (None, 1.0)
        assert plan.sigmas == [plan.central.noise_multiplier]
        assert all(own.noise_multiplier is None for own in plan.clients.values())
        alike = make_plan(settings_of(federation={"rounds": 5, "clients_per_round": 4}), dict.fromkeys(sizes, 30))
        assert alike.central == plan.central
        assert Plan.from_json(plan.to_json()) == plan

    def test_replacing_a_client_needs_more_noise(self) -> None:
        sizes = dict.fromkeys((f"c{number:03d}" for number in range(20)), 30)
        federation = {"rounds": 5, "clients_per_round": 4}
        removed = make_plan(settings_of(federation=federation), sizes)
        replaced = make_plan(settings_of(federation=federation, privacy={"adjacency": "replace-one"}), sizes)
        assert replaced.adjacency == "replace one client with all its records"
        assert replaced.central.noise_multiplier > removed.central.noise_multiplier
        assert (
            replaced.accounted(replaced.central.history_at_cap)
            <= 8
            < replaced.accounted(removed.central.history_at_cap)
        )

    def test_nothing_in_it_tells_who_will_take_part(self) -> None:
        settings = settings_of(federation={"rounds": 5, "clients_per_round": 4})
        sizes = dict.fromkeys((f"c{number:03d}" for number in range(20)), 30)
        plan = make_plan(settings, sizes)
        assert plan.jobs == ()
        assert plan.participants == (tuple(sizes),) * 5
        assert [job.client for job in plan.jobs_of(3)] == list(sizes)
        assert {job.start for job in plan.jobs_of(3)} == {2}
        assert len(set(plan.seconds)) == 1

    def test_delta_is_below_one_over_the_clients(self) -> None:
        sizes = dict.fromkeys((f"c{number:03d}" for number in range(20)), 30)
        with pytest.raises(PrivacyError, match=r"with 20 clients expected less than 0\.05"):
            make_plan(settings_of(privacy={"delta": 0.05}), sizes)

    def test_an_epsilon_out_of_reach_names_a_cure_for_clients(self) -> None:
        sizes = dict.fromkeys((f"c{number:03d}" for number in range(20)), 30)
        with pytest.raises(PrivacyError, match=r"lower federation\.clients_per_round or federation\.rounds$"):
            make_plan(settings_of(privacy={"epsilon": 1e-6}), sizes)


class TestRules:
    @pytest.mark.parametrize(
        ("section", "what"),
        [
            ({"method": {"name": "krum"}}, "method.aggregation: aggregation krum needs every client's update"),
            ({"method": {"name": "norm-bound"}}, "aggregation norm-bound is another rule than the mean"),
            ({"method": {"name": "fedsa-lora"}}, "payload a-only keeps something at clients"),
            ({"method": {"name": "moon"}}, "objective moon keeps something at clients"),
            ({"method": {"name": "scaffold"}}, "objective scaffold sends more than an update"),
            ({"method": {"name": "as-lora"}}, "schedule adaptive needs every client's scores"),
            ({"method": {"name": "dp-lora", "ranks": "self-pruning"}}, "ranks self-pruning follows what every client"),
            ({"method": {"name": "dp-lora", "ranks": "fixed"}}, "ranks fixed cut the adapter"),
            ({"method": {"name": "dp-lora", "weights": "truncation-error"}}, "count clients differently"),
            (
                {"method": {"name": "fedbuff"}},
                "rounds buffered treat clients differently; use synchronous|rounds buffer",
            ),
            ({"method": {"name": "dp-lora", "clip": "per-layer"}}, "clip per-layer groups"),
            ({"method": {"name": "interpolate-own"}}, "initialisation interpolate-own keeps something"),
            ({"federation": {"max_participations": 2}}, "federation.max_participations: .*leave it null"),
            ({"federation": {"dropout": 0.1}}, "federation.dropout: .*set it to 0"),
            ({"federation": {"secure_aggregation": True}}, "federation.secure_aggregation: .*set it to false"),
            ({"privacy": {"diagnostics": True}}, "privacy.diagnostics: .*set it to false"),
        ],
    )
    def test_refused_before_anything_runs(self, section: dict[str, Any], what: str) -> None:
        settings = settings_of(**section)
        with pytest.raises(SettingsError, match=what):
            compose(settings)

    def test_distributed_noise_is_for_clients_only(self) -> None:
        with pytest.raises(SettingsError, match=r"privacy.noise: distributed is for privacy.unit client"):
            compose(settings_of(privacy={"unit": "record", "noise": "distributed"}))

    @pytest.mark.parametrize("name", CATALOGUE)
    def test_the_listing_says_what_the_rules_do(self, name: str) -> None:
        settings = settings_of(method={"name": name}, federation={"rounds": 9})
        if not_for_clients(CATALOGUE[name]) is None:
            compose(settings)
        else:
            with pytest.raises(SettingsError):
                compose(settings)

    def test_enough_is_left(self) -> None:
        left = {name for name, method in CATALOGUE.items() if not_for_clients(method) is None}
        assert left >= {"dp-lora", "ffa-lora", "rolora", "la-lora", "fedprox", "fedavgm", "fedadam", "fed-sb", "fedsvd"}
        assert not left & {"fedit", "moon", "krum", "hetlora", "fedbuff", "scaffold", "camu"}


class TestLost:
    def test_a_client_that_diverges_goes_back_and_others_stay(self) -> None:
        start = {"A": torch.zeros(4, 2, 3), "b": torch.ones(4, 2)}
        state = {"A": torch.arange(24.0).view(4, 2, 3), "b": torch.zeros(4, 2)}
        kept = {name: tensor.clone() for name, tensor in state.items()}
        state["A"][1, 0, 0], state["b"][3, 1] = torch.nan, 2e6
        lost = Lost(start)
        lost.after_step(state)
        for name in start:
            assert (state[name][[1, 3]] == start[name][[1, 3]]).all()
            assert (state[name][[0, 2]] == kept[name][[0, 2]]).all()
        state["A"][1] += 1.0  # it may well train on, and is lost all the same
        lost.after_step(state)
        lost.mark(state)
        assert all(
            state[name][[1, 3]].isnan().all() and (state[name][[0, 2]] == kept[name][[0, 2]]).all() for name in start
        )


def test_the_budget_command_counts_clients(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("budget") / "project"
    make_project(root, partition={"clients": 10}, privacy={"unit": "client", "delta": 1e-3, "accountant": "rdp"})
    given = ["budget", "--params", str(root / "params.yaml"), "--set", "federation.clients_per_round=2"]
    done = CliRunner().invoke(main, [*given, "--sigma", "1"])
    assert done.exit_code == 0, done.output
    assert "unit client, add/remove one client with all its records; delta 1e-3" in done.output
    assert "3 rounds of 1 noisy step, 2 clients on average" in done.output
    row = next(line.split() for line in done.output.splitlines() if line.split()[:1] == ["all"])
    assert row[1:4] == ["10", "0.2", "1"]
    assert float(row[-1]) == pytest.approx(epsilon_rdp([(1.0, 0.2, 3)], 1e-3), abs=0.01)
    refused = CliRunner().invoke(main, [*given, "--records", "50"])
    assert refused.exit_code == 2
    assert "nothing depends on records" in refused.output
