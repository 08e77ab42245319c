"""The cohort engine against loops of one record, against Opacus, and against the bounds it must keep."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpipe.client.clipping import add_clipped, clip_factors, record_norms
from fedpipe.client.engine import CohortEngine, micro_batches
from fedpipe.client.reference import OpacusEngine
from fedpipe.models.lora import TensorSpec
from fedpipe.models.task import Encoded
from fedpipe.workspace import Workspace

CPU = torch.device("cpu")


def random_state(workspace: Workspace, clients: int, seed: int = 0) -> dict[str, Tensor]:
    """Adapters with no zero in them, so that every factor has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return {s.name: 0.3 * torch.randn(clients, *s.shape, generator=generator) for s in workspace.model.specs}


def one_by_one(
    workspace: Workspace,
    state: dict[str, Tensor],
    records: Encoded,
    row: int,
    batch: np.ndarray,
    specs: list[TensorSpec],
) -> list[dict[str, Tensor]]:
    """The gradient of each record alone, by plain autograd on the unchanged peft model."""
    model, gradients = workspace.model, []
    parameters = {s.name: model.model.get_submodule(s.module).get_parameter(s.parameter) for s in model.specs}
    for record in batch:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name][row])
        chosen = [parameters[s.name].requires_grad_(True) for s in specs]
        inputs, labels = records.batch(np.array([record]), CPU)
        loss = workspace.task.losses(model.forward(inputs), labels).sum()
        gradients.append(dict(zip([s.name for s in specs], torch.autograd.grad(loss, chosen), strict=True)))
        for parameter in chosen:
            parameter.requires_grad_(False)
    return gradients


def naive_sums(gradients: list[dict[str, Tensor]], clip: float | None) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for gradient in gradients:
        norm = sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        for name, value in gradient.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + factor * value
    return sums


BATCHES = [np.array([0, 3, 5, 17, 20]), np.array([], dtype=np.int64), np.array([2, 9])]
ACTIVE = {
    "all": lambda spec: True,
    "B and head": lambda spec: spec.factor != "A",
    "A only": lambda spec: spec.factor == "A",
}


@pytest.mark.parametrize("clip", [None, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("active", ACTIVE)
def test_sums_are_those_of_a_loop_over_records(workspace: Workspace, active: str, clip: float | None) -> None:
    specs = [spec for spec in workspace.model.specs if ACTIVE[active](spec)]
    state = random_state(workspace, 3)
    records = [workspace.records(client) for client in workspace.federation.clients]
    sums = CohortEngine(workspace.model.to_batched(), CPU, "fp32", 64).clipped_sums(
        state, records, BATCHES, specs, clip
    )
    assert set(sums) == {spec.name for spec in specs}
    for row, batch in enumerate(BATCHES):
        expected = naive_sums(one_by_one(workspace, state, records[row], row, batch, specs), clip)
        for name, total in sums.items():
            reference = expected.get(name, torch.zeros_like(total[row]))
            torch.testing.assert_close(total[row], reference, rtol=1e-4, atol=1e-6)


def test_an_empty_batch_sums_to_exactly_zero(workspace: Workspace) -> None:
    state, specs = random_state(workspace, 2), list(workspace.model.specs)
    records = [workspace.records(client) for client in workspace.federation.clients[:2]]
    nothing = [np.array([], dtype=np.int64)] * 2
    sums = CohortEngine(workspace.model.to_batched(), CPU, "fp32", 64).clipped_sums(state, records, nothing, specs, 1.0)
    assert all(not total.any() for total in sums.values())


@pytest.mark.parametrize("clip", [None, 0.5])
def test_opacus_gives_the_same_sums(workspace: Workspace, clip: float | None) -> None:
    state, specs = random_state(workspace, 3, seed=4), list(workspace.model.specs)
    records = [workspace.records(client) for client in workspace.federation.clients]
    cohort = CohortEngine(workspace.model.to_batched(), CPU, "fp32", 128)
    opacus = OpacusEngine(workspace.model, CPU, "fp32", 128)
    ours = cohort.clipped_sums(state, records, BATCHES, specs, clip)
    theirs = opacus.clipped_sums(state, records, BATCHES, specs, clip)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 17, 64, 10_000])
def test_the_token_budget_changes_rounding_only(workspace: Workspace, tokens: int) -> None:
    state, specs = random_state(workspace, 3), list(workspace.model.specs)
    records = [workspace.records(client) for client in workspace.federation.clients]
    model = workspace.model.to_batched()
    sums = CohortEngine(model, CPU, "fp32", tokens).clipped_sums(state, records, BATCHES, specs, 0.1)
    whole = CohortEngine(model, CPU, "fp32", 10**6).clipped_sums(state, records, BATCHES, specs, 0.1)
    for name in sums:
        torch.testing.assert_close(sums[name], whole[name], rtol=1e-4, atol=1e-6)


def test_removing_one_record_moves_the_sum_by_at_most_the_clip_norm(workspace: Workspace) -> None:
    state, specs, clip = random_state(workspace, 1), list(workspace.model.specs), 0.2
    records = [workspace.records("c000")]
    engine = CohortEngine(workspace.model.to_batched(), CPU, "fp32", 512)
    batch = np.arange(12)
    full = engine.clipped_sums(state, records, [batch], specs, clip)
    moved = []
    for record in batch:
        less = engine.clipped_sums(state, records, [batch[batch != record]], specs, clip)
        moved.append(sum(float((full[name] - less[name]).double().square().sum()) for name in full) ** 0.5)
    assert max(moved) <= clip * (1 + 1e-4)
    # Clipping is at work, so the bound is met and not just kept.
    assert max(moved) > 0.99 * clip


def test_clipping_each_factor_alone_would_break_the_bound() -> None:
    """The mistake of DP-LoRA's first form: A and B clipped at C each have joint sensitivity sqrt(2) C."""
    record = {"A": torch.full((1, 4), 10.0), "B": torch.full((1, 4), 10.0)}
    apart = sum(float((g * clip_factors(record_norms({n: g}), 1.0)).square().sum()) for n, g in record.items()) ** 0.5
    assert apart == pytest.approx(2**0.5, rel=1e-4)
    sums = {name: torch.zeros(1, 4) for name in record}
    add_clipped(sums, record, torch.tensor([0]), 1.0)
    assert sum(float(total.square().sum()) for total in sums.values()) ** 0.5 == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_adds_nothing(poison: float) -> None:
    gradients = {"A": torch.tensor([[3.0, 4.0], [1.0, poison]]), "B": torch.tensor([[0.0], [1.0]])}
    sums = {"A": torch.zeros(1, 2), "B": torch.zeros(1, 1)}
    add_clipped(sums, gradients, torch.tensor([0, 0]), 1.0)
    torch.testing.assert_close(sums["A"], torch.tensor([[0.6, 0.8]]), rtol=1e-5, atol=1e-6)
    assert float(sums["B"]) == 0.0


def test_without_a_clip_norm_nothing_is_scaled_and_nan_is_seen() -> None:
    sums = {"A": torch.zeros(1, 2)}
    add_clipped(sums, {"A": torch.tensor([[30.0, float("nan")]])}, torch.tensor([0]), None)
    assert float(sums["A"][0, 0]) == 30.0
    assert torch.isnan(sums["A"][0, 1])


def test_micro_batches_cover_sort_and_keep_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(3, 40, size=200)
    parts = list(micro_batches(lengths, 160))
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
    assert all(len(part) * lengths[part].max() <= 160 for part in parts)
    flat = lengths[np.concatenate(parts)]
    assert (np.diff(flat) >= 0).all()
    # Greedy: no part could have taken the next record as well.
    for part, following in itertools.pairwise(parts):
        assert (len(part) + 1) * lengths[following[0]] > 160


def test_a_record_longer_than_the_budget_stands_alone() -> None:
    assert [part.tolist() for part in micro_batches(np.array([9, 50, 3]), 12)] == [[2], [0], [1]]
    assert list(micro_batches(np.array([], dtype=np.int64), 12)) == []


def test_only_active_tensors_are_differentiated(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda out, leaves, **k: asked.append(len(leaves)) or grad(out, leaves, **k)
    )
    specs = [spec for spec in workspace.model.specs if spec.factor == "B"]
    engine = CohortEngine(workspace.model.to_batched(), CPU, "fp32", 512)
    engine.clipped_sums(random_state(workspace, 1), [workspace.records("c000")], [np.arange(4)], specs, 1.0)
    assert asked == [len(specs)]


def test_bfloat16_keeps_norms_and_sums_in_float32(workspace: Workspace) -> None:
    state, specs = random_state(workspace, 1), list(workspace.model.specs)
    records, batches = [workspace.records("c000")], [np.arange(8)]
    model = workspace.model.to_batched()
    low = CohortEngine(model, CPU, "bf16", 512).clipped_sums(state, records, batches, specs, 0.1)
    full = CohortEngine(model, CPU, "fp32", 512).clipped_sums(state, records, batches, specs, 0.1)
    assert all(total.dtype == torch.float32 for total in low.values())
    difference = sum(float((low[n] - full[n]).square().sum()) for n in full) ** 0.5
    assert 0 < difference < 0.01 * 0.1 * len(batches[0])
