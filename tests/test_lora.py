"""Adapters on tiny random backbones of five families: names, twins, per-record gradients, export, start."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from fedpipe.client.engine import CohortEngine
from fedpipe.config import LoraSettings
from fedpipe.errors import DataError, SettingsError
from fedpipe.files import write_json, write_tensors
from fedpipe.models import batched
from fedpipe.models.batched import KeyedDropout, OuterProducts, Owners, PerClientLinear
from fedpipe.models.lora import AdaptedModel, build_model
from fedpipe.models.source import Backbone
from fedpipe.models.targets import head_modules
from fedpipe.models.task import Encoded, TextClassification

CPU = torch.device("cpu")
LABELS = ("bad", "good", "neither")
WORDS = 40
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@dataclass(frozen=True)
class Family:
    """A model family: how to make a tiny one, and what `auto` is to find in it."""

    classifier: type
    bare: type
    config: Any
    targets: tuple[str, ...]
    adapted: str  # where the first adapted module of the first layer is, below peft's prefix
    head: tuple[str, ...]
    pad: int = 3  # the tokenizer's, and not always what the config says


FAMILIES = {
    "bert": Family(
        BertForSequenceClassification,
        BertModel,
        BertConfig(vocab_size=WORDS, max_position_embeddings=32, pad_token_id=3, **SMALL),
        ("query", "value"),
        "bert.encoder.layer.0.attention.self.query",
        ("classifier.bias", "classifier.weight"),
    ),
    "roberta": Family(
        RobertaForSequenceClassification,
        RobertaModel,
        RobertaConfig(vocab_size=WORDS, max_position_embeddings=40, pad_token_id=1, **SMALL),
        ("query", "value"),
        "roberta.encoder.layer.0.attention.self.query",
        ("classifier.dense.bias", "classifier.dense.weight", "classifier.out_proj.bias", "classifier.out_proj.weight"),
        pad=1,
    ),
    "distilbert": Family(
        DistilBertForSequenceClassification,
        DistilBertModel,
        DistilBertConfig(vocab_size=WORDS, max_position_embeddings=32, dim=16, n_layers=2, n_heads=2, hidden_dim=32),
        ("q_lin", "v_lin"),
        "distilbert.transformer.layer.0.attention.q_lin",
        ("classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight"),
    ),
    "llama": Family(
        LlamaForSequenceClassification,
        LlamaModel,
        LlamaConfig(vocab_size=WORDS, max_position_embeddings=32, num_key_value_heads=1, **SMALL),
        ("q_proj", "v_proj"),
        "model.layers.0.self_attn.q_proj",
        ("score.weight",),
    ),
    "gpt2": Family(
        GPT2ForSequenceClassification,
        GPT2Model,
        GPT2Config(vocab_size=WORDS, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
        ("c_attn",),
        "transformer.h.0.attn.c_attn",
        ("score.weight",),
    ),
}


def save(family: Family, path: Path, bare: bool = False, seed: int = 0) -> Backbone:
    """Save a random model and a tokenizer of whole words; the bare one has no head."""
    torch.manual_seed(seed)
    config = type(family.config)(**{**family.config.to_dict(), "id2label": dict(enumerate(LABELS))})
    (family.bare if bare else family.classifier)(config).save_pretrained(path)
    vocabulary = {f"w{index}": index for index in range(WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w2"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"w{family.pad}").save_pretrained(path)
    return Backbone(path, "0" * 64, "tiny", {})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def backbone(family: Family, directory: Path) -> Backbone:
    return save(family, directory / family.classifier.__name__)


def build(backbone: Backbone, seed: int = 1, **options: Any) -> AdaptedModel:
    return build_model(backbone, TextClassification(LABELS), LoraSettings(rank=2, alpha=4.0, **options), seed)


@pytest.fixture(scope="module")
def model(backbone: Backbone) -> AdaptedModel:
    return build(backbone)


@pytest.fixture(scope="module")
def bert(directory: Path) -> Backbone:
    return save(FAMILIES["bert"], directory / "bert for one")


def records_of(pad: int, lengths: tuple[int, ...] = (5, 11, 3, 8, 8)) -> Encoded:
    """Records of different lengths, none with padding in it."""
    generator = np.random.default_rng(0)
    tokens = np.concatenate([generator.integers(4, WORDS, size) for size in lengths])
    return Encoded(tokens, np.cumsum([0, *lengths]), np.arange(len(lengths)) % len(LABELS), pad)


def random_adapter(model: AdaptedModel, seed: int = 0, scale: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {s.name: scale * torch.randn(s.shape, generator=generator) for s in model.specs}


def put_in(model: AdaptedModel, adapter: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Copy an adapter into the plain peft model; return its parameters by our names."""
    parameters = {s.name: model.model.get_submodule(s.module).get_parameter(s.parameter) for s in model.specs}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapter[name])
    return parameters


def all_inputs(records: Encoded) -> tuple[dict[str, Tensor], Tensor]:
    return records.batch(np.arange(len(records)), CPU)


# What is adapted


def test_auto_finds_query_and_value_of_every_layer(model: AdaptedModel, family: Family) -> None:
    adapted = sorted({spec.module.rsplit(".lora_", 1)[0] for spec in model.specs if spec.factor == "A"})
    first = family.adapted.rsplit(".", 1)[0]
    expected = [
        f"base_model.model.{first}.{t}".replace(".0.", f".{layer}.") for layer in (0, 1) for t in family.targets
    ]
    assert adapted == sorted(expected)


def test_factors_have_their_names_and_shapes(model: AdaptedModel, family: Family) -> None:
    specs = {spec.name: spec for spec in model.specs}
    assert list(specs) == sorted(specs)
    prefix = f"base_model.model.{family.adapted}"
    layer = model.model.get_base_model().get_submodule(family.adapted)
    a, b = specs[f"{prefix}.lora_A.weight"], specs[f"{prefix}.lora_B.weight"]
    assert (a.factor, a.shape) == ("A", (2, 16))
    assert (b.factor, b.shape) == ("B", (layer.out_features, 2))
    head = [spec.name for spec in model.specs if spec.factor == "head"]
    assert head == [f"base_model.model.{name}" for name in family.head]
    assert {spec.name for spec in model.specs if spec.factor == "A"} == {
        spec.name.replace("lora_B", "lora_A") for spec in model.specs if spec.factor == "B"
    }


def test_value_of_grouped_attention_is_narrower(directory: Path) -> None:
    llama = build(save(FAMILIES["llama"], directory / "grouped"))
    shapes = {spec.name.split(".")[-3]: spec.shape for spec in llama.specs if spec.factor == "B"}
    assert shapes == {"q_proj": (16, 2), "v_proj": (8, 2)}


def test_only_the_top_layers_are_adapted(backbone: Backbone, family: Family) -> None:
    specs = build(backbone, last_layers=1).specs
    factors = [spec.module for spec in specs if spec.factor != "head"]
    assert len(factors) == 2 * len(family.targets)
    assert all(".1." in module for module in factors)


def test_more_layers_than_there_are_is_refused(backbone: Backbone) -> None:
    with pytest.raises(SettingsError, match=r"lora\.last_layers: found 3; this backbone has 2 layers"):
        build(backbone, last_layers=3)


@pytest.mark.parametrize(("target", "said"), [("qurey", "did you mean 'query'"), ("qkv", "expected one of: .*query")])
def test_a_missing_target_is_answered_with_the_nearest(bert: Backbone, target: str, said: str) -> None:
    with pytest.raises(SettingsError, match=rf"lora\.targets: .* no linear layer named '{target}'; .*{said}") as caught:
        build(bert, targets=["value", target])
    assert "\n" not in str(caught.value)


def test_named_targets_are_adapted_and_no_others(bert: Backbone) -> None:
    specs = build(bert, targets=["key", "attention.output.dense"]).specs
    modules = {spec.module.split(".lora_")[0].split("layer.")[1][2:] for spec in specs if spec.factor == "A"}
    assert modules == {"attention.self.key", "attention.output.dense"}


# The batched twin


def test_the_twin_gives_the_logits_of_peft(model: AdaptedModel, family: Family) -> None:
    adapter, (inputs, _) = random_adapter(model), all_inputs(records_of(family.pad))
    put_in(model, adapter)
    twin = model.to_batched()
    with torch.inference_mode():
        expected = model.forward(inputs).logits
        twin.set_adapter(adapter)
        torch.testing.assert_close(twin.forward(inputs).logits, expected, rtol=1e-6, atol=1e-6)
        same = {name: tensor.expand(5, *tensor.shape) for name, tensor in adapter.items()}
        twin.set_adapter(same, Owners(np.arange(5), CPU))
        torch.testing.assert_close(twin.forward(inputs).logits, expected, rtol=1e-5, atol=1e-6)
    assert float(expected.std()) > 1e-3, "the logits should tell records apart"


def test_twins_share_the_backbone_and_not_the_adapter(model: AdaptedModel) -> None:
    first, second = model.to_batched(), model.to_batched()
    own = {tensor.data_ptr() for tensor in model.model.parameters()}
    assert {tensor.data_ptr() for tensor in first.model.parameters()} <= own
    first.set_adapter(random_adapter(model, 1))
    second.set_adapter(random_adapter(model, 2))
    spec = model.specs[0]
    held = [getattr(twin.model.get_submodule(spec.module), spec.parameter) for twin in (first, second)]
    assert not torch.equal(*held)


def gradients_alone(model: AdaptedModel, adapters: list[dict[str, Tensor]], records: Encoded) -> list[dict]:
    """Each record alone, unpadded, with plain autograd on the peft model."""
    gradients = []
    for record, adapter in enumerate(adapters):
        parameters = put_in(model, adapter)
        chosen = [parameter.requires_grad_(True) for parameter in parameters.values()]
        inputs, labels = records.batch(np.array([record]), CPU)
        loss = model.task.losses(model.forward(inputs), labels).sum()
        gradients.append(dict(zip(parameters, torch.autograd.grad(loss, chosen), strict=True)))
        for parameter in chosen:
            parameter.requires_grad_(False)
    return gradients


def whole(gradient: batched.Gradient) -> Tensor:
    """The records' gradients, also where only their factors are kept."""
    if isinstance(gradient, OuterProducts):
        return torch.einsum("nto,nti->noi", gradient.outputs, gradient.inputs)
    return gradient


def test_gradients_are_those_of_batches_of_one(model: AdaptedModel, family: Family) -> None:
    """Each record with an adapter of its own, in one padded batch, against a loop without padding."""
    records, engine = records_of(family.pad), CohortEngine(model.to_batched(), CPU, "fp32", 10_000)
    adapters = [random_adapter(model, seed) for seed in range(len(records))]
    state = {name: torch.stack([adapter[name] for adapter in adapters]) for name in adapters[0]}
    inputs, labels = all_inputs(records)
    own = Owners(np.arange(len(records)), CPU)
    engine.model.set_adapter(state, own, model.specs)
    found = {name: whole(gradient) for name, gradient in engine._gradients(engine.model, inputs, labels).items()}
    for record, expected in enumerate(gradients_alone(model, adapters, records)):
        for name, gradient in expected.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(found[name][record], gradient, rtol=1e-5, atol=max(1e-5 * scale, 1e-8))


def test_a_record_does_not_see_its_neighbours(model: AdaptedModel, family: Family) -> None:
    """Also where the config has another padding token than the tokenizer, or none: no record reads padding."""
    twin, records = model.to_batched(), records_of(family.pad)
    twin.set_adapter(random_adapter(model))
    with torch.inference_mode():
        together = twin.forward(all_inputs(records)[0]).logits
        for record in range(len(records)):
            alone = twin.forward(records.batch(np.array([record]), CPU)[0]).logits[0]
            torch.testing.assert_close(together[record], alone, rtol=1e-4, atol=1e-5)


def test_another_padding_token_in_the_config_does_no_harm(directory: Path) -> None:
    """A decoder that looked for the config's padding would classify at the end of the batch's longest record."""
    family = FAMILIES["llama"]
    path = save(family, directory / "two pads").path
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    model = build(Backbone(path, "0" * 64, "tiny", {}))
    test_a_record_does_not_see_its_neighbours(model, family)


def test_the_largest_module_is_the_backbone_where_the_prefix_names_none() -> None:
    """As in image classifiers on CLIP, whose prefix is that of a model of two towers."""

    class TwoTowers(nn.Module):
        base_model_prefix = "clip"

        def __init__(self) -> None:
            super().__init__()
            self.vision_model = nn.Linear(64, 64)
            self.pool = nn.Identity()
            self.classifier = nn.Linear(64, 2)

    assert head_modules(TwoTowers()) == ["classifier"]


# The layer itself


def test_a_shared_weight_is_a_plain_linear_layer() -> None:
    linear = nn.Linear(6, 4)
    layer = PerClientLinear(linear.weight.detach(), linear.bias.detach())
    inputs = torch.randn(3, 5, 6)
    torch.testing.assert_close(layer(inputs), linear(inputs))
    assert (layer.in_features, layer.out_features) == (6, 4)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [(), (5,), (2, 5)])
@pytest.mark.parametrize("windows", [1, 4])
def test_every_record_meets_its_clients_weight_folded_or_not(
    inner: tuple[int, ...], windows: int, outer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Window attention folds a record's windows into the batch axis; the gradient is the sum over them."""
    monkeypatch.setattr(batched, "outer_products_pay", lambda *shape: outer)
    generator = torch.Generator().manual_seed(0)
    weights, biases = torch.randn(2, 4, 6, generator=generator), torch.randn(2, 4, generator=generator)
    inputs = torch.randn(3 * windows, *inner, 6, generator=generator)
    clients, layer = np.array([0, 1, 1]), PerClientLinear(torch.empty(4, 6), torch.empty(4))
    layer.use({"weight": weights, "bias": biases}, Owners(clients, CPU), frozenset({"weight", "bias"}))
    outputs = layer(inputs)
    assert outputs.shape == (3 * windows, *inner, 4)
    factors = torch.randn(outputs.shape, generator=generator)
    found = layer.gradients(iter(torch.autograd.grad((outputs * factors).sum(), layer.taps)))
    assert isinstance(found["weight"], OuterProducts) is outer
    for record, client in enumerate(clients):
        own = slice(record * windows, (record + 1) * windows)
        w, b = weights[client].clone().requires_grad_(), biases[client].clone().requires_grad_()
        expected = nn.functional.linear(inputs[own], w, b)
        torch.testing.assert_close(outputs[own], expected)
        for name, theirs in zip(
            ("weight", "bias"), torch.autograd.grad((expected * factors[own]).sum(), (w, b)), strict=True
        ):
            torch.testing.assert_close(whole(found[name])[record], theirs)


@pytest.mark.parametrize("outer", [True, False])
def test_a_layer_that_is_used_twice_has_one_gradient(outer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of a sum is not the sum of norms: both uses count as one gradient, also with unequal rows."""
    monkeypatch.setattr(batched, "outer_products_pay", lambda *shape: outer)
    generator = torch.Generator().manual_seed(1)
    weights, first, second = (torch.randn(*shape, generator=generator) for shape in [(2, 4, 4), (2, 3, 4), (2, 7, 4)])
    layer = PerClientLinear(torch.empty(4, 4))
    layer.use({"weight": weights}, Owners(np.array([0, 1]), CPU), frozenset({"weight"}))
    total = layer(layer(first)).square().sum() + layer(second).sum()
    found = layer.gradients(iter(torch.autograd.grad(total, layer.taps)))
    for record in range(2):
        w = weights[record].clone().requires_grad_()
        expected = (first[record] @ w.T @ w.T).square().sum() + (second[record] @ w.T).sum()
        (theirs,) = torch.autograd.grad(expected, w)
        torch.testing.assert_close(whole(found["weight"])[record], theirs, rtol=1e-4, atol=1e-4)


def test_a_batch_that_is_no_multiple_of_the_records_is_refused() -> None:
    layer = PerClientLinear(torch.empty(4, 6))
    layer.use({"weight": torch.randn(2, 4, 6)}, Owners(np.array([0, 1]), CPU), frozenset())
    with pytest.raises(ValueError, match="a batch of 2 records met a layer as"):
        layer(torch.randn(3, 6))


# Start and export


def test_the_start_leaves_the_function_as_it_was(model: AdaptedModel, backbone: Backbone, family: Family) -> None:
    stock = family.classifier.from_pretrained(backbone.path).eval()
    stock.config.pad_token_id = family.pad  # records are padded, also alone
    twin, records = model.to_batched(), records_of(family.pad)
    twin.set_adapter(model.initial)
    with torch.inference_mode():
        for record in range(len(records)):
            inputs, _ = records.batch(np.array([record]), CPU)
            torch.testing.assert_close(twin.forward(inputs).logits, stock(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert all(not model.initial[spec.name].any() for spec in model.specs if spec.factor == "B")


def test_the_start_depends_on_the_seed_alone(backbone: Backbone, model: AdaptedModel) -> None:
    torch.manual_seed(987)
    again, other = build(backbone).initial, build(backbone, seed=2).initial
    for spec in model.specs:
        assert torch.equal(again[spec.name], model.initial[spec.name])
        assert torch.equal(other[spec.name], model.initial[spec.name]) == (spec.factor != "A")


def test_building_does_not_move_the_frozen_weights(backbone: Backbone, model: AdaptedModel, family: Family) -> None:
    stock = family.classifier.from_pretrained(backbone.path).state_dict()
    frozen = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor
        for name, tensor in model.model.state_dict().items()
        if ".lora_" not in name and "modules_to_save" not in name and "original_module" not in name
    }
    assert len(frozen) > 10
    for name, tensor in frozen.items():
        assert torch.equal(tensor, stock[name]), name


def test_a_is_drawn_as_peft_draws_it(directory: Path) -> None:
    wide = Family(
        BertForSequenceClassification,
        BertModel,
        BertConfig(vocab_size=WORDS, max_position_embeddings=32, **{**SMALL, "hidden_size": 256}),
        (),
        "",
        (),
    )
    model = build(save(wide, directory / "wide"))
    values = torch.cat([model.initial[spec.name].flatten() for spec in model.specs if spec.factor == "A"])
    bound = 1 / 16  # Kaiming uniform with a = sqrt(5): 1 / sqrt(in)
    assert float(values.abs().max()) <= bound
    assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.03)
    assert float(values.mean()) == pytest.approx(0, abs=bound / 20)


def test_a_head_in_the_file_is_kept(model: AdaptedModel, backbone: Backbone, family: Family) -> None:
    stock = family.classifier.from_pretrained(backbone.path)
    for name in family.head:
        assert torch.equal(model.initial[f"base_model.model.{name}"], stock.get_parameter(name))


def test_a_head_that_is_not_in_the_file_is_drawn_from_the_seed(family: Family, directory: Path) -> None:
    bare = save(family, directory / f"bare {family.bare.__name__}", bare=True)
    torch.manual_seed(1)
    first = build(bare).initial
    torch.manual_seed(2)
    again, other = build(bare).initial, build(bare, seed=7).initial
    for name in (f"base_model.model.{name}" for name in family.head):
        assert torch.equal(first[name], again[name])
        if name.endswith("bias"):
            assert not first[name].any()
        else:
            assert not torch.equal(first[name], other[name])
            assert float(first[name].std()) == pytest.approx(0.02, rel=0.4)


def test_a_head_for_other_labels_is_drawn_anew(bert: Backbone) -> None:
    model = build_model(bert, TextClassification(("yes", "no")), LoraSettings(rank=2), 1)
    assert model.initial["base_model.model.classifier.weight"].shape == (2, 16)
    torch.manual_seed(5)
    again = build_model(bert, TextClassification(("yes", "no")), LoraSettings(rank=2), 1)
    assert all(torch.equal(model.initial[name], again.initial[name]) for name in model.initial)


def test_frozen_weights_that_are_not_in_the_file_are_refused(directory: Path) -> None:
    """They would be drawn from the global generator: another function in every process, and after every restart."""
    path = directory / "no pooler"
    save(FAMILIES["bert"], path)
    BertModel(FAMILIES["bert"].config, add_pooling_layer=False).save_pretrained(path)
    with pytest.raises(DataError, match=r"no weights for 'bert\.pooler\.dense\.(bias|weight)'") as caught:
        build(Backbone(path, "0" * 64, "tiny", {}))
    assert "\n" not in str(caught.value)


def test_the_export_loads_with_stock_peft(
    model: AdaptedModel, backbone: Backbone, family: Family, tmp_path: Path
) -> None:
    adapter, records = random_adapter(model, seed=3), records_of(family.pad)
    write_tensors(tmp_path / "adapter_model.safetensors", adapter)
    write_json(tmp_path / "adapter_config.json", model.adapter_config(str(backbone.path)))
    stock = AutoModelForSequenceClassification.from_pretrained(backbone.path, num_labels=len(LABELS))
    stock.config.pad_token_id = family.pad
    loaded = PeftModel.from_pretrained(stock, tmp_path).eval()
    twin = model.to_batched()
    twin.set_adapter(adapter)
    with torch.inference_mode():
        for record in range(len(records)):
            inputs, _ = records.batch(np.array([record]), CPU)
            torch.testing.assert_close(loaded(**inputs).logits, twin.forward(inputs).logits, rtol=1e-5, atol=1e-6)


def test_dropout_is_ours_and_off_until_asked_for(backbone: Backbone, model: AdaptedModel, family: Family) -> None:
    dropping = build(backbone, dropout=0.5)
    assert dropping.has_dropout
    assert not model.has_dropout
    layers = [module.layer for module in dropping.model.modules() if isinstance(module, KeyedDropout)]
    assert len(set(layers)) == len(layers) == 2 * len(family.targets)
    twin, (inputs, _) = dropping.to_batched(), all_inputs(records_of(family.pad))
    adapter = random_adapter(model)
    twin.set_adapter(adapter)
    plain = model.to_batched()
    plain.set_adapter(adapter)
    with torch.inference_mode():
        torch.testing.assert_close(twin.forward(inputs).logits, plain.forward(inputs).logits)
        twin.use_dropout(torch.arange(5))
        assert not torch.allclose(twin.forward(inputs).logits, plain.forward(inputs).logits, atol=1e-4)
        twin.use_dropout(None)
        torch.testing.assert_close(twin.forward(inputs).logits, plain.forward(inputs).logits)
    assert not any(isinstance(module, nn.Dropout) and module.training for module in twin.model.modules())
