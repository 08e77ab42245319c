"""Unit group: groups are drawn whole, and the mean gradient of a group is what is clipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import KEY, Federation, Models
from small import CPU, State, make_model, make_records, random_state

from fedpipe.client.batching import Budget
from fedpipe.client.clip import JOINT, Clip, PerFactor
from fedpipe.client.engine import CohortEngine
from fedpipe.client.reference import OpacusEngine
from fedpipe.client.units import Units
from fedpipe.errors import PrivacyError
from fedpipe.methods import CATALOGUE
from fedpipe.models import batched
from fedpipe.models.lora import AdaptedModel, TensorSpec
from fedpipe.models.task import Encoded, groups_of
from fedpipe.plan import ClientPlan
from fedpipe.privacy.ledger import Ledger
from fedpipe.privacy.noise import client_key, poisson_sample

CLIENTS, RECORDS, MASK = 3, 12, 4
BUDGETS = (8, 25, 60, 2000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    """A tiny model for which a record with the mask token has a gradient of NaN."""
    made = make_model(tmp_path_factory.mktemp("unit_group") / "backbone")
    embedding = next(module for module in made.model.modules() if isinstance(module, torch.nn.Embedding))
    with torch.no_grad():
        embedding.weight[MASK] = torch.nan
    return made


@pytest.fixture(scope="module")
def state(model: AdaptedModel) -> State:
    return random_state(model.specs, CLIENTS)


def gradients_of(model: AdaptedModel, state: State, records: Encoded, row: int) -> list[State]:
    """The gradient of each record alone, by plain autograd on the stock peft model."""
    found, parameters = [], {}
    for spec in model.specs:
        parameters[spec.name] = model.model.get_submodule(spec.module).get_parameter(spec.parameter)
        with torch.no_grad():
            parameters[spec.name].copy_(state[spec.name][row])
    for record in range(len(records)):
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        inputs, labels = records.batch(np.array([record]), CPU)
        loss = model.task.losses(model.forward(inputs), labels).sum()
        found.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)))
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def alone(model: AdaptedModel, state: State) -> list[list[State]]:
    return [gradients_of(model, state, records, row) for row, records in enumerate(make_records(CLIENTS, RECORDS))]


def norm_of(gradient: State) -> float:
    return sum(float(part.double().square().sum()) for part in gradient.values()) ** 0.5


def naive(
    alone: Sequence[State], groups: np.ndarray, batch: np.ndarray, clip_norm: float, clip: Clip, specs: list[TensorSpec]
) -> State:
    """Group by group: add up, divide, clip, add up."""
    total = {spec.name: torch.zeros(spec.shape) for spec in specs}
    tensors = clip.groups(specs)
    for group in sorted(set(groups[batch].tolist())):
        members = [alone[record] for record in batch if groups[record] == group]
        mean = {name: sum(gradient[name] for gradient in members) / len(members) for name in total}
        for together in tensors:
            part = {spec.name: mean[spec.name] for spec in together}
            norm = norm_of(part)
            if np.isfinite(norm):
                factor = min(1.0, clip.bound(clip_norm, len(tensors)) / (norm + 1e-6))
                for name, value in part.items():
                    total[name] += factor * value
    return total


def compare(found: State, expected: Sequence[State]) -> None:
    for row, total in enumerate(expected):
        for name, value in total.items():
            assert torch.allclose(found[name][row], value, rtol=1e-4, atol=2e-6), (row, name)


def poisoned(records: list[Encoded], who: set[tuple[int, int]]) -> list[Encoded]:
    made = [replace(own, tokens=own.tokens.copy()) for own in records]
    for client, record in who:
        made[client].tokens[made[client].offsets[record]] = MASK
    return made


GROUPS = st.lists(st.lists(st.integers(0, 4), min_size=RECORDS, max_size=RECORDS), min_size=CLIENTS, max_size=CLIENTS)


@settings(max_examples=25, deadline=None)
@given(
    labels=GROUPS,
    tokens=st.sampled_from(BUDGETS),
    drawn=st.lists(st.sets(st.integers(0, 4)), min_size=CLIENTS, max_size=CLIENTS),
    lost=st.sets(st.tuples(st.integers(0, CLIENTS - 1), st.integers(0, RECORDS - 1)), max_size=2),
    clip=st.sampled_from([JOINT, PerFactor()]),
    clip_norm=st.sampled_from([0.05, 0.5, 50.0]),
    workers=st.sampled_from([1, 2]),
)
def test_sums_are_those_of_a_loop_over_groups(
    model, state, alone, labels, tokens, drawn, lost, clip, clip_norm, workers
) -> None:
    groups = [np.array(own) for own in labels]
    batches = [np.flatnonzero(np.isin(own, list(chosen))) for own, chosen in zip(groups, drawn, strict=True)]
    records = poisoned(make_records(CLIENTS, RECORDS), lost)
    gradients = [list(own) for own in alone]
    for client, record in lost:
        gradients[client][record] = {name: torch.full_like(g, torch.nan) for name, g in alone[0][0].items()}
    engine = CohortEngine([model.to_batched() for _ in range(workers)], CPU, "fp32", tokens)
    found = engine.clipped_sums(state, records, batches, model.specs, clip_norm, None, clip, None, groups)
    expected = [
        naive(own, group, batch, clip_norm, clip, model.specs)
        for own, group, batch in zip(gradients, groups, batches, strict=True)
    ]
    compare(found, expected)
    again = engine.clipped_sums(state, records, batches, model.specs, clip_norm, None, clip, None, groups)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("tokens", BUDGETS)
def test_outer_products_of_groups_are_their_gradients(
    model, state, alone, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched, "outer_products_pay", lambda *shape: True)
    groups = [np.arange(RECORDS) % 5, np.zeros(RECORDS, dtype=np.int64), np.arange(RECORDS)]
    batches = [np.arange(RECORDS)] * CLIENTS
    engine = CohortEngine(model.to_batched(), CPU, "fp32", tokens)
    records = make_records(CLIENTS, RECORDS)
    found = engine.clipped_sums(state, records, batches, model.specs, 0.3, None, JOINT, None, groups)
    compare(found, [naive(*given, 0.3, JOINT, model.specs) for given in zip(alone, groups, batches, strict=True)])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_parts_hold_whole_groups(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 30))
    numbers = st.lists(st.integers(0, 4), min_size=count, max_size=count)
    clients, groups = np.sort(np.array(data.draw(numbers), dtype=int)), np.array(data.draw(numbers), dtype=int)
    widths = 8 * (1 + np.array(data.draw(numbers), dtype=int))
    units = Units(clients, groups)
    numbers, budget = data.draw(st.sampled_from([1, 2**23, 2**30])), Budget(data.draw(st.integers(1, 60)))
    parts = units.parts(widths, numbers, budget)
    assert sorted(record for part in parts for record in part) == list(range(count))
    for part in parts:
        inside = set(units.of[part].tolist())
        assert sum(units.sizes[unit] for unit in inside) == len(part)
        assert len(inside) <= max(1, 2**24 // numbers)


def test_a_group_over_several_micro_batches_is_gathered_before_it_is_clipped(model, state, alone) -> None:
    groups, batches = [np.zeros(RECORDS, dtype=np.int64)] * CLIENTS, [np.arange(RECORDS)] * CLIENTS
    engine = CohortEngine(model.to_batched(), CPU, "fp32", 8)  # one record at a time
    found = engine.clipped_sums(
        state, make_records(CLIENTS, RECORDS), batches, model.specs, 0.01, None, JOINT, None, groups
    )
    for row in range(CLIENTS):  # the mean is far above the bound, so its norm is the bound
        assert norm_of({name: total[row] for name, total in found.items()}) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("clip", [JOINT, PerFactor()])
@pytest.mark.parametrize("tokens", BUDGETS)
def test_removing_a_group_moves_the_sum_by_at_most_the_clip_norm(model, state, tokens: int, clip: Clip) -> None:
    clip_norm, moves = 0.002, []
    engine = CohortEngine(model.to_batched(), CPU, "fp32", tokens)
    for size in (1, 4, 9):
        groups = [np.minimum(np.arange(RECORDS), RECORDS - size)] * CLIENTS  # the last `size` records are one group
        records = make_records(CLIENTS, RECORDS)
        without = [np.arange(RECORDS - size)] * CLIENTS
        there, gone = (
            engine.clipped_sums(state, records, batches, model.specs, clip_norm, None, clip, None, groups)
            for batches in ([np.arange(RECORDS)] * CLIENTS, without)
        )
        moves += [norm_of({name: there[name][row] - gone[name][row] for name in there}) for row in range(CLIENTS)]
    assert max(moves) <= clip_norm * (1 + 1e-5)
    assert max(moves) > 0.9 * clip_norm  # the bound is met, so that it is tested


def test_groups_of_one_record_are_records(model, state) -> None:
    records, batches = make_records(CLIENTS, RECORDS), [np.arange(RECORDS)] * CLIENTS
    ones = [np.random.default_rng(0).permutation(RECORDS)] * CLIENTS
    engine = CohortEngine(model.to_batched(), CPU, "fp32", 60)
    by_record = engine.clipped_sums(state, records, batches, model.specs, 0.5)
    by_group = engine.clipped_sums(state, records, batches, model.specs, 0.5, None, JOINT, None, ones)
    for name, total in by_record.items():
        assert torch.allclose(total, by_group[name], rtol=0, atol=1e-6)


def test_opacus_refuses_groups(model, state) -> None:
    records, batches = make_records(CLIENTS, RECORDS), [np.arange(2)] * CLIENTS
    engine = OpacusEngine(model, CPU, "fp32", 60)
    with pytest.raises(PrivacyError, match="cohort"):
        engine.clipped_sums(state, records, batches, model.specs, 0.5, None, JOINT, None, [np.arange(RECORDS)] * 3)


class Spy:
    """Keeps what it is asked for, and answers with zeros."""

    device = CPU

    def __init__(self) -> None:
        self.batches: list[list[np.ndarray]] = []
        self.units: list[Any] = []

    def clipped_sums(self, state, records, batches, active, clip_norm, seeds, clip, contrast, units, *_) -> State:
        self.batches.append(list(batches))
        self.units.append(units)
        return {spec.name: torch.zeros_like(state[spec.name]) for spec in active}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("unit_group_rounds"))


def grouped(models: Models, groups: Sequence[np.ndarray], q: float, steps: int) -> Federation:
    """Clients of 12 records each in these groups, under unit group."""
    made = Federation(models, CATALOGUE["dp-lora"], clients=len(groups), rounds=1, steps=steps, sigma=1.0)
    pairs = zip(made.records.items(), groups, strict=True)
    made.records = {name: replace(own, groups=group) for (name, own), group in pairs}
    clients = {}
    for name, own in made.records.items():
        count = len(np.unique(own.groups))
        clients[name] = ClientPlan(len(own), q, q * count, 1.0, steps, steps, groups=count)
    words = "add/remove one group of records of one client"
    made.plan = replace(made.plan, unit="group", adjacency=words, clients=clients)
    return made


def test_groups_are_drawn_whole_each_with_the_planned_probability(models: Models, tmp_path: Path) -> None:
    groups = [np.arange(12) % 5, np.repeat([0, 1, 2], 4)]
    federation, spy, steps = grouped(models, groups, q=0.3, steps=400), Spy(), 400
    work, *_ = federation.step(Ledger(tmp_path / "ledger.jsonl", "a run", "group"), spy)
    counts = [np.zeros(5), np.zeros(3)]
    for step, (batches, units) in enumerate(zip(spy.batches, spy.units, strict=True), start=1):
        for row, (batch, own) in enumerate(zip(batches, groups, strict=True)):
            assert units[row] is federation.records[work.clients[row]].groups
            drawn = poisson_sample(client_key(KEY, work.clients[row]), work.query, 1, work.clients[row], step,
                                   len(counts[row]), 0.3)  # fmt: skip
            assert set(own[batch]) == set(drawn)
            assert len(batch) == np.isin(own, drawn).sum()
            counts[row][drawn] += 1
    deviation = (0.3 * 0.7 * steps) ** 0.5
    assert all(abs(count - 0.3 * steps) < 4.5 * deviation for count in np.concatenate(counts))


def test_the_sum_is_noised_by_sigma_c_and_divided_by_the_expected_number_of_groups(models: Models, tmp_path) -> None:
    """An engine that sums to zero leaves the noise alone: its size over the divisor shows in the first step."""
    one, two = (
        grouped(models, [np.arange(12) % count], q=0.5, steps=1)
        .step(Ledger(tmp_path / f"{count}.jsonl", "a run", "group"), Spy())[1]["c000"]
        .norm
        for count in (12, 3)
    )
    assert two == pytest.approx(4 * one, rel=1e-5)  # the same noise, divided by 6 groups and by 1.5


def test_what_was_planned_for_other_groups_is_refused(models: Models, tmp_path: Path) -> None:
    for wrong in (np.arange(12) % 4, None):
        federation = grouped(models, [np.arange(12) % 3], q=0.5, steps=1)
        federation.records = {name: replace(own, groups=wrong) for name, own in federation.records.items()}
        with pytest.raises(PrivacyError, match=r"has .* groups; the plan's sampling rate is for 3"):
            federation.step(Ledger(tmp_path / "ledger.jsonl", "a run", "group"), Spy())


def test_groups_are_numbered_by_name() -> None:
    assert groups_of(["b", "a", "b", "ä", "a"]).tolist() == [1, 0, 1, 2, 0]
