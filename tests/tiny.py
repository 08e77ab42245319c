"""A tiny project: a random two-layer encoder, made-up sentences, and settings that run in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from fedpipe.config import Settings, parse_settings
from fedpipe.data.federation import write_partition
from fedpipe.data.sources import fetch_data
from fedpipe.models.source import fetch_backbone
from fedpipe.project import Project

GOOD = ("fine", "great", "warm", "bright", "clever")
BAD = ("dull", "weak", "cold", "grim", "messy")
PLAIN = ("film", "story", "scene", "actor", "plot", "music", "end", "start", "city", "night")
TEST_KEY = "ab" * 32


def make_backbone(
    directory: Path,
    layers: int = 2,
    seed: int = 0,
    spread: float = 0.02,
    hidden: int = 16,
    words: Sequence[str] = (),
) -> Path:
    """Save a random BERT with a word-piece tokenizer, which knows more `words`, in the Hugging Face layout."""
    directory.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN, *words]
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=spread,
    )
    BertForSequenceClassification(config).save_pretrained(directory)
    return directory


def write_records(path: Path, records: int = 400, seed: int = 0) -> Path:
    """Write a CSV of sentences whose label can be read off their words, each with a topic."""
    generator = np.random.default_rng(seed)
    lines = ["text,label,topic"]
    for number in range(records):
        good = bool(generator.integers(2))
        words = list(generator.choice(GOOD if good else BAD, size=2)) + list(
            generator.choice(PLAIN, size=3 + number % 7)
        )
        generator.shuffle(words)
        lines.append(f"{' '.join(words)},{'good' if good else 'bad'},topic{number % 10}")
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_values(root: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return settings as nested dictionaries, with sections laid over the tiny defaults."""
    values: dict[str, Any] = {
        "seed": 3,
        "data": {"source": str(root / "records.csv"), "test_fraction": 0.2, "max_length": 16, "deduplicate": False},
        "partition": {"scheme": "iid", "clients": 3, "min_records": 20},
        "model": {"backbone": str(root / "backbone")},
        "lora": {"rank": 2, "alpha": 4.0},
        "federation": {"rounds": 3, "local_steps": 2, "batch_size": 24},
        "method": {"name": "la-lora"},
        "optimizer": {"name": "sgd", "lr": 0.5},
        "privacy": {"epsilon": 8.0, "test_key": TEST_KEY},
        "runtime": {"device": "cpu", "tokens_per_batch": 256},
        "tracking": {"uri": None},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return values


def make_project(root: Path, spread: float = 0.02, **sections: dict[str, Any]) -> tuple[Project, Settings]:
    """Make data, backbone and partition below `root`; return the project and its settings.

    With `spread` 0.02, as is usual, so small a backbone has gradients near zero; 0.3 makes them large.
    """
    root.mkdir(parents=True, exist_ok=True)
    write_records(root / "records.csv")
    make_backbone(root / "backbone", spread=spread)
    settings = parse_settings(tiny_values(root, **sections))
    (root / "params.yaml").write_text(json.dumps(tiny_values(root, **sections)))  # JSON is YAML
    project = Project(root)
    fetch_data(settings.data, project.raw)
    fetch_backbone(settings.model.backbone, project.backbone)
    write_partition(settings, project.raw, project.partition)
    return project, settings
