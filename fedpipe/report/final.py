"""The final evaluation: the exported adapter, loaded as anyone would load it, on the test records.

It goes through stock peft and the files in `models/adapter` only, so that what is reported
is what a user gets, and not what the training held in memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedpipe.client.batching import Budget, micro_batches
from fedpipe.data.federation import Federation
from fedpipe.errors import StateError
from fedpipe.files import file_digest, inside, read_json, write_json
from fedpipe.models.loading import adapter_task, load_adapter
from fedpipe.models.lora import positions
from fedpipe.models.source import open_backbone
from fedpipe.models.task import load_tokenizer
from fedpipe.project import Project

TOKENS = 2048  # in a batch


def evaluate_adapter(project: Project) -> dict[str, Any]:
    """Evaluate `models/adapter` on the test records; write and return `reports/evaluation.json`.

    Raises
    ------
    StateError
        There is no adapter, or no run wrote its reports yet.
    """
    if not (project.adapter / "adapter_config.json").exists() or not (project.reports / "run.json").exists():
        raise StateError(f"{project.adapter}: no trained adapter here; run `fedpipe run` or `dvc repro` first")
    facts = read_json(project.reports / "run.json")
    _check_adapter(project, facts)
    settings = facts["settings"]
    federation = Federation.open(project.partition)
    backbone = open_backbone(project.backbone, settings["model.backbone"])
    task = adapter_task(project.adapter)
    model = load_adapter(project.adapter, backbone.path)
    records = task.encode(federation.test(), load_tokenizer(backbone.path), settings["data.max_length"])
    records = replace(records, room=positions(model))
    device = torch.device("cpu")
    size = len(federation.labels)
    confusion, loss = np.zeros((size, size), dtype=np.int64), 0.0
    with torch.inference_mode():
        for part in micro_batches(records.kinds, Budget(TOKENS)):
            inputs, labels = records.batch(part, device)
            outputs = model(**inputs)
            loss += float(task.losses(outputs, labels).double().sum())
            np.add.at(confusion, (labels.numpy(), outputs.logits.argmax(-1).numpy()), 1)
    evaluation = _summary(federation.labels, confusion, loss)
    write_json(project.reports / "evaluation.json", evaluation)
    return evaluation


def _check_adapter(project: Project, facts: Any) -> None:
    """Refuse an adapter that is not the one that the run published, or reports that do not say."""
    known = facts.get("adapter") if isinstance(facts, dict) and isinstance(facts.get("settings"), dict) else None
    if not isinstance(known, dict) or "adapter_model.safetensors" not in known:
        raise StateError(f"{project.reports / 'run.json'}: does not name the adapter's files; run `fedpipe run` again")
    for name, expected in known.items():
        path = inside(project.adapter, name)
        if not path.is_file() or file_digest(path) != expected:
            raise StateError(f"{path}: is not what the run published; run `fedpipe run` again")


def _summary(labels: tuple[str, ...], confusion: np.ndarray, loss: float) -> dict[str, Any]:
    """Rows of the confusion matrix are the true labels, columns the predicted ones."""
    rows, total = confusion.sum(1), int(confusion.sum())
    return {
        "accuracy": float(np.trace(confusion)) / total,
        "loss": loss / total,
        "records": total,
        "majority_share": int(rows.max()) / total,
        "recall": {label: int(confusion[i, i]) / int(rows[i]) if rows[i] else None for i, label in enumerate(labels)},
        "confusion": {"labels": list(labels), "matrix": confusion.tolist()},
    }
