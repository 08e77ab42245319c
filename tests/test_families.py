"""Private gradients of every model family that fedpipe names, against one record at a time.

Each case is a tiny random model whose weights are all away from zero, with clients of
different adapters, batches of unequal size and one empty batch. The reference is the
unchanged peft model in double precision, given one record alone, without padding. Nothing
here looks into the engines: what holds is a property of the sums that they return.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForImageClassification, PreTrainedTokenizerFast

from fedpipe.client.batching import Budget
from fedpipe.client.engine import CohortEngine
from fedpipe.client.prefix import find_cut, read_prefix, same_with_prefix, skip_prefix, with_prefix, write_prefix
from fedpipe.client.reference import OpacusEngine
from fedpipe.config import LoraSettings
from fedpipe.errors import DataError, FedpipeError, SettingsError
from fedpipe.models.lora import AdaptedModel, TensorSpec, build_model
from fedpipe.models.source import Backbone
from fedpipe.models.task import Encoded, TextClassification

State = dict[str, Tensor]

CPU = torch.device("cpu")
ACTIVE = {
    "all": lambda spec: True,
    "B and head": lambda spec: spec.factor != "A",
    "A only": lambda spec: spec.factor == "A",
}
LABELS = ("bad", "good", "neither")
WORDS, PAD, END = 40, 3, 0
BATCHES = [np.array([0, 2, 3, 5]), np.array([], dtype=np.int64), np.array([4, 1]), np.array([3, 0, 1])]
LENGTHS = [(4, 7, 11, 3, 5, 9), (6, 2), (8, 8, 3, 6, 12), (10, 5, 2, 7)]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@dataclass(frozen=True)
class Family:
    """How to make a tiny model, and what to adapt in it; `name` is the prefix of the classes of transformers."""

    name: str
    config: dict[str, Any] = field(default_factory=lambda: SMALL)
    targets: Any = "auto"
    size: tuple[int, int] | None = None  # of an image, in pixels; None for text
    pooling: str = "default"
    folds: bool = False  # windows of a record into the batch axis


SWIN = {
    "image_size": (28, 20),  # 7 x 5 patches, then 4 x 3: neither can be cut into windows of three without padding
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 3,
    "mlp_ratio": 2.0,
}
PATCHES = {**SMALL, "image_size": (24, 16), "patch_size": 8}
ENDS = {"bos_token_id": END, "eos_token_id": END}
GPT2 = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, **ENDS}
GROUPED = {**SMALL, "num_key_value_heads": 1, "pad_token_id": PAD}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATED = [*PROJECTIONS, "gate_proj", "up_proj", "down_proj"]
PADDED = {**SMALL, "pad_token_id": PAD}
OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "pad_token_id": PAD, "eos_token_id": END}
T5 |= {"decoder_start_token_id": PAD}
BART = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
BART |= {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": PAD, **ENDS}
FNET = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "pad_token_id": PAD}
DEBERTA = {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}

FAMILIES = {
    "bert": Family("Bert"),
    "bert, all linear": Family("Bert", targets=["query", "key", "value", "dense"]),
    "bert, mean": Family("Bert", pooling="mean"),
    "roberta": Family("Roberta", PADDED),
    "roberta, all linear": Family("Roberta", PADDED, ["query", "key", "value", "dense"]),
    "distilbert": Family("DistilBert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}),
    "albert": Family("Albert", {**SMALL, "embedding_size": 8}, ["query", "value", "ffn"]),  # one layer, used twice
    "electra": Family("Electra", {**SMALL, "embedding_size": 8}),
    "mpnet": Family("MPNet", PADDED),
    "deberta-v2": Family("DebertaV2", DEBERTA, ["query_proj", "value_proj"]),
    "modernbert, mean": Family("ModernBert", PADDED, ["Wqkv", "Wi", "Wo"], pooling="mean"),
    "gpt2": Family("GPT2", GPT2),
    "gpt2, all linear": Family("GPT2", GPT2, ["c_attn", "c_fc", "c_proj"]),
    "gpt-neox": Family("GPTNeoX", {**SMALL, **ENDS}),
    "opt": Family("OPT", OPT),
    "bloom": Family("Bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2, "pad_token_id": PAD}),
    "t5": Family("T5", T5),
    "bart": Family("Bart", BART),
    "llama": Family("Llama", GROUPED),
    "llama, all linear": Family("Llama", GROUPED, GATED),
    "mistral": Family("Mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": Family("Qwen2", GROUPED),
    "gemma": Family("Gemma", {**GROUPED, "head_dim": 8}),
    "phi3": Family("Phi3", GROUPED, ["qkv_proj"]),
    "vit": Family("ViT", PATCHES, size=(24, 16)),
    "vit, all linear": Family("ViT", PATCHES, ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], (24, 16)),
    "deit": Family("DeiT", PATCHES, size=(24, 16)),
    "beit": Family(
        "Beit", {**PATCHES, "use_relative_position_bias": True, "layer_scale_init_value": 1.0}, size=(24, 16)
    ),
    "dinov2": Family("Dinov2", {**PATCHES, "image_size": 24, "mlp_ratio": 2}, size=(24, 24)),
    "swin": Family("Swin", SWIN, size=(28, 20), folds=True),
    "swin, all linear": Family("Swin", SWIN, [*PROJECTIONS, "fc1", "fc2", "reduction"], (28, 20), folds=True),
    "swinv2": Family("Swinv2", {**SWIN, "embed_dim": 16, "layer_norm_eps": 0.1}, size=(28, 20), folds=True),
}
# Backbones in which a record's gradient depends on its neighbours, so that no clip norm bounds it.
MIXING = {
    "deberta-v2, shared": Family("DebertaV2", {**DEBERTA, "share_att_key": True}, ["query_proj", "value_proj"]),
    "longformer": Family("Longformer", {**PADDED, "attention_window": 4}),  # both: positions before records
    "convbert": Family("ConvBert", {**SMALL, "embedding_size": 16}),  # these read the padding
    "fnet": Family("FNet", FNET, ["dense"]),
    "nystromformer": Family("Nystromformer", SMALL),
}


@dataclass(frozen=True)
class Images:
    """Image records of one size, with what an engine asks of records."""

    pixels: np.ndarray  # (records, 3, height, width), float32
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        return np.full(len(self), 6)

    @property
    def kinds(self) -> np.ndarray:
        return 2 * self.lengths + 1

    @classmethod
    def join(cls, parts: Sequence[Images]) -> Images:
        return cls(np.concatenate([part.pixels for part in parts]), np.concatenate([part.labels for part in parts]))

    def batch(self, records: np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        inputs = {"pixel_values": torch.from_numpy(self.pixels[records]).to(device)}
        return inputs, torch.from_numpy(self.labels[records]).to(device)


class ImageClassification(TextClassification):
    """A label for an image, with the architecture's own classifier."""

    def load(self, path: Path) -> tuple[nn.Module, set[str]]:
        model, info = AutoModelForImageClassification.from_pretrained(path, output_loading_info=True)
        return model.eval(), set(info["missing_keys"])


def save(family: Family, path: Path) -> Backbone:
    """Save a random model with no weight at the zero or one that it starts from."""
    torch.manual_seed(0)
    known = {} if family.size else {"vocab_size": WORDS, "max_position_embeddings": 40}
    config = getattr(transformers, f"{family.name}Config")(**{**known, **family.config}, num_labels=len(LABELS))
    kind = "ImageClassification" if family.size else "SequenceClassification"
    model = getattr(transformers, f"{family.name}For{kind}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"w{PAD}").save_pretrained(path)
    return Backbone(path, "0" * 64, "tiny", {})


def make_records(family: Family, seed: int = 0) -> list[Any]:
    """Return the records of every client; texts differ in length."""
    generator, records = np.random.default_rng(seed), []
    for lengths in LENGTHS:
        labels = generator.integers(len(LABELS), size=len(lengths))
        if family.size:
            pixels = generator.standard_normal((len(lengths), 3, *family.size), dtype=np.float32)
            records.append(Images(pixels, labels))
        else:
            tokens, offsets = generator.integers(4, WORDS, sum(lengths)), np.cumsum([0, *lengths])
            tokens[offsets[1:] - 1] = END
            records.append(Encoded(tokens, offsets, labels, PAD))
    return records


@dataclass
class Case:
    """A family's model, what the tests put in, and each record's true gradient."""

    model: AdaptedModel
    twin: AdaptedModel
    records: list[Any]
    state: State
    gradients: list[list[State]]  # client, record of its batch; float64

    def specs(self, active: str) -> list[TensorSpec]:
        return [spec for spec in self.model.specs if ACTIVE[active](spec)]

    def sums(
        self, clip: float | None = None, tokens: Budget | int = 10_000, precision: str = "fp32", **options: Any
    ) -> State:
        given = {"state": self.state, "records": self.records, "batches": BATCHES, "active": self.model.specs}
        return CohortEngine(self.twin, CPU, precision, tokens).clipped_sums(**{**given, **options}, clip_norm=clip)

    def apart(self) -> dict[str, Any]:
        """Return the same records, each of a client of its own, so that a sum is one record's gradient."""
        owners = [row for row, batch in enumerate(BATCHES) for _ in batch]
        return {
            "state": {name: tensor[owners] for name, tensor in self.state.items()},
            "records": [self.records[row] for row in owners],
            "batches": [np.array([record]) for batch in BATCHES for record in batch],
        }


def make_case(family: Family, path: Path, **options: Any) -> Case:
    task = (ImageClassification if family.size else TextClassification)(LABELS, family.pooling)
    rank = 2 if family.targets == "auto" else 6
    settings = LoraSettings(rank=rank, alpha=2.0 * rank, targets=family.targets, **options)
    model = build_model(save(family, path), task, settings, 1)
    generator = torch.Generator().manual_seed(0)
    state = {s.name: 0.2 * torch.randn(len(BATCHES), *s.shape, generator=generator) for s in model.specs}
    records = make_records(family)
    return Case(model, model.to_batched(), records, state, references(model, records, state))


def references(model: AdaptedModel, records: list[Any], state: State) -> list[list[State]]:
    """Return the gradient of each record of each batch, alone, in double precision, by plain autograd."""
    plain = copy.deepcopy(model.model).double()
    parameters = {s.name: plain.get_submodule(s.module).get_parameter(s.parameter) for s in model.specs}
    found: list[list[State]] = []
    for row, (encoded, batch) in enumerate(zip(records, BATCHES, strict=True)):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.requires_grad_(True).copy_(state[name][row])
        found.append([])
        for record in batch:
            inputs, labels = encoded.batch(np.array([record]), CPU)
            inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
            loss = functional.cross_entropy(plain.get_base_model()(**inputs).logits, labels)
            found[-1].append(dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True)))
    return found


def norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def clipped(gradients: list[State], specs: list[TensorSpec], clip: float) -> State:
    """Add one client's gradients up, each scaled to a joint norm of at most `clip`."""
    total = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in specs}
    for gradient in gradients:
        factor = min(1.0, clip / norm(gradient[spec.name] for spec in specs))
        total = {name: tensor + factor * gradient[name] for name, tensor in total.items()}
    return total


def difference(found: State, expected: State, row: int) -> float:
    """Return how far a client's sums are from the expected ones, relative to the norm of all of them."""
    return norm(found[name][row].double() - expected[name] for name in expected) / norm(expected.values())


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def case(name: str, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(FAMILIES[name], tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("active", ACTIVE)
def test_clipped_sums_are_those_of_a_loop(case: Case, active: str) -> None:
    """Whatever the micro-batches, among them those of one record and of all records."""
    specs = case.specs(active)
    norms = [norm(gradient[spec.name] for spec in specs) for row in case.gradients for gradient in row]
    clip = float(np.median(norms))
    assert 0.3 <= np.mean(np.array(norms) > clip) <= 0.7, "the clip should bite for about half of the records"
    for bound, tokens in ((math.inf, 30), (clip, 1), (clip, 30), (clip, Budget(10_000, start=10_000))):
        sums = case.sums(None if bound == math.inf else bound, tokens, active=specs)
        assert set(sums) == {spec.name for spec in specs}
        for row, gradients in enumerate(case.gradients):
            if gradients:
                assert difference(sums, clipped(gradients, specs, bound), row) < 1e-5
            else:
                assert all(not total[row].any() for total in sums.values())


def test_no_tensor_is_lost_among_the_others(case: Case) -> None:
    """The gradient of every single tensor is right, and not only those that make most of the norm."""
    sums = case.sums(tokens=30)
    for row, gradients in enumerate(case.gradients):
        for name, expected in (clipped(gradients, case.specs("all"), math.inf) if gradients else {}).items():
            assert norm([expected]) > 0, name
            assert norm([sums[name][row].double() - expected]) < 2e-5 * norm([expected]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("active", ACTIVE)
def test_a_clipped_record_has_exactly_the_clip_norm(case: Case, active: str, precision: str) -> None:
    """Then the norm that is clipped by is the norm of what is added, in full precision."""
    specs, clip = case.specs(active), 0.01
    sums = case.sums(clip, precision=precision, active=specs, **case.apart())
    for row, true in enumerate(norm(g[s.name] for s in specs) for gradients in case.gradients for g in gradients):
        added, zero = norm(tensor[row] for tensor in sums.values()), 1e-6  # what may keep a divisor from zero
        assert true > 3 * clip
        assert clip * true / (true + zero) * (1 - 1e-5) <= added <= clip * (1 + 1e-5)


def test_a_record_does_not_see_its_neighbours(case: Case, name: str) -> None:
    """Neither their contents, nor their adapters, nor one whose adapter has diverged."""
    given, others, mine = case.apart(), make_records(FAMILIES[name], seed=1), 1
    before = case.sums(0.5, **given)
    state = {}
    for key, tensor in given["state"].items():
        scales = torch.linspace(-2, 3, len(tensor))
        scales[mine], scales[-1] = 1.0, math.nan
        state[key] = tensor * scales.view(-1, *[1] * (tensor.dim() - 1))
    records = [own if row == mine else others[0] for row, own in enumerate(given["records"])]
    after = case.sums(0.5, **{**given, "records": records, "state": state})
    first, unchanged = ({key: tensor[row].double() for key, tensor in before.items()} for row in (0, mine))
    assert difference(after, unchanged, mine) < 2e-6
    assert difference(after, first, 0) > 0.1
    assert all(not tensor[-1].any() for tensor in after.values())


def test_sums_have_the_same_bits_in_any_batches(case: Case) -> None:
    """Of any number of records and clients."""
    given, (first, *others) = case.apart(), (1, 20, 40, 10_000)
    expected, alone = case.sums(0.5, first), case.sums(0.5, first, **given)
    for tokens in others:
        for found, known in ((case.sums(0.5, tokens), expected), (case.sums(0.5, tokens, **given), alone)):
            assert [name for name in known if not torch.equal(found[name], known[name])] == []


def test_autocast_is_close_and_sums_in_full_precision(case: Case) -> None:
    clip = float(np.median([norm(gradient.values()) for row in case.gradients for gradient in row]))
    rough, exact = (case.sums(clip, 30, precision) for precision in ("bf16", "fp32"))
    for row, gradients in enumerate(case.gradients):
        expected = {name: tensor[row].double() for name, tensor in exact.items()}
        assert all(tensor.dtype == torch.float32 for tensor in rough.values())
        if gradients:
            assert 1e-5 < difference(rough, expected, row) < 0.1, "not bf16, or not the same function"


def test_opacus_gives_the_same_sums_or_none(case: Case, name: str) -> None:
    """Opacus takes every window for a record, and must not get away with it."""
    specs, clip = case.specs("all"), 1.0
    engine = OpacusEngine(case.model, CPU, "fp32", Budget(30))
    if FAMILIES[name].folds:
        with pytest.raises((FedpipeError, RuntimeError)):
            engine.clipped_sums(case.state, case.records, BATCHES, specs, clip)
        return
    sums = engine.clipped_sums(case.state, case.records, BATCHES, specs, clip)
    for row, gradients in enumerate(case.gradients):
        if gradients:
            assert difference(sums, clipped(gradients, specs, clip), row) < 1e-5


@pytest.mark.parametrize("name", ["bert, all linear", "albert", "gpt2", "vit", "swin, all linear"])
def test_dropout_does_not_see_the_neighbours(name: str, tmp_path: Path) -> None:
    """What a record drops is the same in a batch with others, and in a batch of its own."""
    case = make_case(FAMILIES[name], tmp_path, dropout=0.3)
    given = case.apart()
    seeds = [np.arange(len(records)) + 100 * row for row, records in enumerate(given["records"])]
    alone, together = (case.sums(1.0, tokens, **given, seeds=seeds) for tokens in (1, 10_000))
    for row in range(len(seeds)):
        expected = {name: tensor[row].double() for name, tensor in alone.items()}
        assert difference(together, expected, row) < 1e-5
        assert difference(case.sums(1.0, **given), expected, row) > 1e-3


@pytest.fixture
def check_apart() -> Callable[..., None]:
    return importlib.import_module("fedpipe.client.apart").check_apart


def test_families_keep_records_apart(case: Case, check_apart: Callable[..., None]) -> None:
    for records in case.records:
        check_apart(case.twin, records, CPU)


@pytest.mark.parametrize("name", MIXING)
def test_backbones_that_mix_records_are_refused(name: str, tmp_path: Path, check_apart: Callable[..., None]) -> None:
    """Shapes fit, and the sums look sound; they would be private for nobody."""
    case = make_case(MIXING[name], tmp_path)
    for records in case.records:
        with pytest.raises(SettingsError, match=r"model\.backbone: .* depends on the other records") as caught:
            check_apart(case.twin, records, CPU)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bert", "mpnet", "deberta-v2", "modernbert, mean", "gpt2", "llama", "mistral"])
def test_a_kept_prefix_changes_nothing_or_is_not_used(name: str, tmp_path: Path) -> None:
    """Some backbones ask their layers for more than hidden states; that must be no crash."""
    case = make_case(FAMILIES[name], tmp_path, last_layers=1)
    cut = find_cut(case.model.specs)
    assert cut is not None
    case.twin.set_adapter(case.model.initial)
    write_prefix([case.twin], cut, Encoded.join(case.records), tmp_path / "prefix.npy", CPU, "fp32", Budget(30))
    rows = read_prefix(tmp_path / "prefix.npy")
    assert rows is not None
    kept = with_prefix({str(row): records for row, records in enumerate(case.records)}, rows)
    cut_model = case.model.to_batched()
    skip_prefix(cut_model, cut)
    if same_with_prefix(case.twin, cut_model, kept["0"], CPU):
        sums = replace(case, twin=cut_model).sums(1.0, 30, records=list(kept.values()))
        whole = case.sums(1.0, 1)
        assert all(torch.equal(sums[name], whole[name]) for name in whole)  # and not only nearly
        for row, gradients in enumerate(case.gradients):
            if gradients:
                assert difference(sums, clipped(gradients, case.specs("all"), 1.0), row) < 1e-5
    else:
        assert name == "deberta-v2"


def test_a_head_with_a_norm_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"head.*not in a linear layer"):
        make_case(Family("ModernBert", PADDED, ["Wqkv"]), tmp_path)


@pytest.mark.parametrize(
    ("family", "known"),
    [("DebertaV2", ["query_proj", "value_proj"]), ("Phi3", ["qkv_proj"]), ("ModernBert", ["Wqkv"])],
)
def test_auto_knows_fused_and_renamed_projections(family: str, known: list[str], tmp_path: Path) -> None:
    options = {"pooling": "mean"} if family == "ModernBert" else {}
    case = make_case(Family(family, PADDED, **options), tmp_path)
    assert {spec.name.split(".")[-3] for spec in case.model.specs if spec.factor == "A"} == set(known)


def test_records_of_another_kind_are_pooled_by_their_own_class(tmp_path: Path) -> None:
    """An engine that asks `Encoded` to join records cannot take a task whose records are no texts."""
    case = make_case(FAMILIES["vit"], tmp_path)
    sums = case.sums(1.0)
    assert difference(sums, clipped(case.gradients[0], case.specs("all"), 1.0), 0) < 1e-5
