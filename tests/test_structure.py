"""Layers with a core, a second adapter and a mixer; other frozen weights; any state as a stock adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_lora import CPU, FAMILIES, LABELS, Family, all_inputs, gradients_alone, put_in, random_adapter, records_of
from test_lora import save as save_family
from test_lora import whole as whole_gradient
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from fedpipe.client.engine import CohortEngine
from fedpipe.client.raw import full_gradients
from fedpipe.client.reference import OpacusEngine
from fedpipe.config import LoraSettings
from fedpipe.errors import SettingsError
from fedpipe.files import write_json, write_tensors
from fedpipe.models.batched import Owners
from fedpipe.models.factors import GlobalState, LowRank, pairs
from fedpipe.models.layers import PLAIN, grid
from fedpipe.models.lora import AdaptedModel, build_model
from fedpipe.models.source import Backbone
from fedpipe.models.structure import Structure, context_of, core_name, exported, sparse_name
from fedpipe.models.task import TextClassification

CORE = Structure(core=True)
CONTEXT = Structure(context=True)
MIXED = Structure(context=True, mixer=True)
SPARSE = Structure(sparse=0.3)
RANK = 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("structures")


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def backbone(family: Family, directory: Path) -> Backbone:
    return save_family(family, directory / family.classifier.__name__)


@pytest.fixture(scope="module")
def bert(directory: Path) -> Backbone:
    return save_family(FAMILIES["bert"], directory / "bert for one")


def build(backbone: Backbone, structure: Structure = PLAIN, rank: int = RANK, **options: Any) -> AdaptedModel:
    lora = LoraSettings(rank=rank, alpha=2.0 * rank, **options)
    return build_model(backbone, TextClassification(LABELS), lora, 1, structure)


def logits(model: AdaptedModel, adapter: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """The outputs of a batched model with one adapter for all."""
    with torch.inference_mode():
        model.set_adapter(adapter)
        return model.forward(inputs).logits.clone()


def random_product(shape: tuple[int, int], rank: int, seed: int, size: float = 0.3) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        size * torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    )


# What layers compute


@pytest.mark.parametrize(
    ("structure", "factors"),
    [
        (CORE, {"lora_A.weight", "lora_B.weight", "lora_R.weight"}),
        (CONTEXT, {"lora_A.weight", "lora_B.weight", "context.lora_A.weight", "context.lora_B.weight"}),
        (
            MIXED,
            {"lora_A.weight", "lora_B.weight", "context.lora_A.weight", "context.lora_B.weight", "mixer.weight"},
        ),
        (SPARSE, {"lora_A.weight", "lora_B.weight", "sparse.weight"}),
    ],
)
def test_tensors_have_their_names_and_shapes(
    structure: Structure, factors: set[str], backbone: Backbone, family: Family
) -> None:
    model = build(backbone, structure)
    plain = build(backbone)
    layer = f"base_model.model.{family.adapted}"
    found = {spec.name.removeprefix(f"{layer}."): spec for spec in model.specs if spec.name.startswith(f"{layer}.")}
    assert set(found) == factors
    outputs, inputs = model.frozen_weight(layer).shape
    crossing = tuple(len(places) for places in grid(layer, (outputs, inputs), 0.3, 1))
    shapes = {"sparse": crossing, "lora_A": (2, inputs), "lora_B": (outputs, 2), "lora_R": (2, 2), "mixer": (2, inputs)}
    for name, spec in found.items():
        assert spec.shape == shapes[name.split(".")[-2]]
        assert spec.adapter == ("context" if name.startswith("context") else "default")
        assert not model.initial[spec.name].any() or spec.factor == "A"
    assert {spec.factor for spec in found.values()} == {"A", "B"} | ({"R"} if structure.core else set()) | (
        {"mixer"} if structure.mixer else set()
    ) | ({"sparse"} if structure.sparse else set())
    assert pairs(model.specs) == pairs(plain.specs)
    for name, tensor in plain.initial.items():
        assert torch.equal(model.initial[name], tensor)


def dense_layer(model: AdaptedModel, pair: Any, adapter: dict[str, Tensor], x: Tensor) -> Tensor:
    """An adapted layer as its card writes it, row by row."""
    product = pair.of(adapter)
    other = adapter.get(f"{pair.name}.context.lora_B.weight"), adapter.get(f"{pair.name}.context.lora_A.weight")
    core, mixer = adapter.get(core_name(pair)), adapter.get(f"{pair.name}.mixer.weight")
    layer = model.model.get_submodule(pair.name)
    rows = []
    for row in x:
        own = product.B @ (product.A @ row if core is None else core @ (product.A @ row))
        total = own
        if other[0] is not None:
            context = other[0] @ (other[1] @ row)
            g = torch.softmax(mixer @ row, 0) if mixer is not None else torch.ones(2)
            total = g[0] * own + g[1] * context
        bias = layer.base_layer.bias
        weight = model.frozen_weight(pair.name).clone()
        if sparse_name(pair) in adapter:
            weight[torch.meshgrid(*grid(pair.name, tuple(weight.shape), 0.3, 1), indexing="ij")] += adapter[
                sparse_name(pair)
            ]
        rows.append(weight @ row + bias + model.scale * total)
    return torch.stack(rows)


@pytest.mark.parametrize("structure", [PLAIN, CORE, CONTEXT, MIXED, SPARSE])
def test_a_layer_is_what_its_formula_says(structure: Structure, backbone: Backbone) -> None:
    model = build(backbone, structure)
    adapter, pair = random_adapter(model, 2, 0.5), pairs(model.specs)[0]
    put_in(model, adapter)
    x = torch.randn(7, pair.A.shape[1], generator=torch.Generator().manual_seed(0))
    twin = model.to_batched()
    twin.set_adapter(adapter)
    expected = dense_layer(model, pair, adapter, x)
    with torch.inference_mode():
        for whose in (model, twin):
            found = whose.model.get_submodule(pair.name)(x)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("structure", [CORE, CONTEXT, MIXED, SPARSE])
def test_a_structure_starts_without_changing_the_function(
    structure: Structure, backbone: Backbone, family: Family
) -> None:
    """Also when A and B have been trained: a context of zero adds nothing, and a mixer halves what there is."""
    model, plain = build(backbone, structure).to_batched(), build(backbone).to_batched()
    inputs, _ = all_inputs(records_of(family.pad))
    assert torch.equal(logits(model, model.initial, inputs), logits(plain, plain.initial, inputs))
    trained = {**model.initial, **random_adapter(plain)}
    if structure.core:
        trained |= {name: torch.eye(RANK) for name in trained if ".lora_R." in name}
    doubled = {n: 2 * t if structure.mixer and ".lora_B." in n else t for n, t in trained.items()}
    expected = logits(plain, {name: trained[name] for name in plain.initial}, inputs)
    torch.testing.assert_close(logits(model, doubled, inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("structure", [CORE, CONTEXT, MIXED, SPARSE])
def test_gradients_are_those_of_batches_of_one(structure: Structure, backbone: Backbone, family: Family) -> None:
    """Each record with an adapter of its own, in one padded batch, against a loop without padding."""
    model, records = build(backbone, structure), records_of(family.pad)
    adapters = [random_adapter(model, seed) for seed in range(len(records))]
    state = {name: torch.stack([adapter[name] for adapter in adapters]) for name in adapters[0]}
    active = [spec for spec in model.specs if spec.adapter == "default"]
    engine = CohortEngine(model.to_batched(), CPU, "fp32", 10_000)
    engine.model.set_adapter(state, Owners(np.arange(len(records)), CPU), active)
    gradients = engine._gradients(engine.model, *all_inputs(records))
    found = {name: whole_gradient(gradient) for name, gradient in gradients.items()}
    assert set(found) == {spec.name for spec in active}
    for record, expected in enumerate(gradients_alone(model, adapters, records)):
        for name, gradient in found.items():
            scale = float(expected[name].abs().max())
            assert scale > 0
            torch.testing.assert_close(
                gradient[record], expected[name], rtol=1e-4, atol=max(1e-5 * scale, 1e-8), msg=name
            )


@pytest.mark.parametrize("structure", [CORE, MIXED, SPARSE])
def test_both_engines_clip_and_sum_alike(structure: Structure, bert: Backbone) -> None:
    model = build(bert, structure, dropout=0.3)
    records, batches = [records_of(3), records_of(3, (4, 9))], [np.array([0, 2, 3]), np.array([0, 1])]
    state = {n: torch.stack([t, 2 * t]) for n, t in random_adapter(model, 4).items()}
    active = [spec for spec in model.specs if spec.adapter == "default"]
    seeds = [np.arange(len(part)) + 10 * row for row, part in enumerate(records)]
    engines = CohortEngine(model.to_batched(), CPU, "fp32", 64), OpacusEngine(model, CPU, "fp32", 64)
    first, second = (engine.clipped_sums(state, records, batches, active, 0.05, seeds) for engine in engines)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_mixer_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="it needs context"):
        Structure(mixer=True)


def test_a_core_larger_than_the_weight_is_refused(bert: Backbone) -> None:
    build(bert, CORE, rank=16)
    with pytest.raises(SettingsError, match=r"lora\.rank: found 17; '.*query' is 16 x 16, .* rank 16 at most"):
        build(bert, CORE, rank=17)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 40), share=st.floats(0.01, 1), seed=st.integers(0, 5))
def test_a_grid_has_its_share_of_a_weight(m: int, n: int, share: float, seed: int) -> None:
    rows, columns = grid("layer.0.query", (m, n), share, seed)
    for places, size in ((rows, m), (columns, n)):
        assert torch.equal(places, torch.unique(places))
        assert int(places[-1]) < size
        assert len(places) == max(1, round(size * share**0.5))
    again, other = grid("layer.0.query", (m, n), share, seed), grid("layer.0.value", (400, 400), share, seed)
    assert all(torch.equal(first, second) for first, second in zip((rows, columns), again, strict=True))
    third = grid("layer.1.query", (400, 400), share, seed)
    assert share > 0.98 or not torch.equal(other[0], third[0])


# Frozen weights


def test_products_are_added_to_the_frozen_weights_of_all_copies(backbone: Backbone, family: Family) -> None:
    model = build(backbone)
    before, inputs = model.to_batched(), all_inputs(records_of(family.pad))[0]
    adapter = random_adapter(model)
    pristine = {pair.name: model.frozen_weight(pair.name).clone() for pair in pairs(model.specs)}
    untouched = logits(before, adapter, inputs)
    own = {pair.name: pair.of(adapter) for pair in pairs(model.specs)}
    base = {name: random_product(tuple(product.shape), 3, 5) for name, product in own.items()}
    model.set_base(base)
    after = model.to_batched()
    shifted = logits(before, adapter, inputs)
    assert torch.equal(shifted, logits(after, adapter, inputs))
    wide = build(backbone, rank=RANK + 3).to_batched()  # the same scale, and room for both products
    tensors = {name: tensor for name, tensor in adapter.items() if name not in wide.initial or ".lora_" not in name}
    for pair in pairs(wide.specs):
        both = own[pair.name], base[pair.name]
        tensors |= {
            pair.A.name: torch.cat([product.A for product in both]),
            pair.B.name: torch.cat([product.B for product in both], dim=1),
        }
    torch.testing.assert_close(shifted, logits(wide, tensors, inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(shifted, untouched, atol=1e-3)
    for whose in (model, before, after):
        for name, weight in pristine.items():
            assert torch.equal(whose.frozen_weight(name), weight)
    first = next(iter(base))
    after.set_base({first: base[first]})  # the others are the backbone's again, whichever copy is asked
    assert not torch.equal(logits(before, adapter, inputs), shifted)
    model.set_base({})
    assert torch.equal(logits(before, adapter, inputs), untouched)
    stock = AutoModelForSequenceClassification.from_pretrained(backbone.path).state_dict()
    for name, weight in pristine.items():
        ours = stock[f"{name.removeprefix('base_model.model.')}.weight"]
        assert torch.equal(weight, ours.T if family is FAMILIES["gpt2"] else ours)


def test_gradients_of_frozen_weights_are_those_of_autograd(backbone: Backbone, family: Family) -> None:
    model, records = build(backbone), records_of(family.pad)
    adapter = random_adapter(model)
    found = full_gradients(model.to_batched(), adapter, records, CPU, 20)
    put_in(model, adapter)
    weights = {pair.name: model.model.get_submodule(pair.name).base_layer.weight for pair in pairs(model.specs)}
    for weight in weights.values():
        weight.requires_grad_(True)
    inputs, labels = all_inputs(records)
    mean = model.task.losses(model.forward(inputs), labels).mean()
    for (name, weight), gradient in zip(weights.items(), torch.autograd.grad(mean, [*weights.values()]), strict=True):
        weight.requires_grad_(False)
        expected = gradient.T if family is FAMILIES["gpt2"] else gradient
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)


# Export


@pytest.mark.parametrize("structure", [PLAIN, CORE, CONTEXT])
@pytest.mark.parametrize("more", [(), ("base",), ("base", "rest")])
def test_any_state_is_a_stock_adapter(
    structure: Structure, more: tuple[str, ...], backbone: Backbone, family: Family, tmp_path: Path
) -> None:
    model, records = build(backbone, structure), records_of(family.pad)
    adapter = {n: t for n, t in random_adapter(model, 3).items() if ".context." not in n}
    groups = {
        group: {
            pair.name: random_product((pair.B.shape[0], pair.A.shape[1]), 1 + number, number)
            for number, pair in enumerate(pairs(model.specs))
            if group == "base" or number
        }
        for group in more
    }
    state = GlobalState(adapter, **groups)
    tensors, rank, alpha = exported(model.specs, state, model.scale)
    write_tensors(tmp_path / "adapter_model.safetensors", tensors)
    write_json(tmp_path / "adapter_config.json", model.adapter_config(str(backbone.path), rank, alpha))
    stock = AutoModelForSequenceClassification.from_pretrained(backbone.path, num_labels=len(LABELS))
    stock.config.pad_token_id = model.model.config.pad_token_id
    loaded = PeftModel.from_pretrained(stock, tmp_path).eval()
    sums = [
        {name: LowRank(2 * product.B, product.A) for name, product in groups[group].items()} for group in more
    ]  # the scale of these models is 2, which `dense` below leaves to us
    for pair in pairs(model.specs):
        peft_layer = loaded.get_submodule(pair.name)
        dense = (
            model.scale * pair.of(adapter).dense()
            if not structure.core
            else model.scale * (adapter[pair.B.name] @ adapter[core_name(pair)] @ adapter[pair.A.name])
        )
        dense = dense + sum(group[pair.name].dense() for group in sums if pair.name in group)
        delta = peft_layer.get_delta_weight("default")
        delta = delta.T if family is FAMILIES["gpt2"] else delta
        torch.testing.assert_close(delta, dense, rtol=1e-5, atol=1e-5)
    if len(more) < 2:
        model.set_base(state.base)
        full = {spec.name: adapter.get(spec.name, torch.zeros(spec.shape)) for spec in model.specs}
        twin = model.to_batched()
        with torch.inference_mode():
            for record in range(len(records)):
                inputs, _ = records.batch(np.array([record]), CPU)
                expected = logits(twin, full, inputs)
                torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_plain_state_is_exported_as_it_is(bert: Backbone) -> None:
    model = build(bert)
    adapter = random_adapter(model)
    tensors, rank, alpha = exported(model.specs, GlobalState(adapter), model.scale)
    assert (rank, alpha) == (RANK, 2.0 * RANK)
    assert list(tensors) == sorted(adapter)
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in tensors.items())
    assert model.adapter_config("b") == model.adapter_config("b", rank, alpha)


@settings(max_examples=15, deadline=None)
@given(ranks=st.lists(st.integers(1, 12), min_size=4, max_size=4))
def test_an_export_has_no_higher_rank_than_the_weights(bert: Backbone, ranks: list[int]) -> None:
    model = build(bert)
    adapter = random_adapter(model)
    base = {pair.name: random_product((16, 16), r, r) for pair, r in zip(pairs(model.specs), ranks, strict=True)}
    rest = {pair.name: random_product((16, 16), r, 9 + r) for pair, r in zip(pairs(model.specs), ranks, strict=True)}
    tensors, rank, _ = exported(model.specs, GlobalState(adapter, base, rest), model.scale)
    assert rank == min(16, RANK + 2 * max(ranks))
    for pair in pairs(model.specs):
        expected = pair.of(adapter).dense() + base[pair.name].dense() + rest[pair.name].dense()
        assert tensors[pair.A.name].shape == (rank, 16)
        torch.testing.assert_close(pair.of(tensors).dense(), expected, rtol=1e-4, atol=1e-4)


def test_a_context_is_named_as_its_specs(bert: Backbone) -> None:
    model = build(bert, CONTEXT)
    names = {spec.name for spec in model.specs if spec.adapter == "context"}
    assert names == {name for pair in pairs(model.specs) for name in context_of(pair, pair.of(model.initial))}
