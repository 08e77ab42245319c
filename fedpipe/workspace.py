"""What one process keeps of a run: the opened partition, the backbone, encoded records, idle models.

Loading a backbone takes longer than a small round, so tasks of one process share it. A model
holds the adapters of the batch it is working on; each task therefore checks one out, and the
copies share the frozen weights.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedpipe.client.apart import check_apart
from fedpipe.client.batching import Budget
from fedpipe.client.engine import CohortEngine, Engine
from fedpipe.client.memory import find_budget, running_out_said
from fedpipe.client.parallel import workers_on
from fedpipe.client.prefix import (
    Cut,
    find_cut,
    hidden_size,
    read_prefix,
    same_with_prefix,
    skip_prefix,
    with_prefix,
    write_prefix,
)
from fedpipe.client.raw import full_gradients
from fedpipe.client.reference import OpacusEngine
from fedpipe.config import Settings, TrackingSettings
from fedpipe.data.federation import Federation
from fedpipe.data.probe import Probe, open_probe, probe_stamp
from fedpipe.errors import PrivacyError, SettingsError
from fedpipe.files import content_digest, digest, file_digest
from fedpipe.identity import code_digest
from fedpipe.methods import Method, compose
from fedpipe.models.factors import LowRank
from fedpipe.models.layers import Structure
from fedpipe.models.lora import AdaptedModel, build_model, positions
from fedpipe.models.source import Backbone, open_backbone
from fedpipe.models.task import Encoded, Task, load_tokenizer, make_task
from fedpipe.project import Project
from fedpipe.server.lowrank import stacked
from fedpipe.state import Run

log = logging.getLogger(__name__)

# In a batch while the frozen layers' output is computed, with nothing kept for gradients.
PREFIX_TOKENS = {"cpu": 512, "cuda": 2**15}
PROBE = "probe"  # what `records` calls the public ones; no client has this name
LARGEST_PREFIX = 16 * 2**30  # bytes that `cache_frozen_prefix: auto` may take on disk


class Workspace:
    """The things of a run that are expensive to make, each made once, when first asked for."""

    def __init__(self, project: Project, settings: Settings) -> None:
        self.project = project
        self.settings = settings
        self._lock = threading.RLock()
        self._idle: list[AdaptedModel] = []
        self._encoded: dict[str | None, Encoded] = {}
        self._cut: Cut | None = None
        self._prepared = False
        self._base: str | None = content_digest({})

    @cached_property
    def federation(self) -> Federation:
        return Federation.open(self.project.partition)

    @cached_property
    def backbone(self) -> Backbone:
        return open_backbone(self.project.backbone, self.settings.model.backbone)

    @cached_property
    def method(self) -> Method:
        return compose(self.settings)

    @cached_property
    def probe(self) -> Probe:
        """The public records that the method asks for, if it does."""
        return open_probe(self.project.root, self.method.schedule.public, self.settings.data, self.federation)

    @cached_property
    def device(self) -> torch.device:
        return choose_device(self.settings.runtime.device)

    @cached_property
    def task(self) -> Task:
        model = self.settings.model
        return make_task(model.task, self.federation.labels, model.pooling)

    @cached_property
    def model(self) -> AdaptedModel:
        """The backbone with LoRA, unchanged otherwise; the reference engine trains on this one."""
        start = self.method.initialisation
        structure = Structure(core=start.core, context=start.context, mixer=start.mixer, sparse=start.sparse)
        model = build_model(self.backbone, self.task, self.settings.lora, self.settings.seed, structure)
        model.model.to(self.device)
        return model

    @property
    def trained(self) -> frozenset[str]:
        """The tensors that some method may train: all, or all but the head."""
        specs = (spec for spec in self.model.specs if spec.adapter == "default")
        return frozenset(spec.name for spec in specs if spec.factor != "head" or self.settings.lora.train_head)

    def use_base(self, *deltas: Mapping[str, LowRank]) -> None:
        """Add these products to the frozen weights that all models of this workspace share.

        Nothing may be computing with other ones: the tasks of a round share one base, and the next
        round begins when they are done.
        """
        wanted = {name: stacked([part[name] for part in deltas if name in part]) for part in deltas for name in part}
        name = content_digest({f"{pair}/{x}": getattr(wanted[pair], x) for pair in wanted for x in "AB"})
        with self._lock:
            if name != self._base:
                self._base = None  # until it is whole: an interrupted change must not pass for what was there
                self.model.set_base(wanted)
                self._base = name

    def raw_gradient(self, client: str, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a client's mean gradient in its adapted layers' frozen weights; never under privacy."""
        if self.settings.private:
            raise PrivacyError("the gradient of raw records was asked for in a private run")
        with self.batched_models(1) as (model,):
            whole = {spec.name: adapter.get(spec.name, torch.zeros(spec.shape)) for spec in self.model.specs}
            return full_gradients(model, whole, self.records(client), self.device, self.budget)

    @contextlib.contextmanager
    def batched_models(self, count: int | None = None) -> Iterator[list[AdaptedModel]]:
        """Check batched models out, as many as compute at once on this device; more are made when all are in use."""
        with self._lock:
            self._encode()
            missing = count or workers_on(self.device)
            models = [self._idle.pop() if self._idle else self._new_batched() for _ in range(missing)]
        try:
            yield models
        finally:
            with self._lock:
                self._idle.extend(models)

    def _new_batched(self) -> AdaptedModel:
        model = self.model.to_batched()
        if self._cut is not None:
            skip_prefix(model, self._cut)
        return model

    @cached_property
    def budget(self) -> Budget:
        """How large a micro-batch may be."""
        with self.batched_models(1) as (model,):
            runtime = self.settings.runtime
            return find_budget(runtime.tokens_per_batch, model, self.records(None), self.device, runtime.precision)

    @contextlib.contextmanager
    def engine(self) -> Iterator[Engine]:
        """Check the engine of the settings out."""
        precision, budget = self.settings.runtime.precision, self.budget
        if self.settings.runtime.engine == "opacus":
            with self._lock:
                yield OpacusEngine(self.model, self.device, precision, budget)
        else:
            with self.batched_models() as models, running_out_said(budget):
                yield CohortEngine(models, self.device, precision, budget)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.backbone.path)

    def records(self, client: str | None) -> Encoded:
        """Return a client's encoded records, with None the test records, with `PROBE` the public ones."""
        with self._lock:
            self._encode()
            return self._plain(client)

    def _plain(self, client: str | None) -> Encoded:
        if client not in self._encoded:
            dataset = self._dataset(client)
            records = self.task.encode(dataset, self._tokenizer, self.settings.data.max_length)
            self._encoded[client] = replace(records, room=self._room)
        return self._encoded[client]

    def prefix_bytes(self) -> int:
        """Return how large what is still to be written of the frozen layers' output will be; nothing is computed."""
        with self._lock:
            cut = None if self._prepared else self._wanted_cut()
            if cut is None or self._prefix_path(cut).exists():
                return 0
            return 4 * hidden_size(self.model) * sum(len(self._plain(name).tokens) for name in self._everybody)

    @cached_property
    def _room(self) -> int:
        longest, most = self.settings.data.max_length, positions(self.model.model)
        return longest if most is None else min(longest, most)

    def _dataset(self, client: str | None) -> Dataset:
        if client == PROBE:
            return self.probe.records
        return self.federation.test() if client is None else self.federation.client(client)

    def adopt(self, other: Workspace) -> bool:
        """Take over what another workspace has encoded, if its records, backbone and adapted layers are the same.

        For many runs in one process that differ in method, privacy or optimiser only. Return whether it did.
        """
        with self._lock, other._lock:
            alike = [
                (w.federation.digest, w.backbone.digest, w.settings.data, w.settings.model, w.settings.runtime)
                for w in (self, other)
            ]
            layers = [find_cut(w.model.specs) for w in (self, other)]
            public = self.probe.digest or other.probe.digest  # its records are encoded with the others'
            if self._prepared or not other._prepared or public or alike[0] != alike[1] or layers[0] != layers[1]:
                return False
            self._encoded = dict(other._encoded)
            self._cut, self._prepared = other._cut, True
            return True

    def _encode(self) -> None:
        """Once: try the backbone out, and have the frozen layers' output ready if it is worth keeping."""
        if self._prepared:
            return
        self._prepared = True
        check_apart(self.model.to_batched(), self.records(None), self.device)
        cut = self._wanted_cut()
        if cut is not None:
            self._cut_off(cut)

    def _wanted_cut(self) -> Cut | None:
        cut = find_cut(self.model.specs)
        pays = cut is not None and self.settings.runtime.engine == "cohort" and self._prefix_pays(cut)
        return cut if pays else None

    @property
    def _everybody(self) -> tuple[str | None, ...]:
        """Whose records there are: all clients', the test's, and the public ones."""
        return (*self.federation.clients, None, *((PROBE,) if self.probe.digest else ()))

    def _cut_off(self, cut: Cut) -> None:
        """Compute or read the frozen layers' output, and go without these layers from now on."""
        parts = {name: self._plain(name) for name in self._everybody}
        whole, path = Encoded.join(list(parts.values())), self._prefix_path(cut)
        prefix = read_prefix(path, len(whole.tokens))
        if prefix is None:
            log.info("computing the %d frozen layers once for %d records", cut.first, len(whole))
            models = [self.model.to_batched() for _ in range(workers_on(self.device))]
            budget = Budget(PREFIX_TOKENS[self.device.type])
            write_prefix(models, cut, whole, path, self.device, self.settings.runtime.precision, budget)
            prefix = read_prefix(path, len(whole.tokens))
        known = with_prefix(parts, prefix)
        trial = self.model.to_batched()
        skip_prefix(trial, cut)
        if same_with_prefix(self.model.to_batched(), trial, known[None], self.device):
            self._cut, self._encoded = cut, known
            self._idle.append(trial)

    def _prefix_pays(self, cut: Cut) -> bool:
        """Say whether to keep the frozen layers' output: always, never, or when records are met more than twice.

        By the settings and the data alone: a resumed run must decide as the first one did.
        """
        asked = self.settings.runtime.cache_frozen_prefix
        if asked != "auto":
            return bool(asked)
        federation, sizes = self.settings.federation, self.federation.sizes
        clients = federation.clients_per_round or len(sizes)
        groups = self.federation.groups if self.settings.privacy.unit == "group" else None
        each = 1.0 if groups is None else sum(sizes.values()) / sum(groups.values())  # records of what is drawn
        met = federation.rounds * federation.local_steps * federation.batch_size * clients * each
        need = 4 * hidden_size(self.model) * self.settings.data.max_length * sum(sizes.values())
        return met > 2 * sum(sizes.values()) and need <= LARGEST_PREFIX

    def _prefix_path(self, cut: Cut) -> Path:
        name = {
            "code": code_digest(),
            "dataset": self.federation.digest,
            "probe": self.probe.digest,
            "backbone": self.backbone.digest,
            "max_length": self.settings.data.max_length,
            "layers": cut.first,
            "precision": self.settings.runtime.precision,
            "device": self.device.type,
        }
        return self.project.runs / "prefix" / f"{digest(name)[:16]}.npy"


def choose_device(name: str) -> torch.device:
    """Return the device of the settings; `auto` takes a GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("runtime.device: found 'cuda', but torch sees no GPU here; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # Sums of floats depend on their order; a resumed run must add in the same one. What has no
    # deterministic kernel (some attention backward passes) still runs, and is then reproducible
    # to rounding only.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # fp32 means fp32: TF32 would round every product of norms and sums to 10 bits.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


_KEPT = 2  # workspaces of one process: a long-lived worker must not collect backbones
_workspaces: dict[str, Workspace] = {}
_workspaces_lock = threading.Lock()


def workspace_of(project: Project, settings: Settings) -> Workspace:
    """Return this process's workspace for these settings and the files that are there now."""
    manifest = project.partition / "manifest.json"
    keyless = settings.privacy.model_copy(update={"test_key": None})
    settings = settings.model_copy(update={"privacy": keyless, "tracking": TrackingSettings()})
    stamp = file_digest(manifest) if manifest.exists() else None
    public = probe_stamp(project.root, compose(settings).schedule.public)
    name = digest([str(project.root), settings.model_dump(mode="json"), stamp, public])
    with _workspaces_lock:
        if name not in _workspaces:
            while len(_workspaces) >= _KEPT:
                _workspaces.pop(next(iter(_workspaces)))
            _workspaces[name] = Workspace(project, settings)
        return _workspaces[name]


def forget_workspaces() -> None:
    """Drop all workspaces of this process, as a new process would start."""
    with _workspaces_lock:
        _workspaces.clear()


def open_workspace(run_dir: Path) -> tuple[Run, Workspace]:
    """Return a run and this process's workspace for it."""
    run = Run(run_dir)
    return run, workspace_of(Project(run_dir.parents[1]), run.settings)
