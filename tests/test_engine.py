"""The cohort engine against loops of one record, against Opacus, and against the bounds it must keep."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedpipe.client import exact, parallel
from fedpipe.client.batching import Budget
from fedpipe.client.clipping import apart, clip_factors, sum_clipped
from fedpipe.client.engine import CohortEngine
from fedpipe.client.reference import OpacusEngine
from fedpipe.models import batched
from fedpipe.models.batched import Gradient, OuterProducts, Owners, outer_products_pay
from fedpipe.models.lora import TensorSpec
from fedpipe.models.steady import ROWS
from fedpipe.models.task import Encoded
from fedpipe.workspace import Workspace

CPU = torch.device("cpu")


def owners(*clients: int) -> Owners:
    return Owners(np.array(clients), CPU)


def sums_of(gradients: dict[str, Gradient], whose: Owners, clip: float | None) -> dict[str, Tensor]:
    """The clipped sums by name."""
    shapes = {
        name: (g.outputs.shape[2], g.inputs.shape[2]) if isinstance(g, OuterProducts) else g.shape[1:]
        for name, g in gradients.items()
    }
    return apart(sum_clipped(gradients, whose, clip), shapes)


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


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("active", ACTIVE)
def test_both_ways_to_a_gradient_give_the_sums_of_the_loop(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, active: str, outer: bool
) -> None:
    """Every layer by copies, or every layer by outer products, whatever its shape."""
    monkeypatch.setattr(batched, "outer_products_pay", lambda *shape: outer)
    test_sums_are_those_of_a_loop_over_records(workspace, active, 0.05)


def test_the_cheaper_way_is_a_matter_of_shape() -> None:
    """A dense head that meets a record once: 768 + 768 numbers against 768 x 768. LoRA's factors: copies."""
    assert outer_products_pay(rows=1, inputs=768, outputs=768)
    assert not outer_products_pay(rows=1, inputs=384, outputs=2)
    assert not outer_products_pay(rows=32, inputs=384, outputs=8)
    assert not outer_products_pay(rows=128, inputs=8, outputs=768)
    assert outer_products_pay(rows=32, inputs=4096, outputs=4096)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_does_not_change_a_bit(workspace: Workspace, workers: int) -> None:
    state, specs = random_state(workspace, 3), list(workspace.model.specs)
    records = [workspace.records(client) for client in workspace.federation.clients]
    models = [workspace.model.to_batched() for _ in range(workers)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = CohortEngine(models[0], CPU, "fp32", 32).clipped_sums(state, records, BATCHES, specs, 0.1)
        shared = CohortEngine(models, CPU, "fp32", 32).clipped_sums(state, records, BATCHES, specs, 0.1)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(alone[name], shared[name]) for name in alone)


def test_a_step_uses_every_worker(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[int] = set()
    models = [workspace.model.to_batched() for _ in range(2)]
    both = threading.Barrier(2, timeout=20)
    monkeypatch.setattr(parallel, "_slots", threading.BoundedSemaphore(2))
    for model in models:

        def forward(inputs: dict[str, Tensor], model=model, forward=model.forward):
            if id(model) not in used:
                used.add(id(model))
                both.wait()
            return forward(inputs)

        monkeypatch.setattr(model, "forward", forward)
    records = [workspace.records(client) for client in workspace.federation.clients]
    CohortEngine(models, CPU, "fp32", 32).clipped_sums(
        random_state(workspace, 3), records, BATCHES, list(workspace.model.specs), 1.0
    )
    assert len(used) == 2


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
    each = [g * clip_factors(g.flatten(1).norm(dim=1), 1.0) for g in record.values()]
    assert sum(float(g.square().sum()) for g in each) ** 0.5 == pytest.approx(2**0.5, rel=1e-4)
    sums = sums_of(record, owners(0), 1.0)
    assert sum(float(total.square().sum()) for total in sums.values()) ** 0.5 == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_adds_nothing(poison: float) -> None:
    gradients = {
        "A": torch.tensor([[3.0, 4.0], [1.0, poison], [0.3, 0.0]]),
        "B": torch.tensor([[0.0], [1.0], [0.4]]),
        "head": OuterProducts(torch.tensor([[[0.0]], [[1.0]], [[0.0]]]), torch.tensor([[[0.0]], [[poison]], [[0.0]]])),
    }
    sums = sums_of(gradients, owners(0, 0, 1), 1.0)
    torch.testing.assert_close(sums["A"], torch.tensor([[0.6, 0.8], [0.3, 0.0]]), rtol=1e-5, atol=1e-6)
    assert sums["B"].tolist() == [[0.0], [pytest.approx(0.4)]]
    assert not sums["head"].any()


def test_the_clip_norm_bounds_any_finite_gradient() -> None:
    sums = sums_of({"A": torch.tensor([[1.0, 1e30], [3e38, 3e38]])}, owners(0, 1), 1.0)
    assert sums["A"].norm(dim=1).tolist() == pytest.approx([1.0, 1.0], rel=1e-6)


def test_without_a_clip_norm_nothing_is_scaled_and_only_its_client_sees_a_nan() -> None:
    gradients = {"A": torch.tensor([[30.0, 1.0], [20.0, float("nan")], [3.0, 2.0]])}
    sums = sums_of(gradients, owners(0, 1, 2), None)
    assert sums["A"][[0, 2]].tolist() == [[30.0, 1.0], [3.0, 2.0]]
    assert torch.isnan(sums["A"][1]).all()


def test_only_active_tensors_are_differentiated(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda out, leaves, **k: asked.append(len(leaves)) or grad(out, leaves, **k)
    )
    specs = [spec for spec in workspace.model.specs if spec.factor == "B"]
    engine = CohortEngine(workspace.model.to_batched(), CPU, "fp32", Budget(512, start=512))
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


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 3), st.integers(1, 4))
def test_stacks_hold_every_record_once_and_no_client_beside_another(clients: list[int], rows: int, width: int) -> None:
    of = owners(*sorted(clients))
    values = torch.arange(1.0, len(clients) * rows * width + 1).reshape(len(clients), rows, width)
    stacked = of.stack(values)
    assert torch.equal(of.unstack(stacked), values)
    assert float(stacked.sum()) == float(values.sum())
    for client, stack in zip(of.clients[of.stacks].tolist(), stacked, strict=True):
        inside = {int(value) for value in stack.flatten().tolist() if value}
        own = values[torch.tensor(sorted(clients)) == client].flatten().tolist()
        assert inside <= {int(value) for value in own}
    assert len(stacked) <= 2 * len(set(clients))
    assert stacked[..., 0].numel() <= max(4 * len(clients), 2 * ROWS * len(set(clients))) * rows


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_outer_products_are_the_gradients_that_they_stand_for(rows: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = (torch.randn(5, rows, k, generator=generator) for k in shape)
    products, whole = {"head": OuterProducts(inputs, outputs)}, torch.einsum("nto,nti->noi", outputs, inputs)
    torch.testing.assert_close(exact.squares(products["head"]).float(), whole.flatten(1).square().sum(1))
    whose = owners(0, 0, 1, 1, 1)
    for clip in (0.5, None):
        torch.testing.assert_close(sums_of(products, whose, clip), sums_of({"head": whole}, whose, clip))


def test_terms_that_cancel_do_not_hide_a_norm() -> None:
    """Two rows of a record that nearly cancel: in float32 their Gram matrix would say nothing about the rest."""
    row = torch.full((1, 1, 64), 10.0)
    rest = torch.zeros(1, 1, 64)
    rest[..., 0] = 0.1
    products = OuterProducts(torch.cat([row, row, rest], 1), torch.cat([row, -row, rest], 1))
    assert float(exact.squares(products)) == pytest.approx(1e-4, rel=1e-3)
