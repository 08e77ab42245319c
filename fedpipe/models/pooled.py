"""A classifier on the mean of a text encoder's token states.

Sentence encoders are trained for this pooling; the pooler that BERT's own classifier reads
was often never trained at all, and a new head on it learns far more slowly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledClassifier(nn.Module):
    """`classifier(mean over real tokens of backbone(text))`; takes and returns what transformers' classifiers do."""

    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> SequenceClassifierOutput:
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(states.dtype)
        means = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.classifier(means))

    @classmethod
    def from_pretrained(cls, path: Path, **options: Any) -> tuple[MeanPooledClassifier, dict[str, Any]]:
        """Load the encoder; also return which of its weights were not in the file. The classifier is new."""
        backbone, info = AutoModel.from_pretrained(path, output_loading_info=True, **options)
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # not read, and in many files not there
        missing = {name for name in info["missing_keys"] if not name.startswith("pooler.")}
        with torch.no_grad():
            model = cls(backbone, backbone.config)
        return model, {**info, "missing_keys": {f"backbone.{name}" for name in missing} | set(_HEAD)}


_HEAD = ("classifier.weight", "classifier.bias")
