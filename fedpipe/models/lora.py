"""A frozen backbone with LoRA adapters (Hu et al. 2021), injected by peft, and their tensors by name.

The adapter's tensors are named as in the file that peft writes, so that a state of ours is
an adapter that stock peft loads. In the module tree, only the layers that hold trainable
tensors are replaced, by their per-client twins; backbone code is untouched.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from fedpipe.config import LoraSettings
from fedpipe.errors import DataError, SettingsError
from fedpipe.models.batched import Copier, Gradient, KeyedDropout, Owners, PerClientLinear, always_copied
from fedpipe.models.frozen import speed_up
from fedpipe.models.layers import CONTEXT, MAIN, PLAIN, Structure, TensorSpec, frozen_weight, restructure, spec_of
from fedpipe.models.source import Backbone
from fedpipe.models.targets import head_modules, resolve_targets, top_layers
from fedpipe.models.task import Task

if TYPE_CHECKING:
    from fedpipe.models.factors import LowRank


class AdaptedModel:
    """A backbone whose adapter is given from outside: one for all records, or one for each client.

    Parameters
    ----------
    model : the backbone with peft's layers in it
    specs : the adapter's tensors, in the order of their names
    initial : the adapter that leaves the backbone's function as it was (B = 0)
    """

    def __init__(self, model: PeftModel, task: Task, specs: Sequence[TensorSpec], initial: dict[str, Tensor]) -> None:
        self.model = model
        self.task = task
        self.specs = tuple(specs)
        self.initial = initial
        self.hidden: Tensor | None = None
        self._twins: dict[str, PerClientLinear] = {}
        self._pristine: dict[str, Tensor] = {}
        self._by_module = {spec.module: [s for s in specs if s.module == spec.module] for spec in specs}
        self._active: tuple[TensorSpec, ...] = ()
        self._records = 0

    def to_batched(self) -> AdaptedModel:
        """Return a copy that shares the backbone's weights and takes its adapter through `set_adapter`."""
        shared = {id(tensor): tensor for tensor in [*self.model.parameters(), *self.model.buffers()]}
        twin = AdaptedModel(copy.deepcopy(self.model, shared), self.task, self.specs, self.initial)
        for module in dict.fromkeys(spec.module for spec in self.specs):
            layer = twin.model.get_submodule(module)
            replacement = PerClientLinear(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
            parent, _, child = module.rpartition(".")
            setattr(twin.model.get_submodule(parent), child, replacement)
            twin._twins[module] = replacement
        twin._pristine = self._pristine
        speed_up(twin.model)
        return twin

    def copier(self, tensors: Mapping[str, Tensor]) -> Copier:
        """Return what makes copies of the clients' small tensors, for `set_adapter`."""
        small = {module for module, specs in self._by_module.items() if always_copied(_weight(specs).shape)}
        return Copier({spec.name: tensors[spec.name] for spec in self.specs if spec.module in small})

    def set_adapter(
        self,
        tensors: Mapping[str, Tensor],
        owners: Owners | None = None,
        active: Sequence[TensorSpec] = (),
        copies: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Use these tensors. Batched models only.

        Parameters
        ----------
        tensors : name -> each of its spec's shape, or with `owners` (clients, *shape)
        owners : which client each record of the next batch belongs to; None for one adapter for all
        active : the tensors that `record_gradients` is for; no gradient of any other is computed
        copies : of the small tensors, made by `copier` for these owners; otherwise layers make their own
        """
        self._active = tuple(active)
        self._records = 0 if owners is None else len(owners)
        for module, specs in self._by_module.items():
            trained = frozenset(spec.parameter for spec in specs if spec in self._active)
            own = {spec.parameter: copies[spec.name] for spec in specs if copies and spec.name in copies}
            self._twins[module].use({spec.parameter: tensors[spec.name] for spec in specs}, owners, trained, own)

    def record_gradients(self, total: Tensor) -> dict[str, Gradient]:
        """Return the n records' gradients of each active tensor, by name; `total` is the sum of their losses."""
        layers = {spec.module: self._twins[spec.module] for spec in self._active}
        taps = [tap for layer in layers.values() for tap in layer.taps]
        found = iter(torch.autograd.grad(total, taps, allow_unused=True, materialize_grads=True))
        gradients = {module: layer.gradients(found) for module, layer in layers.items()}
        # A layer that took no part in the pass has no gradient; that of the tensor is zero.
        return {
            spec.name: gradients[spec.module][spec.parameter]
            if spec.parameter in gradients[spec.module]
            else total.new_zeros(self._records, *spec.shape)
            for spec in self._active
        }

    @property
    def scale(self) -> float:
        """s in W + s B A."""
        config = self.model.peft_config[MAIN]
        return config.lora_alpha / config.r

    def frozen_weight(self, pair: str) -> Tensor:
        """Return the weight of a layer as the backbone has it, (out, in), given the name of its pair of factors."""
        return self._pristine.get(pair, frozen_weight(self.model.get_submodule(pair)))

    @torch.no_grad()
    def set_base(self, deltas: Mapping[str, LowRank]) -> None:
        """Make the frozen weight of each adapted layer W + s B A for the given products, and W for all others.

        All models that share the backbone's weights have them, so nothing may be computing meanwhile.
        Without products the weights are the backbone's again, bit for bit.

        Parameters
        ----------
        deltas : pair's name -> B (out, any rank) and A (any rank, in)
        """
        for pair in {**self._pristine, **deltas}:
            weight = frozen_weight(self.model.get_submodule(pair))
            pristine = self._pristine.setdefault(pair, weight.clone())
            if pair not in deltas:
                weight.copy_(pristine)
                continue
            left, right = (factor.to(weight.device, torch.float64) for factor in (deltas[pair].B, deltas[pair].A))
            weight.copy_(pristine + self.scale * (left @ right))

    @property
    def has_dropout(self) -> bool:
        return bool(self._dropouts)

    @cached_property
    def _dropouts(self) -> list[KeyedDropout]:
        return [module for module in self.model.modules() if isinstance(module, KeyedDropout)]

    def use_dropout(self, seeds: Tensor | None) -> None:
        """Drop adapter inputs by these seeds, (n,) int64, one for each record; None turns dropout off."""
        for module in self._dropouts:
            module.seeds = seeds

    def forward(self, inputs: Mapping[str, Tensor]) -> Any:
        """Return the backbone's outputs; `hidden` among the inputs is for models that skip their frozen layers."""
        self.hidden = inputs.get("hidden")
        return self.model.get_base_model()(**{name: value for name, value in inputs.items() if name != "hidden"})

    def adapter_config(self, backbone: str, rank: int | None = None, alpha: float | None = None) -> dict[str, Any]:
        """Return the content of peft's `adapter_config.json`, naming `backbone` as the base model.

        `rank` and `alpha` are the settings' unless given: those of an adapter that holds more than its own factors.
        """
        config = self.model.peft_config[MAIN].to_dict()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        heads = sorted({spec.name.split(".")[2] for spec in self.specs if spec.factor == "head"})
        known = {
            "base_model_name_or_path": backbone,
            "inference_mode": True,
            "revision": None,
            "modules_to_save": heads,
        }
        if rank is not None:
            known |= {"r": rank}
        if alpha is not None:
            known |= {"lora_alpha": alpha}
        return plain | known


def _weight(specs: Sequence[TensorSpec]) -> TensorSpec:
    return next(spec for spec in specs if spec.parameter == "weight")


def positions(model: nn.Module) -> int | None:
    """Return how many tokens a backbone has positions for; None if it does not count them."""
    return getattr(model.config, "max_position_embeddings", None)


def build_model(
    backbone: Backbone, task: Task, settings: LoraSettings, seed: int, structure: Structure = PLAIN
) -> AdaptedModel:
    """Load a backbone and put LoRA on it; the start depends on `seed` alone.

    `structure` is what the layers have beside the two factors; it starts at zero, and so leaves the
    function as it was.

    Raises
    ------
    SettingsError
        A target module does not exist, or the rank or the layers do not fit the backbone.
    DataError
        The backbone cannot be loaded.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    base, missing = task.load(backbone.path)
    head = head_modules(base)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=resolve_targets(base, settings.targets),
        layers_to_transform=top_layers(base, settings.last_layers),
        modules_to_save=head,
        bias="none",
    )
    fresh_head = {name for name in missing if name.split(".", 1)[0] in head}
    if lost := sorted(missing - fresh_head):
        raise DataError(
            f"{backbone.path}: has no weights for '{lost[0]}', which is not trained and would be random in every "
            "process; use a backbone that was saved with them"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of its own bookkeeping (fan_in_fan_out, missing head keys)
        try:
            model = get_peft_model(base, config)
        except ValueError as error:
            raise SettingsError(f"lora: {str(error).splitlines()[0]}") from error
    restructure(model, structure, seed)
    model.eval().requires_grad_(False)
    _key_dropout(model, settings.dropout)
    specs = _specs(model)
    return AdaptedModel(model, task, specs, _initial(model, specs, fresh_head, seed, base.config))


def _key_dropout(model: PeftModel, probability: float) -> None:
    if probability > 0:
        for number, layer in enumerate(module for module in model.modules() if hasattr(module, "lora_dropout")):
            layer.lora_dropout["default"] = KeyedDropout(probability, number)


def _specs(model: PeftModel) -> list[TensorSpec]:
    specs = []
    for path, parameter in model.named_parameters():
        spec = spec_of(path, tuple(parameter.shape))
        if spec is None:
            continue
        if not isinstance(model.get_submodule(spec.module), nn.Linear):
            raise DataError(f"the head's tensor '{path}' is not in a linear layer; such a head cannot be trained yet")
        specs.append(spec)
    return sorted(specs, key=lambda spec: spec.name)


def _initial(
    model: PeftModel, specs: Sequence[TensorSpec], fresh_head: set[str], seed: int, config: Any
) -> dict[str, Tensor]:
    """Draw A (Kaiming uniform, as peft does) and what of the head was not in the backbone's file; B is zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in specs:
        if spec.factor in ("B", "R", "mixer", "sparse") or spec.adapter == CONTEXT:
            value = torch.zeros(spec.shape)
        elif spec.factor == "A":
            value = (2 * torch.rand(spec.shape, generator=generator) - 1) / math.sqrt(spec.shape[1])
        elif spec.name.removeprefix("base_model.model.") not in fresh_head:
            value = model.get_submodule(spec.module).get_parameter(spec.parameter).detach().clone().float()
        elif spec.parameter == "bias":
            value = torch.zeros(spec.shape)
        else:
            value = torch.randn(spec.shape, generator=generator) * getattr(config, "initializer_range", 0.02)
        tensors[spec.name] = value
    return tensors
