"""What a task is: how to encode a record, the loss of one record, the metrics.

A task is one small object, so that a new kind of problem touches nothing else. Records are
kept encoded and ragged (no padding); a batch is padded to its own longest record only, in whole
steps (see `fedpipe.models.steady`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fedpipe.errors import DataError
from fedpipe.models import steady
from fedpipe.models.pooled import MeanPooledClassifier


@dataclass(frozen=True)
class Encoded:
    """Encoded records, ragged.

    Attributes
    ----------
    tokens : (sum of lengths,) int64, all records end to end
    offsets : (records + 1,) int64, where each record starts
    labels : (records,) int64
    groups : (records,) int64, which group of its client each record is of, from 0 on; None where there are none
    pad : the token that fills a batch up
    prefix, rows : where the frozen layers' output is kept (see `fedpipe.client.prefix`): its rows,
        (all tokens, hidden), and which of them each record starts at, (records,); None if it is not
    room : the most tokens of a record, by the settings or the backbone's positions; None if there is no end
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    pad: int
    prefix: np.ndarray | None = None
    rows: np.ndarray | None = None
    groups: np.ndarray | None = None
    room: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def widths(self) -> np.ndarray:
        """What each record is padded to, (records,), by its own length; never beyond the room."""
        widths = steady.widths(self.lengths)
        return widths if self.room is None else np.maximum(self.lengths, np.minimum(widths, self.room))

    @property
    def kinds(self) -> np.ndarray:
        """Which records may share a batch, (records,): twice the width, and one more for those without padding."""
        widths = self.widths
        return 2 * widths + (self.lengths == widths)

    @classmethod
    def join(cls, parts: Sequence[Encoded]) -> Encoded:
        """Put several clients' records end to end, in the order given; groups, which are each client's own, are not."""
        shifts = np.cumsum([0, *(len(part.tokens) for part in parts)])
        offsets = [part.offsets[:-1] + shift for part, shift in zip(parts, shifts, strict=False)]
        return cls(
            tokens=np.concatenate([part.tokens for part in parts]),
            offsets=np.concatenate([*offsets, shifts[-1:]]),
            labels=np.concatenate([part.labels for part in parts]),
            pad=parts[0].pad,
            prefix=parts[0].prefix,
            rows=None if parts[0].prefix is None else np.concatenate([part.rows for part in parts]),
            room=parts[0].room,
        )

    def part(self, first: int, stop: int) -> Encoded:
        """Return the records from `first` to before `stop`, without their groups."""
        begin, end = self.offsets[first], self.offsets[stop]
        return Encoded(
            tokens=self.tokens[begin:end],
            offsets=self.offsets[first : stop + 1] - begin,
            labels=self.labels[first:stop],
            pad=self.pad,
            prefix=self.prefix,
            rows=None if self.rows is None else self.rows[first:stop],
            room=self.room,
        )

    def batch(self, records: np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Return model inputs, each (n, widest), and labels (n,) of the given records."""
        lengths = self.lengths[records]
        position = np.arange(self.widths[records].max())
        mask = position[None, :] < lengths[:, None]
        source = np.minimum(self.offsets[records][:, None] + position[None, :], len(self.tokens) - 1)
        tokens = np.where(mask, self.tokens[source], self.pad)
        inputs = {
            "input_ids": torch.from_numpy(tokens).to(device),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)).to(device),
        }
        if self.prefix is not None:
            inputs["hidden"] = torch.from_numpy(self._hidden(records, position, mask)).to(device)
        return inputs, torch.from_numpy(self.labels[records]).to(device)

    def _hidden(self, records: np.ndarray, position: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return what the frozen layers made of the records: (n, widest, hidden); zero where padded."""
        rows = np.minimum(self.rows[records][:, None] + position[None, :], len(self.prefix) - 1)
        return np.where(mask[:, :, None], self.prefix[rows], np.float32(0))


class Task(Protocol):
    """One kind of problem; `labels` are the names of the classes, in order."""

    labels: tuple[str, ...]

    def load(self, path: Path) -> tuple[nn.Module, set[str]]:
        """Load a backbone with this task's head; also return the names of parameters that were not in the file."""

    def encode(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
        """Encode a client's records."""

    def losses(self, outputs: Any, labels: Tensor) -> Tensor:
        """Return the loss of each record: (n,), float32."""

    def metrics(self, outputs: Any, labels: Tensor) -> dict[str, Tensor]:
        """Return each record's contribution to the metrics: name -> (n,)."""


@dataclass(frozen=True)
class TextClassification:
    """A label for a text; cross-entropy; accuracy.

    `pooling` says what the head reads: `default` is the architecture's own classifier, `mean`
    the mean of the token states.
    """

    labels: tuple[str, ...]
    pooling: str = "default"

    def load(self, path: Path) -> tuple[nn.Module, set[str]]:
        names = dict(enumerate(self.labels))
        options: dict[str, Any] = {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {label: index for index, label in names.items()},
            "dtype": torch.float32,
            "local_files_only": True,
            "use_safetensors": True,
            "trust_remote_code": False,
        }
        # That the head is new is expected, and not worth a page of warnings.
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            if self.pooling == "mean":
                model, info = MeanPooledClassifier.from_pretrained(path, **options)
            else:
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    path, output_loading_info=True, ignore_mismatched_sizes=True, **options
                )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: cannot be loaded as a text classifier: {_first_line(error)}") from error
        # Decoders classify at the last token that is no padding. With another idea of padding than the batches have
        # they would read a position that depends on the longest record of the batch.
        model.config.pad_token_id = padding_token(load_tokenizer(path))
        mismatched = (entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"])
        return model.eval(), {*info["missing_keys"], *mismatched}

    def encode(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
        rows = tokenizer(list(dataset["text"]), truncation=True, max_length=max_length)["input_ids"]
        index: Mapping[str, int] = {label: number for number, label in enumerate(self.labels)}
        return Encoded(
            tokens=np.concatenate([np.asarray(row, dtype=np.int64) for row in rows] or [np.zeros(0, dtype=np.int64)]),
            offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
            labels=np.asarray([index[label] for label in dataset["label"]], dtype=np.int64),
            pad=padding_token(tokenizer),
            groups=groups_of(dataset["group"]) if "group" in dataset.column_names else None,
        )

    def losses(self, outputs: Any, labels: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.logits.float(), labels, reduction="none")

    def metrics(self, outputs: Any, labels: Tensor) -> dict[str, Tensor]:
        return {
            "accuracy": (outputs.logits.argmax(-1) == labels).double(),
            "loss": self.losses(outputs, labels).double(),
        }


def groups_of(values: Sequence[str]) -> np.ndarray:
    """Return which group each record is of, (records,) int64, in the order of the groups' names."""
    return np.unique(np.asarray(list(values), dtype=object).astype(str), return_inverse=True)[1].astype(np.int64)


TASKS: dict[str, type[TextClassification]] = {"text-classification": TextClassification}


def make_task(name: str, labels: Sequence[str], pooling: str) -> Task:
    """Return the task of the settings for these labels."""
    return TASKS[name](tuple(labels), pooling)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a backbone."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: has no tokenizer that can be loaded: {_first_line(error)}") from error
    # Without its files transformers makes an empty one, and every word is unknown to it.
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
        raise DataError(f"{path}: the tokenizer has no vocabulary; save it beside the model")
    return tokenizer


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token; decoders often have none, and then the end-of-text token serves."""
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if token is None else int(token)


def linear_layers(model: nn.Module) -> set[str]:
    """Return the last name of every module that LoRA can adapt (linear layers and GPT-2's Conv1D)."""
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
