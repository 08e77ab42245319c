"""Clipping in groups: the joint bound, against naive loops over records and in both engines."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CPU, make_model, make_records, random_state
from torch import Tensor

from fedpipe.client.clip import JOINT, Clip, Joint, PerFactor, PerLayer
from fedpipe.client.clipping import apart, sum_clipped, sum_in_groups
from fedpipe.client.engine import CohortEngine
from fedpipe.client.reference import OpacusEngine
from fedpipe.methods import AXES
from fedpipe.models.batched import Gradient, OuterProducts, Owners
from fedpipe.models.factors import layer_of
from fedpipe.models.lora import AdaptedModel, TensorSpec

BATCHES = [np.array([0, 3, 5, 7]), np.array([], dtype=np.int64), np.array([2, 9])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return make_model(tmp_path_factory.mktemp("clip") / "backbone")


def specs() -> list[TensorSpec]:
    """Two layers and a head, not in the order of groups."""
    made = []
    for layer in (0, 1):
        where = f"encoder.layer.{layer}.query"
        made.append(TensorSpec(f"{layer}.lora_A", (2, 5), "A", f"{where}.lora_A.default", "weight"))
        made.append(TensorSpec(f"{layer}.lora_B", (4, 2), "B", f"{where}.lora_B.default", "weight"))
    made.insert(1, TensorSpec("head.weight", (3, 6), "head", "classifier.modules_to_save.default", "weight"))
    made.append(TensorSpec("head.bias", (3,), "head", "classifier.modules_to_save.default", "bias"))
    return made


def random_gradients(records: int, owners: Owners, seed: int, sizes: float = 1.0) -> dict[str, Gradient]:
    """Records' gradients of very different sizes from tensor to tensor, one of them as outer products."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        scale = 10 ** (sizes * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator))
        return scale * torch.randn(*shape, generator=generator)

    made: dict[str, Gradient] = {spec.name: draw(records, *spec.shape) for spec in specs()}
    made["head.weight"] = OuterProducts(draw(records, 2, 6), draw(records, 2, 3))
    return made


def dense(gradient: Gradient) -> Tensor:
    if isinstance(gradient, Tensor):
        return gradient
    return torch.einsum("nto,nti->noi", gradient.outputs, gradient.inputs)


def naive(gradients: dict[str, Gradient], clip: Clip, clip_norm: float) -> dict[str, Tensor]:
    """Each record's clipped gradient, by a loop over records and groups."""
    groups, found = (
        clip.groups(specs()),
        {name: dense(gradient).double().clone() for name, gradient in gradients.items()},
    )
    for group in groups:
        for record in range(len(next(iter(found.values())))):
            norm = math.sqrt(sum(float(found[spec.name][record].square().sum()) for spec in group))
            for spec in group:
                found[spec.name][record] *= min(1.0, clip_norm / math.sqrt(len(groups)) / (norm + 1e-6))
    return found


def norm_of(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def test_the_groups_of_each_clip() -> None:
    clips = AXES["clip"]
    names = {part: [[spec.name for spec in group] for group in clips[part]().groups(specs())] for part in clips}
    assert names["joint"] == [[spec.name for spec in specs()]]
    assert names["per-factor"] == [["0.lora_A", "1.lora_A"], ["head.weight", "head.bias"], ["0.lora_B", "1.lora_B"]]
    assert names["per-layer"] == [["0.lora_A", "0.lora_B"], ["head.weight", "head.bias"], ["1.lora_A", "1.lora_B"]]


def test_only_what_a_step_trains_has_a_share_of_the_norm() -> None:
    only_b = [spec for spec in specs() if spec.factor == "B"]
    assert len(PerFactor().groups(only_b)) == 1
    assert PerFactor().bound(1.0, 1) == 1.0
    assert PerFactor().bound(1.0, 2) == pytest.approx(1 / math.sqrt(2))


def test_other_factors_are_a_group_of_their_own() -> None:
    core = TensorSpec("R", (2, 2), "R", "encoder.layer.0.query.lora_R.default", "weight")
    assert PerFactor().groups([*specs(), core])[-1] == [core]


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("base_model.model.bert.encoder.layer.11.attention.self.query.lora_A.default", "11"),
        ("base_model.model.swin.encoder.layers.2.blocks.5.attention.query.lora_B.default", "2.blocks.5"),
        ("base_model.model.transformer.h.0", "0"),
    ],
)
def test_a_tensor_s_layer_is_the_innermost_numbered_block(module: str, layer: str) -> None:
    found = layer_of(TensorSpec("x", (1,), "A", module, "weight"))
    assert module.startswith(found)
    assert found.endswith(f".{layer}")


def test_what_has_no_number_is_its_own_layer() -> None:
    assert (
        layer_of(TensorSpec("x", (1,), "head", "base_model.model.classifier", "weight"))
        == "base_model.model.classifier"
    )


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=7),
    st.sampled_from([JOINT, PerFactor(), PerLayer()]),
    st.floats(0.05, 20.0),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_sums_are_those_of_a_loop_and_no_record_moves_them_by_more_than_the_norm(
    clients: list[int], clip: Clip, clip_norm: float, seed: int
) -> None:
    owners = Owners(np.array(sorted(clients)), CPU)
    gradients = random_gradients(len(clients), owners, seed)
    total = sum_in_groups(gradients, owners, clip_norm, clip, specs())
    sums = apart(total, {spec.name: spec.shape for spec in specs()})
    records = naive(gradients, clip, clip_norm)
    for name, clipped in records.items():
        expected = torch.zeros(len(owners.clients), *clipped.shape[1:], dtype=torch.float64)
        expected.index_add_(0, owners.place, clipped)
        torch.testing.assert_close(sums[name].double(), expected, rtol=2e-4, atol=1e-5 * clip_norm)
    for record in range(len(clients)):
        assert norm_of({name: clipped[record] for name, clipped in records.items()}) <= clip_norm * (1 + 1e-9)


@given(st.sampled_from([PerFactor(), PerLayer()]), st.floats(0.1, 10.0), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_removing_a_record_moves_the_sum_by_at_most_the_norm(clip: Clip, clip_norm: float, seed: int) -> None:
    whole, less = Owners(np.zeros(5, dtype=np.int64), CPU), Owners(np.zeros(4, dtype=np.int64), CPU)
    gradients = {name: dense(gradient) for name, gradient in random_gradients(5, whole, seed).items()}
    total = sum_in_groups(gradients, whole, clip_norm, clip, specs())
    rest = {name: gradient[1:] for name, gradient in gradients.items()}
    moved = (total - sum_in_groups(rest, less, clip_norm, clip, specs())).double().norm()
    assert float(moved) <= clip_norm * (1 + 1e-5)


def test_groups_each_at_the_whole_norm_would_break_the_bound() -> None:
    """The mistake of clipping A and B each at C: sqrt(2) C. What is offered instead reaches C, and no more."""

    class Careless(PerFactor):
        name = "careless"

        def bound(self, clip_norm: float, groups: int) -> float:
            return clip_norm

    factors = [spec for spec in specs() if spec.factor != "head"]
    gradients: dict[str, Gradient] = {spec.name: torch.full((1, *spec.shape), 10.0) for spec in factors}
    owners = Owners(np.array([0]), CPU)
    moved = {
        clip.name: float(sum_in_groups(gradients, owners, 1.0, clip, factors).norm())
        for clip in (Careless(), PerFactor(), JOINT)
    }
    assert moved["careless"] == pytest.approx(math.sqrt(2), rel=1e-4)
    assert moved["per-factor"] == pytest.approx(1.0, rel=1e-4)
    assert moved["joint"] == pytest.approx(1.0, rel=1e-4)


def test_joint_is_the_plain_sum_to_the_bit_and_without_a_norm_so_is_any_other() -> None:
    owners = Owners(np.array([0, 0, 1]), CPU)
    gradients = random_gradients(3, owners, 5)
    assert torch.equal(sum_in_groups(gradients, owners, 0.3, Joint(), specs()), sum_clipped(gradients, owners, 0.3))
    assert torch.equal(
        sum_in_groups(gradients, owners, None, PerLayer(), specs()), sum_clipped(gradients, owners, None)
    )


def test_a_gradient_that_is_not_finite_adds_nothing_to_its_group() -> None:
    owners = Owners(np.array([0, 0]), CPU)
    gradients = {name: dense(gradient) for name, gradient in random_gradients(2, owners, 3).items()}
    gradients["0.lora_A"][1, 0, 0] = float("nan")
    total = sum_in_groups(gradients, owners, 1.0, PerFactor(), specs())
    one = Owners(np.array([0]), CPU)
    first = sum_in_groups({name: gradient[:1] for name, gradient in gradients.items()}, one, 1.0, PerFactor(), specs())
    shapes = {spec.name: spec.shape for spec in specs()}
    torch.testing.assert_close(apart(total, shapes)["1.lora_A"], apart(first, shapes)["1.lora_A"])
    assert torch.isfinite(total).all()


@pytest.mark.parametrize("clip", [JOINT, PerFactor(), PerLayer()], ids=str)
def test_both_engines_give_the_same_sums(model: AdaptedModel, clip: Clip) -> None:
    state, records = random_state(model.specs), make_records()
    given_ = (state, records, BATCHES, list(model.specs), 0.05)
    ours = CohortEngine(model.to_batched(), CPU, "fp32", 32).clipped_sums(*given_, clip=clip)
    theirs = OpacusEngine(model, CPU, "fp32", 64).clipped_sums(*given_, clip=clip)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    groups = clip.groups(model.specs)
    for row, batch in enumerate(BATCHES):
        for group in groups:
            norm = norm_of({spec.name: ours[spec.name][row] for spec in group})
            assert norm <= len(batch) * 0.05 / math.sqrt(len(groups)) * (1 + 1e-5)


def test_without_saying_so_the_engines_clip_jointly(model: AdaptedModel) -> None:
    given_ = (random_state(model.specs), make_records(), BATCHES, list(model.specs), 0.05)
    engine = CohortEngine(model.to_batched(), CPU, "fp32", 32)
    plain, joint, other = (
        engine.clipped_sums(*given_, **how) for how in ({}, {"clip": Joint()}, {"clip": PerFactor()})
    )
    assert all(torch.equal(plain[name], joint[name]) for name in plain)
    assert any(not torch.allclose(plain[name], other[name], rtol=1e-2) for name in plain)


def test_a_real_model_s_factors_are_in_its_numbered_layers(tmp_path: Path) -> None:
    """Every adapted tensor of the tiny model is in one of its two layers."""
    factors = [spec for spec in make_model(tmp_path / "backbone").specs if spec.factor in ("A", "B")]
    assert sorted({layer_of(spec).rpartition(".")[2] for spec in factors}) == ["0", "1"]
