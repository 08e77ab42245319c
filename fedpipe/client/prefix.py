"""The frozen prefix: what the layers below the first adapted one compute never changes, so it is computed once.

With adapters only in the top layers, each record's hidden states at the first adapted layer
are the same in every step of every round. They are kept on disk, memory-mapped, one row a
token, and put in where that layer reads its input; the layers below are skipped. A hook on
that one layer is all it takes, so any backbone whose layers stand in a list can be cut.

The rows are made from raw records. They belong to the clients, like the records themselves.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpipe.client.batching import Budget, micro_batches
from fedpipe.client.engine import autocast
from fedpipe.client.parallel import in_turn
from fedpipe.errors import StateError
from fedpipe.files import file_digest, private_directory, read_sealed, storage, sweep, write_sealed
from fedpipe.models import steady
from fedpipe.models.lora import AdaptedModel, TensorSpec
from fedpipe.models.task import Encoded


@dataclass(frozen=True)
class Cut:
    """Where a backbone is cut: `layers` is the path of its list of layers, `first` the lowest adapted one."""

    layers: str
    first: int


class _CutReachedError(Exception):
    """Ends a forward pass at the cut."""


class _Skipped(nn.Module):
    """Stands for a layer below the cut: hands its input on, and answers for its other attributes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["skipped"] = layer  # as a child it would bring its weights along

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["skipped"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def find_cut(specs: tuple[TensorSpec, ...]) -> Cut | None:
    """Return where the frozen layers end, or None if the lowest layer is adapted or layers stand in no single list."""
    places = [re.match(r"(.+?)\.(\d+)\.", spec.module) for spec in specs if spec.factor != "head"]
    lists = {place[1] for place in places if place}
    if len(lists) != 1 or not all(places):
        return None
    first = min(int(place[2]) for place in places if place)
    return Cut(lists.pop(), first) if first else None


def hidden_size(model: AdaptedModel) -> int:
    return int(model.model.get_base_model().config.hidden_size)


def write_prefix(
    models: Sequence[AdaptedModel],
    cut: Cut,
    records: Encoded,
    path: Path,
    device: torch.device,
    precision: str,
    budget: Budget,
) -> None:
    """Compute the hidden states of all records at the cut and write them: (tokens, hidden), float32, `.npy`.

    The file appears whole or not at all. `models` share a backbone; each computes one batch at a time.
    """
    readers = [_HiddenReader(model, cut) for model in models]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    @torch.inference_mode()
    def one(reader: _HiddenReader, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with autocast(device, precision):
            return part, reader.read(records.batch(steady.at_least_two(part), device)[0]).float().cpu().numpy()

    try:
        with storage(path), contextlib.ExitStack() as handles:
            private_directory(path.parent)
            sweep(path.parent)
            held = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            handles.callback(os.close, held)
            fcntl.flock(held, fcntl.LOCK_EX)  # until it is closed: `sweep` leaves it alone
            shape = (len(records.tokens), hidden_size(models[0]))
            rows = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
            for part, hidden in in_turn(one, readers, list(micro_batches(records.kinds, budget))):
                for row, record in enumerate(part):
                    start, end = records.offsets[record], records.offsets[record + 1]
                    rows[start:end] = hidden[row, : end - start]
            rows.flush()
            write_sealed(path.with_suffix(".json"), {"rows": file_digest(temporary)})
            temporary.replace(path)
    finally:
        for reader in readers:
            reader.close()
        temporary.unlink(missing_ok=True)


class _HiddenReader:
    """Runs a model as far as the cut."""

    def __init__(self, model: AdaptedModel, cut: Cut) -> None:
        self._model = model
        self._caught: list[Tensor] = []
        layer = model.model.get_submodule(cut.layers)[cut.first]
        self._hook = layer.register_forward_pre_hook(self._catch, with_kwargs=True)

    def _catch(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._caught.append(args[0] if args else kwargs["hidden_states"])
        raise _CutReachedError

    def read(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return what the layer at the cut would read: (n, longest, hidden)."""
        with contextlib.suppress(_CutReachedError):
            self._model.forward(inputs)
        return self._caught.pop()

    def close(self) -> None:
        self._hook.remove()


# What NumPy raises for a header that is none.
_NO_ARRAY = (ValueError, TypeError, EOFError, SyntaxError, TokenError, OverflowError, MemoryError, RecursionError)


def read_prefix(path: Path, tokens: int | None = None) -> np.ndarray | None:
    """Map a file of `write_prefix` into memory, checked against its digest; None if it is missing or damaged.

    `tokens` is the number of rows that it must have, where that is known.
    """
    try:
        if read_sealed(path.with_suffix(".json"))["rows"] != file_digest(path):
            return None
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (StateError, OSError, KeyError, *_NO_ARRAY):
        return None
    right = rows.dtype == np.float32 and rows.ndim == 2 and tokens in (None, len(rows))
    return rows if right else None


def with_prefix(parts: Mapping[str, Encoded], prefix: np.ndarray) -> dict[str, Encoded]:
    """Return the records with their rows, given that `prefix` holds those of all parts, in their order."""
    start, known = 0, {}
    for name, part in parts.items():
        known[name] = replace(part, prefix=prefix, rows=part.offsets[:-1] + start)
        start += len(part.tokens)
    return known


@torch.inference_mode()
def same_with_prefix(whole: AdaptedModel, cut_model: AdaptedModel, records: Encoded, device: torch.device) -> bool:
    """Say whether a cut model gives the whole one's outputs on a few records.

    Some backbones pass more than hidden states from layer to layer; those are not cut.
    """
    few = np.arange(min(4, len(records)))
    inputs, _ = records.batch(few, device)
    outputs = []
    for model in (whole, cut_model):
        model.set_adapter({name: tensor.to(device) for name, tensor in model.initial.items()})
        try:
            outputs.append(model.forward(inputs).logits.float())
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
            return False
    return torch.allclose(*outputs, rtol=1e-3, atol=1e-4)


def skip_prefix(model: AdaptedModel, cut: Cut) -> None:
    """Make a batched model read its hidden states at the cut from the batch; layers below are skipped."""
    layers = model.model.get_submodule(cut.layers)
    for number in range(cut.first):
        layers[number] = _Skipped(layers[number])

    def put_in(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = model.hidden
        if args:
            return (hidden.to(args[0].dtype), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden.to(kwargs["hidden_states"].dtype)}

    layers[cut.first].register_forward_pre_hook(put_in, with_kwargs=True)
