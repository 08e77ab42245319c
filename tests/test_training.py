"""The private step: what is noised, by how much, in which order, and that nothing else moves."""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpipe.client import training
from fedpipe.client.engine import CohortEngine
from fedpipe.client.filters import NoFilter
from fedpipe.client.optimizers import Optimizer
from fedpipe.client.reference import OpacusEngine
from fedpipe.client.starts import client_start
from fedpipe.client.training import CohortWork, Update, check_first_step, train_cohort
from fedpipe.config import OptimizerSettings, Settings, parse_settings
from fedpipe.errors import PrivacyError, StorageError, TrainingError
from fedpipe.methods import AXES, CATALOGUE, Method
from fedpipe.models.batched import KeyedDropout
from fedpipe.models.factors import GlobalState
from fedpipe.models.lora import AdaptedModel, TensorSpec
from fedpipe.plan import ClientPlan, Plan
from fedpipe.privacy.ledger import Ledger
from fedpipe.privacy.noise import add_step_noise, client_key, poisson_sample, step_noise
from fedpipe.project import Project
from fedpipe.server.aggregate import RunningMean
from fedpipe.server.initialisation import Start
from fedpipe.server.scheduling import Job
from fedpipe.server.weights import Uniform
from fedpipe.workspace import Workspace

CPU = torch.device("cpu")
CLIENTS = ("c000", "c001", "c002")
KEY, QUERY = bytes(range(32)), "a query"
PRIVATE = [method for method in CATALOGUE.values() if method.private]
# One method for each way to train at a client; the others differ at the server.
WAYS = list({(m.schedule, m.objective, m.clip, m.filter, m.payload): m for m in reversed(PRIVATE)}.values())


class Spy:
    """An engine that keeps every state it is given and answers with another engine's sums, or with zeros."""

    device = CPU

    def __init__(self, engine: Any = None, fill: float = 0.0) -> None:
        self.engine = engine
        self.fill = fill
        self.states: list[dict[str, Tensor]] = []
        self.batches: list[list[np.ndarray]] = []
        self.active: list[list[TensorSpec]] = []

    def clipped_sums(self, state, records, batches, active, clip_norm, seeds, *others):
        self.states.append({name: tensor.clone() for name, tensor in state.items()})
        self.batches.append(list(batches))
        self.active.append(list(active))
        if self.engine is not None:
            return self.engine.clipped_sums(state, records, batches, active, clip_norm, seeds, *others)
        return {spec.name: torch.full_like(state[spec.name], self.fill) for spec in active}


@dataclass
class Trial:
    """One cohort, ready to train; what a test changes is an argument of `run`."""

    workspace: Workspace
    directory: Path

    def plan(self, sigma: float | Sequence[float] = 1.5, clip: float = 0.8, steps: int = 4, q: float | None = None):
        sigmas = [sigma] * 3 if isinstance(sigma, float) else sigma
        clients = {}
        for client, own, batch in zip(CLIENTS, sigmas, (24, 30, 40), strict=True):
            records = len(self.workspace.records(client))
            rate = batch / records if q is None else q
            clients[client] = ClientPlan(records, rate, float(batch), own, 10 * steps, steps)
        jobs = tuple(tuple(Job(client, number) for client in CLIENTS) for number in range(2))
        return Plan("record", "add/remove", 8.0, 1e-5, "rdp", clip, 2, steps, clients, jobs, (1.0, 1.0))

    def open_plan(self, **options: Any) -> Plan:
        """The same plan without privacy."""
        plan = self.plan(**options)
        clients = {name: replace(client, noise_multiplier=None) for name, client in plan.clients.items()}
        return replace(plan, unit="none", epsilon=None, delta=None, clip_norm=None, adjacency=None, clients=clients)

    def work(self, clients: Sequence[str] = CLIENTS, **changes: Any) -> CohortWork:
        values = {
            "round": 1,
            "clients": tuple(clients),
            "records": [self.workspace.records(client) for client in clients],
            "trained": self.workspace.trained,
            "query": QUERY,
            "key": KEY,
        }
        received, method = changes.pop("start", self.workspace.model.initial), changes.pop("method", CATALOGUE["fedit"])
        facts = Start(
            round=changes.get("round", 1),
            rounds=2,
            state=GlobalState(dict(received)),
            kept={},
            kept_round=0,
            scale=self.workspace.model.scale,
            rank=2,
            specs=self.workspace.model.specs,
        )
        start = client_start(method, self.workspace.model.specs, self.workspace.trained, facts)
        return CohortWork(**{**values, "starts": [start] * len(clients), **changes})

    def cohort_engine(self, tokens: int = 512) -> CohortEngine:
        return CohortEngine(self.workspace.model.to_batched(), CPU, "fp32", tokens)

    def ledger(self, name: str = "ledger") -> Ledger:
        return Ledger(self.directory / f"{name}.jsonl", "a run")

    def run(
        self,
        method: Method,
        plan: Plan,
        engine: Any = None,
        optimizer: Mapping[str, Any] | None = None,
        ledger: Ledger | None = None,
        **changes: Any,
    ) -> dict[str, Update]:
        inner = engine.engine if isinstance(engine, Spy) and engine.engine is not None else engine
        model = inner.model if inner is not None and not isinstance(inner, Spy) else self.workspace.model
        if plan.private and ledger is None:
            ledger = self.ledger()
        settings = OptimizerSettings(**{"lr": 1.0, **(optimizer or {})})
        return train_cohort(engine, model, self.work(method=method, **changes), plan, method, settings, ledger)


@pytest.fixture
def trial(workspace: Workspace, tmp_path: Path) -> Trial:
    return Trial(workspace, tmp_path)


@pytest.fixture(scope="module")
def dropping(tiny: tuple[Project, Settings]) -> Workspace:
    """The tiny workspace with dropout in front of the adapters."""
    project, settings = tiny
    values = settings.model_dump(mode="json")
    values["lora"]["dropout"] = 0.3
    return Workspace(project, parse_settings(values))


def unfiltered(method: Method) -> Method:
    return replace(method, filter=NoFilter())


def random_start(workspace: Workspace, seed: int = 0) -> dict[str, Tensor]:
    """An adapter without zeros, so that A and B both have a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return {s.name: 0.3 * torch.randn(s.shape, generator=generator) for s in workspace.model.specs}


def moves(spy: Spy, last: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What each step changed, name -> (clients, *shape)."""
    states = [*spy.states, last]
    return [{name: after[name] - before[name] for name in before} for before, after in itertools.pairwise(states)]


def one_more(plan: Plan) -> Plan:
    """A plan of one more step: its extra engine call shows the state after the last one."""
    more = {name: replace(client, local_steps=client.local_steps + 1) for name, client in plan.clients.items()}
    return replace(plan, local_steps=plan.local_steps + 1, clients=more)


# Noise


@pytest.mark.parametrize("method", PRIVATE, ids=lambda method: method.name)
def test_on_zero_gradients_a_step_is_noise_of_std_sigma_c_over_b(trial: Trial, method: Method) -> None:
    sigmas, clip, steps, lr = (0.7, 1.5, 4.0), 0.8, 24, 0.25
    plan, spy = trial.plan(sigmas, clip, steps), Spy()
    trial.run(unfiltered(method), one_more(plan), spy, {"lr": lr})
    stds = torch.tensor([s * clip / b for s, b in zip(sigmas, (24, 30, 40), strict=True)])
    draws: list[Tensor] = []
    for step, change in enumerate(moves(spy, spy.states[-1])[:steps], 1):
        active = {spec.name for spec in trial.workspace.model.specs if method.is_active(1, step, spec)}
        assert active
        for name, tensor in change.items():
            if name in active:
                draws.append((tensor / lr).flatten(1) / stds[:, None])
            else:
                assert not tensor.any(), f"{name} moved in step {step}"
    for client in range(3):
        values = torch.cat([draw[client] for draw in draws])
        assert float(values.std()) == pytest.approx(1, rel=0.03)
        assert abs(float(values.mean())) < 4 / len(values) ** 0.5


def test_the_noise_is_uncorrelated_across_coordinates_clients_steps_and_rounds(trial: Trial) -> None:
    method, plan = unfiltered(CATALOGUE["dp-lora"]), trial.plan(1.0, 1.0, 12)
    rows = []
    for number in (1, 2):
        spy = Spy()
        trial.run(method, one_more(plan), spy, round=number, ledger=trial.ledger(f"ledger{number}"))
        for change in moves(spy, spy.states[-1])[:12]:
            rows += [torch.cat([change[name][client].flatten() for name in sorted(change)]) for client in range(3)]
    values = torch.stack(rows)  # (rounds * steps * clients, coordinates)
    bound = 5.5  # standard deviations; the largest of a few thousand correlations is about 4
    between_draws = np.corrcoef(values.numpy())
    between_places = np.corrcoef(values.numpy().T)
    for matrix, samples in ((between_draws, values.shape[1]), (between_places, values.shape[0])):
        apart = np.abs(matrix[~np.eye(len(matrix), dtype=bool)])
        assert apart.max() < min(bound / samples**0.5, 0.75)
        assert apart.mean() == pytest.approx((2 / np.pi / samples) ** 0.5, rel=0.1)


def test_the_noise_is_that_of_the_key_and_the_context(trial: Trial) -> None:
    plan, spy = trial.plan(), Spy()
    trial.run(unfiltered(CATALOGUE["dp-lora"]), plan, spy, round=2, query="another")
    for row, client in enumerate(CLIENTS):
        std = 1.5 * 0.8
        for name, tensor in spy.states[1].items():
            noise = step_noise(client_key(KEY, client), "another", 2, client, 1, name, tensor.shape[1:], std)
            expected = spy.states[0][name][row] - noise / plan.clients[client].expected_batch
            torch.testing.assert_close(tensor[row], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("change", [{"key": bytes(32)}, {"query": "another query"}, {"round": 3}])
def test_another_key_query_or_round_draws_other_noise_and_other_batches(trial: Trial, change: dict[str, Any]) -> None:
    first, second = Spy(), Spy()
    method, plan = CATALOGUE["dp-lora"], trial.plan()
    trial.run(method, plan, first)
    trial.run(method, plan, second, ledger=trial.ledger("other"), **change)
    for name in first.states[1]:
        assert not torch.equal(first.states[1][name], second.states[1][name])
    for one, other in zip(first.batches, second.batches, strict=True):
        assert not any(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def test_a_client_draws_the_same_in_any_cohort(trial: Trial) -> None:
    """Bit for bit in what is random; the sums of gradients may differ by the order they were added in."""
    method, plan = CATALOGUE["la-lora"], trial.plan()
    together = trial.run(method, plan, trial.cohort_engine(), {"lr": 0.3})
    for client in CLIENTS:
        alone = trial.run(
            method, plan, trial.cohort_engine(), {"lr": 0.3}, clients=(client,), ledger=trial.ledger(client)
        )
        for name, tensor in alone[client].tensors.items():
            torch.testing.assert_close(tensor, together[client].tensors[name], rtol=1e-5, atol=1e-6)


# Order and accounting


def test_each_entry_is_on_disk_before_the_batch_is_drawn(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    ledger, plan = trial.ledger(), trial.plan(steps=3)

    def on_disk(step: int) -> bool:
        entries = Ledger(ledger.path).entries()
        return {(e.client, e.round, e.step, e.query) for e in entries if e.step == step} == {
            (client, 1, step, QUERY) for client in CLIENTS
        }

    def watched(kind: str, function: Any, step_of: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            assert on_disk(step_of(args)), f"{kind} before its entry"
            events.append(kind)
            return function(*args, **kwargs)

        return call

    spy = Spy(trial.cohort_engine())
    count = itertools.count(1)
    monkeypatch.setattr(training, "poisson_sample", watched("sample", poisson_sample, lambda args: args[4]))
    monkeypatch.setattr(training, "add_step_noise", watched("noise", add_step_noise, lambda args: args[4]))
    monkeypatch.setattr(spy, "clipped_sums", watched("engine", spy.clipped_sums, lambda args: next(count)))
    trial.run(CATALOGUE["ffa-lora"], plan, spy, ledger=ledger)
    assert events == (["sample"] * 3 + ["engine"] + ["noise"]) * 3


@pytest.mark.parametrize("failing", [1, 3])
def test_a_ledger_that_cannot_be_written_stops_the_step(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    from fedpipe.privacy import ledger as module

    writes, drawn, real = itertools.count(1), [], module._write
    ledger, spy = trial.ledger(), Spy(trial.cohort_engine())

    def full(handle: int, content: bytes) -> None:
        if next(writes) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle, content)

    monkeypatch.setattr(module, "_write", full)
    monkeypatch.setattr(training, "poisson_sample", lambda *args: drawn.append(args) or poisson_sample(*args))
    with pytest.raises(StorageError, match="disk is full"):
        trial.run(CATALOGUE["dp-lora"], trial.plan(), spy, ledger=ledger)
    assert len(spy.states) == failing - 1
    assert len(drawn) == 3 * (failing - 1)
    assert len(Ledger(ledger.path).entries()) == 3 * (failing - 1)


def test_a_private_plan_does_not_run_without_a_ledger(trial: Trial) -> None:
    spy = Spy()
    with pytest.raises(PrivacyError, match="ledger"):
        train_cohort(
            spy, trial.workspace.model, trial.work(), trial.plan(), CATALOGUE["dp-lora"], OptimizerSettings(), None
        )
    assert not spy.states


def test_records_that_are_not_those_of_the_plan_are_refused_unspent(trial: Trial) -> None:
    ledger, spy = trial.ledger(), Spy()
    records = [trial.workspace.records(client) for client in (*CLIENTS[:2], None)]
    with pytest.raises(PrivacyError, match=r"c002 has \d+ records; the plan"):
        trial.run(CATALOGUE["dp-lora"], trial.plan(), spy, ledger=ledger, records=records)
    assert not ledger.entries()
    assert not spy.states


def test_an_empty_batch_takes_its_noisy_step_and_its_entry(trial: Trial) -> None:
    plan, ledger, spy = trial.plan(q=1e-12, steps=3), trial.ledger(), Spy(trial.cohort_engine())
    trial.run(unfiltered(CATALOGUE["dp-lora"]), one_more(plan), spy, {"lr": 0.5}, ledger)
    assert all(len(batch) == 0 for batches in spy.batches for batch in batches)
    for step, change in enumerate(moves(spy, spy.states[-1])[:3], 1):
        for row, client in enumerate(CLIENTS):
            for name, tensor in change.items():
                shape, std = tensor.shape[1:], 1.5 * 0.8
                noise = step_noise(client_key(KEY, client), QUERY, 1, client, step, name, shape, std)
                expected = -0.5 * noise / plan.clients[client].expected_batch
                torch.testing.assert_close(tensor[row], expected, rtol=1e-3, atol=1e-6)
    assert [(e.client, e.step, e.sigma, e.q) for e in ledger.entries()] == [
        (client, step, 1.5, 1e-12) for step in (1, 2, 3, 4) for client in CLIENTS
    ]


@pytest.mark.parametrize("private", [True, False])
def test_sums_are_divided_by_the_expected_size(trial: Trial, private: bool) -> None:
    plan, spy = trial.plan(1e-6) if private else trial.open_plan(), Spy(fill=5.0)
    trial.run(unfiltered(CATALOGUE["dp-lora"]), plan, spy, {"lr": 0.1})
    realised = {len(batch) for batches in spy.batches for batch in batches}
    assert len(realised) > 2, "the batches should differ in size"
    for change in moves(spy, spy.states[-1])[:-1]:
        for row, batch in enumerate((24, 30, 40)):
            for tensor in change.values():
                torch.testing.assert_close(tensor[row], torch.full_like(tensor[row], -0.5 / batch), rtol=1e-3, atol=0)


def test_the_batches_are_the_keyed_poisson_samples(trial: Trial) -> None:
    plan, spy = trial.plan(), Spy()
    trial.run(CATALOGUE["dp-lora"], plan, spy)
    for step, batches in enumerate(spy.batches, 1):
        for client, batch in zip(CLIENTS, batches, strict=True):
            own = plan.clients[client]
            expected = poisson_sample(client_key(KEY, client), QUERY, 1, client, step, own.records, own.sampling_rate)
            np.testing.assert_array_equal(batch, expected)


def test_every_method_spends_the_same(trial: Trial) -> None:
    """Epsilon depends on sigma, q and the steps only, not on which tensors a step trains."""
    spent = []
    for method in WAYS:
        ledger = trial.ledger(method.name)
        trial.run(method, trial.plan(), trial.cohort_engine(), {"lr": 0.1}, ledger)
        spent.append([(e.client, e.round, e.step, e.sigma, e.q, e.mechanism) for e in ledger.entries()])
    assert len(spent[0]) == 3 * 4
    assert all(entries == spent[0] for entries in spent)


def test_nothing_prints_the_key_or_the_records(trial: Trial) -> None:
    work = trial.work()
    assert "key" not in repr(work)
    assert "tokens" not in repr(work)
    assert repr(KEY) not in repr(work)


# What moves


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("method", list(CATALOGUE.values()), ids=lambda method: method.name)
def test_what_is_inactive_is_bit_identical_over_a_step_and_a_round(trial: Trial, method: Method, round: int) -> None:
    start, spy = random_start(trial.workspace), Spy(trial.cohort_engine())
    plan = trial.plan(steps=2) if method.private else trial.open_plan(steps=2)
    updates = trial.run(method, one_more(plan), spy, {"lr": 0.1, "weight_decay": 0.01}, start=start, round=round)
    specs = trial.workspace.model.specs
    for step, change in enumerate(moves(spy, spy.states[-1])[:2], 1):
        for spec in specs:
            for row in range(3):
                assert bool(change[spec.name][row].any()) == method.is_active(round, step, spec), (spec.name, step)
    sent, trained = method.sends(specs, round, 3), {spec.name for spec in method.trains(specs, round, 3)}
    for update in updates.values():
        assert set(update.tensors) == {spec.name for spec in [*sent, *method.objective.extra_specs(sent)]}
    for spec in specs:
        if spec.name not in trained:
            for row in range(3):
                assert torch.equal(spy.states[-1][spec.name][row], start[spec.name])


def test_an_untrained_head_stays_and_is_not_sent(trial: Trial) -> None:
    factors = frozenset(spec.name for spec in trial.workspace.model.specs if spec.factor != "head")
    spy = Spy(trial.cohort_engine())
    updates = trial.run(CATALOGUE["dp-lora"], trial.plan(), spy, trained=factors)
    assert set(updates["c000"].tensors) == factors
    assert all({spec.name for spec in active} == factors for active in spy.active)


def naive_step(
    workspace: Workspace, state: dict[str, Tensor], client: str, batch: np.ndarray, active: set[str], rate: float
) -> dict[str, Tensor]:
    """A plain step of gradient descent on the unchanged peft model, the batch's losses summed."""
    model, expected = workspace.model, {"c000": 24, "c001": 30, "c002": 40}[client]
    parameters = {s.name: model.model.get_submodule(s.module).get_parameter(s.parameter) for s in model.specs}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    chosen = {name: parameters[name].requires_grad_(True) for name in sorted(active)}
    inputs, labels = workspace.records(client).batch(batch, CPU)
    loss = workspace.task.losses(model.forward(inputs), labels).sum()
    gradients = dict(zip(chosen, torch.autograd.grad(loss, list(chosen.values())), strict=True))
    for parameter in chosen.values():
        parameter.requires_grad_(False)
    return {n: t - rate * gradients[n] / expected if n in active else t.clone() for n, t in state.items()}


@pytest.mark.parametrize("name", ["fedit", "dp-lora", "ffa-lora", "rolora", "la-lora"])
def test_without_privacy_a_round_is_plain_block_coordinate_descent(trial: Trial, name: str) -> None:
    """LA-LoRA with two steps: B on the batch of step 1, then A on that of step 2, which sees the new B."""
    method, plan, specs = unfiltered(CATALOGUE[name]), trial.open_plan(steps=2), trial.workspace.model.specs
    start, spy = random_start(trial.workspace), Spy(trial.cohort_engine())
    updates = trial.run(method, plan, spy, {"lr": 0.4}, start=start)
    for row, client in enumerate(CLIENTS):
        state = start
        for step in (1, 2):
            active = {spec.name for spec in specs if method.is_active(1, step, spec)}
            state = naive_step(trial.workspace, state, client, spy.batches[step - 1][row], active, 0.4)
        for tensor, value in updates[client].tensors.items():
            torch.testing.assert_close(value, state[tensor], rtol=1e-5, atol=1e-6)
        assert updates[client].snr is None


def test_without_privacy_dp_lora_is_fedit_bit_for_bit(trial: Trial) -> None:
    states = []
    for method in (CATALOGUE["dp-lora"], replace(CATALOGUE["fedit"], weights=Uniform())):
        state = trial.workspace.model.initial
        for number in (1, 2):
            rule = RunningMean(state)
            updates = trial.run(
                method, trial.open_plan(), trial.cohort_engine(), {"lr": 0.3}, start=state, round=number
            )
            for client in CLIENTS:
                rule.add(client, updates[client].tensors, 1 / 3)
            state = rule.result().adapter
        states.append(state)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], trial.workspace.model.initial[name]) for name in states[0])


@pytest.mark.parametrize("method", WAYS, ids=lambda method: method.name)
@pytest.mark.parametrize("dropout", [False, True])
def test_both_engines_give_the_same_updates_noise_included(
    trial: Trial, dropping: Workspace, method: Method, dropout: bool
) -> None:
    workspace = dropping if dropout else trial.workspace
    trial, plan, start = Trial(workspace, trial.directory), trial.plan(0.2), random_start(workspace)
    ours = trial.run(method, plan, trial.cohort_engine(), {"lr": 0.3}, start=start)
    opacus = OpacusEngine(workspace.model, CPU, "fp32", 4096)
    theirs = trial.run(method, plan, opacus, {"lr": 0.3}, start=start, ledger=trial.ledger("opacus"))
    for client in CLIENTS:
        for name, tensor in ours[client].tensors.items():
            torch.testing.assert_close(tensor, theirs[client].tensors[name], rtol=1e-5, atol=1e-5)
        assert ours[client].norm == pytest.approx(theirs[client].norm, rel=1e-5)


# The guard


def specs_and_states(values: Mapping[str, float]) -> tuple[list[TensorSpec], dict[str, Tensor]]:
    factors = {"x.lora_A.weight": "A", "x.lora_B.weight": "B", "head.weight": "head"}
    specs = [TensorSpec(name, (2,), factor, "x", "weight") for name, factor in factors.items()]
    return specs, {name: torch.full((2, 2), values.get(name, 1.0)) for name in factors}


def guard(
    moved: Mapping[str, Sequence[int]], active: str, private: bool, sizes: Sequence[int] = (3, 3), b: float = 1.0
) -> None:
    """Run the guard on two clients; `moved` names the clients whose tensor moved."""
    specs, before = specs_and_states({"x.lora_B.weight": b})
    after = {name: tensor.clone() for name, tensor in before.items()}
    for name, rows in moved.items():
        for row in rows:
            after[name][row, 1] += 1e-3
    chosen = [spec for spec in specs if spec.factor in active.split()]
    check_first_step(before, after, specs, chosen, [np.arange(size) for size in sizes], private)


ALL = {"x.lora_A.weight": (0, 1), "x.lora_B.weight": (0, 1), "head.weight": (0, 1)}


@pytest.mark.parametrize("private", [True, False])
def test_the_guard_lets_a_proper_step_pass(private: bool) -> None:
    guard(ALL, "A B head", private)
    guard({"x.lora_B.weight": (0, 1), "head.weight": (0, 1)}, "B head", private)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("private", [True, False])
def test_the_guard_sees_one_client_s_tensor_stand_still(name: str, private: bool) -> None:
    with pytest.raises(TrainingError, match=f"'{name}' stood still"):
        guard({**ALL, name: (0,)}, "A B head", private)


@pytest.mark.parametrize("private", [True, False])
def test_the_guard_sees_an_inactive_tensor_move(private: bool) -> None:
    with pytest.raises(TrainingError, match=r"'x\.lora_A\.weight' moved in a step that does not train it"):
        guard({**ALL, "x.lora_A.weight": (1,)}, "B head", private)


def test_what_noise_moves_must_move_with_an_empty_batch_and_a_zero_b_too() -> None:
    with pytest.raises(TrainingError, match="stood still"):
        guard({**ALL, "head.weight": (0,)}, "A B head", True, sizes=(3, 0))
    with pytest.raises(TrainingError, match="stood still"):
        guard({**ALL, "x.lora_A.weight": ()}, "A B head", True, b=0.0)


@pytest.mark.parametrize("b", [0.0, 1e-5])
def test_without_noise_an_empty_batch_and_a_behind_a_tiny_b_may_stand_still(b: float) -> None:
    guard({name: (0,) for name in ALL}, "A B head", False, sizes=(3, 0))
    guard({**ALL, "x.lora_A.weight": ()}, "A B head", False, b=b)


def test_a_layer_that_takes_no_part_in_the_loss_is_found(trial: Trial) -> None:
    """An engine that forgets the head: without noise it stands still and the round stops."""

    class Forgetful(Spy):
        def clipped_sums(self, *args: Any) -> dict[str, Tensor]:
            sums = super().clipped_sums(*args)
            return {n: torch.zeros_like(t) if "classifier" in n else t for n, t in sums.items()}

    with pytest.raises(TrainingError, match="classifier"):
        trial.run(CATALOGUE["ffa-lora"], trial.open_plan(), Forgetful(trial.cohort_engine()))


def test_a_step_that_moves_an_inactive_tensor_is_found(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Optimizer.step

    def careless(self: Optimizer, state: dict[str, Tensor], *args: Any) -> None:
        step(self, state, *args)
        for tensor in state.values():
            tensor.mul_(0.999)

    monkeypatch.setattr(Optimizer, "step", careless)
    with pytest.raises(TrainingError, match=r"lora_A\.weight' moved in a step that does not train it"):
        trial.run(CATALOGUE["ffa-lora"], trial.plan(), Spy())


def test_a_client_whose_values_are_not_finite_has_no_update_and_the_others_have_theirs(trial: Trial) -> None:
    class Exploding(Spy):
        def clipped_sums(self, *args: Any) -> dict[str, Tensor]:
            sums = super().clipped_sums(*args)
            for tensor in sums.values():
                tensor[1] = float("inf")
            return sums

    usual = trial.run(CATALOGUE["dp-lora"], trial.plan(), Spy())
    found = trial.run(CATALOGUE["dp-lora"], trial.plan(), Exploding())
    assert re.fullmatch(r"diverged: '.*' is no longer finite", found["c001"].failed)
    assert found["c001"].tensors == {}
    for client in ("c000", "c002"):
        assert all((found[client].tensors[name] == own).all() for name, own in usual[client].tensors.items())


# Optimisers


def random_gradients(specs: Sequence[TensorSpec], step: int, clients: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {spec.name: torch.randn(clients, *spec.shape, generator=generator) for spec in specs}


@pytest.mark.parametrize(
    "options",
    [
        {"name": "sgd", "lr": 0.1},
        {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        {"name": "adamw", "lr": 0.01},
        {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
        {"name": "adamw", "lr": 0.01, "beta1": 0.5, "beta2": 0.9, "eps": 1e-3},
    ],
)
@pytest.mark.parametrize("schedule", ["both", "alternate-step"])
def test_optimisers_are_those_of_torch_with_a_counter_per_tensor(
    workspace: Workspace, options: dict[str, Any], schedule: str
) -> None:
    """A torch optimiser of its own for each client and tensor steps only where the tensor is active."""
    method, specs = replace(CATALOGUE["dp-lora"], schedule=AXES["schedule"][schedule]()), workspace.model.specs
    state = {name: tensor.repeat(2, *[1] * tensor.dim()) for name, tensor in random_start(workspace).items()}
    twins = {(n, row): torch.nn.Parameter(t[row].clone()) for n, t in state.items() for row in range(2)}
    rest = {key: value for key, value in options.items() if key not in ("name", "beta1", "beta2")}
    if options["name"] == "adamw":
        rest = {"weight_decay": 0.0, **rest, "betas": (options.get("beta1", 0.9), options.get("beta2", 0.999))}
    make = torch.optim.SGD if options["name"] == "sgd" else torch.optim.AdamW
    theirs = {key: make([parameter], **rest) for key, parameter in twins.items()}
    ours = Optimizer(OptimizerSettings(**options), round=1)
    for step in range(1, 7):
        active = [spec for spec in specs if method.is_active(1, step, spec)]
        gradients = random_gradients(active, step)
        ours.step(state, gradients, active)
        for spec in active:
            for row in range(2):
                twins[spec.name, row].grad = gradients[spec.name][row].clone()
                theirs[spec.name, row].step()
        for (name, row), parameter in twins.items():
            torch.testing.assert_close(state[name][row], parameter.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_and_moments_leave_inactive_tensors_alone(workspace: Workspace, name: str) -> None:
    optimizer = Optimizer(OptimizerSettings(name=name, lr=0.1, weight_decay=0.5), round=1)
    state = {key: tensor[None].clone() for key, tensor in random_start(workspace).items()}
    before = {key: tensor.clone() for key, tensor in state.items()}
    active = [spec for spec in workspace.model.specs if spec.factor == "B"]
    for step in range(3):
        optimizer.step(state, random_gradients(active, step, clients=1), active)
    names = {spec.name for spec in active}
    for key, tensor in state.items():
        assert torch.equal(tensor, before[key]) == (key not in names)


def test_each_factor_has_its_learning_rate_and_it_decays_by_round(workspace: Workspace) -> None:
    settings = OptimizerSettings(lr=0.1, lr_a=0.2, lr_head=0.4, lr_decay=0.5)
    specs = {spec.factor: spec for spec in workspace.model.specs}
    for number, factor in ((1, 1.0), (3, 0.25)):
        optimizer = Optimizer(settings, number)
        rates = {kind: optimizer.learning_rate(spec) for kind, spec in specs.items()}
        assert rates == pytest.approx({"A": 0.2 * factor, "B": 0.1 * factor, "head": 0.4 * factor})


# What is told


def test_of_pure_noise_the_signal_is_near_zero(trial: Trial) -> None:
    updates = trial.run(unfiltered(CATALOGUE["dp-lora"]), trial.plan(steps=40), Spy(), {"lr": 0.01})
    assert all(0 <= update.snr < 0.25 for update in updates.values())


@pytest.mark.parametrize("planted", [0.5, 3.0])
@pytest.mark.parametrize("name", ["dp-lora", "la-lora"])
def test_of_a_planted_signal_the_ratio_is_right(trial: Trial, planted: float, name: str) -> None:
    """Every coordinate of a sum holds `planted` noise standard deviations of signal; the filter comes after."""
    plan, spy = trial.plan(steps=40), Spy(fill=planted * 1.5 * 0.8)
    updates = trial.run(CATALOGUE[name], plan, spy, {"lr": 0.01})
    assert [update.snr for update in updates.values()] == pytest.approx([planted] * 3, rel=0.1)


def test_the_norm_is_that_of_what_changed(trial: Trial) -> None:
    start = random_start(trial.workspace)
    updates = trial.run(CATALOGUE["rolora"], trial.plan(), trial.cohort_engine(), {"lr": 0.2}, start=start)
    for update in updates.values():
        squares = sum(float((tensor - start[n]).double().square().sum()) for n, tensor in update.tensors.items())
        assert update.norm == pytest.approx(squares**0.5, rel=1e-6)
        assert update.norm > 0


# Dropout


def dropped(probability: float, seeds: Tensor, shape: tuple[int, ...], layer: int = 0) -> Tensor:
    module = KeyedDropout(probability, layer)
    module.seeds = seeds
    return module(torch.ones(shape)) == 0


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    module = KeyedDropout(0.3, 0)
    inputs = torch.ones(64, 10, 32)
    assert module(inputs) is inputs
    module.seeds = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, 64))
    outputs = module(inputs)
    assert float((outputs == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(outputs.mean()) == pytest.approx(1, abs=0.015)
    assert outputs.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


def test_dropout_of_records_layers_and_places_is_unrelated() -> None:
    seeds = torch.arange(40) * 7919
    masks = torch.stack([dropped(0.5, seeds, (40, 16, 32), layer).flatten(1) for layer in (0, 1, 2)])
    correlations = np.corrcoef(masks.reshape(120, -1).numpy())
    assert np.abs(correlations[~np.eye(120, dtype=bool)]).max() < 5.5 / 512**0.5
    assert np.abs(np.corrcoef(masks.reshape(120, -1)[:, :128].T.numpy())[0, 1:]).max() < 0.5


def test_what_a_record_drops_does_not_depend_on_its_batch() -> None:
    seeds = torch.tensor([5, -17, 123456789])
    together = dropped(0.4, seeds, (3, 12, 8))
    for row in range(3):
        assert torch.equal(dropped(0.4, seeds[row : row + 1], (1, 12, 8))[0], together[row])
        # A longer neighbour pads the batch; the record's own places draw as before.
        assert torch.equal(dropped(0.4, seeds, (3, 20, 8))[row, :12], together[row])


def seeded(workspace: Workspace, client: str = "c000") -> list[np.ndarray]:
    return [np.random.default_rng(1).integers(-(2**63), 2**63, len(workspace.records(client)))]


def test_with_dropout_one_record_moves_the_sum_by_at_most_the_clip_norm(dropping: Workspace) -> None:
    """Draws that shift when a record leaves would change the gradients of all behind it."""
    engine, clip = CohortEngine(dropping.model.to_batched(), CPU, "fp32", 256), 0.2
    state = {name: tensor[None] for name, tensor in random_start(dropping).items()}
    records, seeds, specs = [dropping.records("c000")], seeded(dropping), list(dropping.model.specs)
    batch = np.arange(20)
    full = engine.clipped_sums(state, records, [batch], specs, clip, seeds)
    plain = engine.clipped_sums(state, records, [batch], specs, clip)
    assert any((full[name] - plain[name]).abs().max() > 1e-3 for name in full), "dropout is off"
    for record in batch:
        less = engine.clipped_sums(state, records, [batch[batch != record]], specs, clip, seeds)
        assert sum(float((full[n] - less[n]).double().square().sum()) for n in full) ** 0.5 <= clip * (1 + 1e-4)


@pytest.mark.parametrize("tokens", [16, 128, 100_000])
def test_with_dropout_neither_the_token_budget_nor_the_cohort_changes_a_client(
    trial: Trial, dropping: Workspace, tokens: int
) -> None:
    trial = Trial(dropping, trial.directory)
    method, plan = CATALOGUE["la-lora"], trial.plan()
    together = trial.run(method, plan, trial.cohort_engine(), {"lr": 0.3})
    pair = trial.run(
        method, plan, trial.cohort_engine(tokens), {"lr": 0.3}, clients=CLIENTS[1:], ledger=trial.ledger("pair")
    )
    for client in CLIENTS[1:]:
        for name, tensor in pair[client].tensors.items():
            torch.testing.assert_close(tensor, together[client].tensors[name], rtol=1e-5, atol=1e-6)


def test_dropout_draws_from_the_secret_key_anew_in_every_step(
    trial: Trial, dropping: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, seen = Trial(dropping, trial.directory), []

    class Watching(Spy):
        def clipped_sums(self, state, records, batches, active, clip_norm, seeds, *others):
            seen.append(seeds)
            return super().clipped_sums(state, records, batches, active, clip_norm, seeds, *others)

    for number, key in enumerate((KEY, bytes(32))):
        trial.run(CATALOGUE["dp-lora"], trial.plan(steps=2), Watching(), key=key, ledger=trial.ledger(str(number)))
    assert [len(own) for own in seen[0]] == [len(dropping.records(client)) for client in CLIENTS]
    drawn = np.concatenate([own for seeds in seen for own in seeds])
    assert len(np.unique(drawn)) == len(drawn)


def test_a_failed_step_leaves_no_dropout_behind(dropping: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    model: AdaptedModel = dropping.model.to_batched()
    engine = CohortEngine(model, CPU, "fp32", 256)
    monkeypatch.setattr(model, "forward", lambda inputs: 1 / 0)
    state = {name: tensor[None] for name, tensor in random_start(dropping).items()}
    with pytest.raises(ZeroDivisionError):
        engine.clipped_sums(state, [dropping.records("c000")], [np.arange(3)], list(model.specs), 1.0, seeded(dropping))
    assert model.has_dropout
    assert all(m.seeds is None for m in model.model.modules() if isinstance(m, KeyedDropout))
