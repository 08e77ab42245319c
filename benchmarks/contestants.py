"""The private step and what it is measured against, on the same records, adapters and backbone.

Each contestant is a function without arguments that does one local step's gradient work for
all clients: `cohort` is fedpipe's; `plain` is the floor, ordinary non-private training of one
shared adapter on the pooled records; the Opacus ones go client by client, as every other
simulation does, with the model wrapped once.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from benchmarks.harness import demo_backbone, demo_reviews
from fedpipe.client.batching import Budget, micro_batches
from fedpipe.client.clipping import clip_factors
from fedpipe.client.engine import CohortEngine, autocast
from fedpipe.client.memory import find_budget
from fedpipe.client.parallel import in_turn, workers_on
from fedpipe.config import LoraSettings
from fedpipe.models.frozen import speed_up
from fedpipe.models.lora import AdaptedModel, TensorSpec, build_model
from fedpipe.models.source import Backbone
from fedpipe.models.task import Encoded, TextClassification, load_tokenizer

CLIP = 1.0
LABELS = ("rotten", "fresh")
ONE_BATCH = Budget(10**9, start=10**9)


@dataclass(frozen=True)
class Work:
    """One local step: `batches[i]` are the chosen ones of client i's `records[i]`."""

    model: AdaptedModel
    records: Sequence[Encoded]
    batches: Sequence[np.ndarray]
    state: dict[str, Tensor]
    active: Sequence[TensorSpec]
    budget: Budget
    device: torch.device
    precision: str = "fp32"

    def pooled(self) -> tuple[Encoded, np.ndarray]:
        starts = np.cumsum([0, *map(len, self.records)])
        chosen = [batch + start for batch, start in zip(self.batches, starts, strict=False)]
        return Encoded.join(self.records), np.concatenate(chosen)


def minilm(last_layers: int | None = None) -> AdaptedModel:
    """The demo's backbone with the demo's adapter."""
    return _build(demo_backbone(), "mean", last_layers)


def roberta_base(directory: Path) -> AdaptedModel:
    """A model of RoBERTa-base's shape with random weights; speed does not depend on them."""
    if not (directory / "config.json").exists():
        torch.manual_seed(0)
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, num_labels=2, type_vocab_size=1)
        RobertaForSequenceClassification(config).save_pretrained(directory)
        # Its own tokenizer needs files that are in no package; another one's numbers are as long.
        load_tokenizer(demo_backbone()).save_pretrained(directory)
    return _build(directory, "default", None)


def _build(path: Path, pooling: str, last_layers: int | None) -> AdaptedModel:
    settings = LoraSettings(rank=8, alpha=8.0, last_layers=last_layers)
    return build_model(Backbone(path, "0" * 64, path.name, {}), TextClassification(LABELS, pooling), settings, seed=1)


def reviews(count: int, length: int | None) -> Encoded:
    """Return real texts, ragged, or records of exactly `length` tokens made of them."""
    texts, labels = demo_reviews()
    chosen = np.random.default_rng(0).permutation(len(texts))[:count]
    rows = {"text": [texts[i] for i in chosen], "label": [LABELS[labels[i]] for i in chosen]}
    encoded = TextClassification(LABELS).encode(Dataset.from_dict(rows), load_tokenizer(demo_backbone()), 64)
    if length is None:
        return encoded
    tokens = np.resize(encoded.tokens, len(encoded) * length)
    return Encoded(tokens, np.arange(len(encoded) + 1) * length, encoded.labels, encoded.pad)


def make_work(
    model: AdaptedModel,
    clients: int,
    batch: int,
    length: int | None,
    device: torch.device,
    precision: str = "fp32",
    factors: str | None = None,
) -> Work:
    """Make a step of `clients` clients whose Poisson batches have `batch` records on average.

    `factors` names the factor that is active beside the head, `A` or `B`; None for both.
    """
    each, generator = max(64, 2 * batch), np.random.default_rng(1)
    pool = reviews(clients * each, length) if clients * each <= 12000 else reviews(12000, length)
    records = [_take(pool, np.arange(i * each, (i + 1) * each) % len(pool)) for i in range(clients)]
    batches = [np.flatnonzero(generator.random(each) < batch / each) for _ in range(clients)]
    state = {
        spec.name: (model.initial[spec.name] + 0.02 * torch.randn(clients, *spec.shape)).to(device)
        for spec in model.specs
    }
    active = [spec for spec in model.specs if factors is None or spec.factor in (factors, "head")]
    model.model.to(device)
    budget = find_budget("auto", model.to_batched(), records[0], device, precision)
    return Work(model, records, batches, state, active, budget, device, precision)


def _take(records: Encoded, chosen: np.ndarray) -> Encoded:
    rows = [records.tokens[records.offsets[i] : records.offsets[i + 1]] for i in chosen]
    return Encoded(np.concatenate(rows), np.cumsum([0, *map(len, rows)]), records.labels[chosen], records.pad)


def cohort(work: Work) -> Callable[[], Any]:
    """fedpipe: all clients at once, clipped and summed client by client."""
    models = [work.model.to_batched() for _ in range(workers_on(work.device))]
    engine = CohortEngine(models, work.device, work.precision, work.budget)
    return lambda: engine.clipped_sums(work.state, work.records, work.batches, work.active, CLIP)


def plain(work: Work, stock: bool = False) -> Callable[[], Any]:
    """The floor: one shared adapter, no privacy; the same micro-batches, on as many threads, by the same products.

    `stock` leaves the frozen layers as PyTorch has them.
    """
    pool, chosen = work.pooled()
    models = [_trainable(work) for _ in range(workers_on(work.device))]
    for twin, _ in models if not stock else []:
        speed_up(twin.model)

    def one(worker: tuple[AdaptedModel, list[Tensor]], part: np.ndarray) -> tuple[Tensor, ...]:
        model, parameters = worker
        inputs, labels = pool.batch(chosen[part], work.device)
        with autocast(work.device, work.precision):
            outputs = model.forward(inputs)
        return torch.autograd.grad(model.task.losses(outputs, labels).sum(), parameters)

    def step() -> list[Tensor]:
        # Nobody asks it for the same bytes in other batches, so it may mix widths where that is faster.
        budget = replace(work.budget, start=work.budget.start or 64)
        parts = list(micro_batches(pool.kinds[chosen], budget))
        return [sum(column) for column in zip(*in_turn(one, models, parts), strict=True)]

    return step


def _trainable(work: Work) -> tuple[AdaptedModel, list[Tensor]]:
    """Return a peft model that shares the backbone's weights but not the adapter's, and its trainable parameters."""
    own = {id(_parameter(work.model, spec)) for spec in work.model.specs}
    shared = [*work.model.model.parameters(), *work.model.model.buffers()]
    inner = copy.deepcopy(work.model.model, {id(tensor): tensor for tensor in shared if id(tensor) not in own})
    twin = AdaptedModel(inner, work.model.task, work.model.specs, work.model.initial)
    return twin, [_parameter(twin, spec).requires_grad_(True) for spec in work.active]


def _parameter(model: AdaptedModel, spec: TensorSpec) -> nn.Parameter:
    return model.model.get_submodule(spec.module).get_parameter(spec.parameter)


def opacus_hooks(work: Work) -> Callable[[], Any]:
    """Opacus' per-record gradients, client by client; each batch padded to its own longest record."""
    return _client_by_client(work, lambda model: GradSampleModule(model, loss_reduction="sum"), _hooked)


def opacus_ghost(work: Work) -> Callable[[], Any]:
    """Opacus' ghost clipping, client by client: norms in one backward pass, the clipped sum in a second."""

    def wrap(model: nn.Module) -> nn.Module:
        return GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=CLIP)

    return _client_by_client(work, wrap, _ghosted)


def _client_by_client(
    work: Work, wrap: Callable[[nn.Module], nn.Module], differentiate: Callable[[nn.Module, Tensor, list], list[Tensor]]
) -> Callable[[], Any]:
    plain_model, parameters = _trainable(work)
    for spec in work.active:
        # Opacus' hooks are silent in evaluation mode; a linear layer is the same in both.
        plain_model.model.get_submodule(spec.module).train()
    hooked = wrap(plain_model.model.get_base_model())

    def step() -> list[list[Tensor]]:
        # torch warns that hooks see no gradient of the (integer) inputs.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        sums = []
        for row, (records, batch) in enumerate(zip(work.records, work.batches, strict=True)):
            with torch.no_grad():
                for spec in work.model.specs:
                    _parameter(plain_model, spec).copy_(work.state[spec.name][row])
            if not len(batch):
                continue
            inputs, labels = records.batch(batch, work.device)
            with autocast(work.device, work.precision):
                outputs = hooked(**inputs)
            sums.append(differentiate(hooked, work.model.task.losses(outputs, labels), parameters))
        return sums

    return step


def _hooked(hooked: nn.Module, losses: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    losses.sum().backward()
    samples = [parameter.grad_sample for parameter in parameters]
    norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples]).norm(dim=0)
    factors = clip_factors(norms, CLIP)
    sums = [torch.einsum("n,n...->...", factors, sample) for sample in samples]
    for parameter in parameters:
        parameter.grad = parameter.grad_sample = None
    return sums


def _ghosted(hooked: nn.Module, losses: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    losses.sum().backward(retain_graph=True)
    factors = clip_factors(hooked.get_norm_sample(), CLIP)
    hooked.disable_hooks()
    for parameter in parameters:
        parameter.grad = None
    (losses * factors).sum().backward()
    sums = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
        del parameter._norm_sample
    hooked.enable_hooks()
    return sums


CONTESTANTS: dict[str, Callable[[Work], Callable[[], Any]]] = {
    "plain": plain,
    "plain stock": lambda work: plain(work, stock=True),
    "cohort": cohort,
    "opacus hooks": opacus_hooks,
    "opacus ghost": opacus_ghost,
}
