"""How many tokens a micro-batch may hold, found from what a pass keeps in memory and from what there is.

What autograd keeps of one record's forward pass is measured once for a model; it grows with the
tokens of a batch, whoever they belong to. The budget is a power of two and is taken from all of
the device's memory, not from what is free just now: a run that is resumed finds the same budget,
cuts the same batches, and adds in the same order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpipe.client.batching import Budget
from fedpipe.client.engine import autocast
from fedpipe.client.parallel import workers_on
from fedpipe.errors import TrainingError
from fedpipe.models.batched import Owners
from fedpipe.models.lora import AdaptedModel, TensorSpec
from fedpipe.models.task import Encoded

SHARE = {"cpu": 0.25, "cuda": 0.7}  # of the memory, for micro-batches
PEAK = 2.0  # the backward pass needs about as much again as the forward pass kept
SMALLEST, LARGEST = 256, 2**17

# On a processor a batch of some hundred tokens computes as fast as a larger one, and leaves work for
# the other cores. A GPU is idle while a batch is started, and batches of one width would be many.
CPU_TOKENS = 512
START = {"cpu": None, "cuda": 8192}


def find_budget(
    asked: int | str, model: AdaptedModel, records: Encoded, device: torch.device, precision: str
) -> Budget:
    """Return the budget of a micro-batch.

    Parameters
    ----------
    asked : padded tokens at most, or `auto`
    model : a batched model; its adapter is overwritten
    records : any records of the task, of which one is tried; only its length matters
    """
    record = np.argmax(records.lengths)
    kept = kept_bytes(model, records, int(record), device, precision) / int(records.kinds[record] // 2)
    # A copy of the factors and its gradient, for each record.
    factors = 8 * sum(spec.numel for spec in model.specs if spec.factor != "head")
    tokens = _tokens(kept, device) if asked == "auto" else int(asked)
    if device.type == "cpu":
        tokens = min(tokens, CPU_TOKENS)
    return Budget(tokens, start=START[device.type], record=round(factors / kept))


def _tokens(kept: float, device: torch.device) -> int:
    share = SHARE[device.type] * device_memory(device) / workers_on(device)
    fitting = max(SMALLEST, min(LARGEST, share / (PEAK * kept)))
    return 2 ** int(np.log2(fitting))


def kept_bytes(
    model: AdaptedModel,
    records: Encoded,
    record: int,
    device: torch.device,
    precision: str,
    active: Sequence[TensorSpec] | None = None,
) -> int:
    """Return the bytes that autograd keeps of one record's forward pass, the backbone's weights aside.

    `active` are the tensors to differentiate; None for all.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.model.parameters(), *model.model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    state = {name: tensor.to(device)[None] for name, tensor in model.initial.items()}
    model.set_adapter(state, Owners(np.zeros(1, dtype=np.int64), device), active or model.specs)
    inputs, labels = records.batch(np.array([record]), device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(device, precision):
        outputs = model.forward(inputs)
        # Held on to until here, so that no two tensors are counted at one address.
        total = model.task.losses(outputs, labels).sum()
    model.record_gradients(total)
    return sum(size for address, size in kept.items() if address not in own)


@contextlib.contextmanager
def running_out_said(budget: Budget) -> Iterator[None]:
    """Say in a line what to do when a micro-batch does not fit.

    Raises
    ------
    TrainingError
        The device is out of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise TrainingError(
            f"out of memory with micro-batches of up to {budget.tokens} tokens; what is complete is kept: "
            f"set runtime.tokens_per_batch to {max(1, budget.tokens // 2)} and run the same command again"
        ) from error


def device_memory(device: torch.device) -> int:
    """Return all memory of a device, in bytes; for a processor what a container may have, if less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            machine = min(machine, int(limit.read_text()))
        except (OSError, ValueError):  # not there, or the word for no limit
            continue
    return machine
