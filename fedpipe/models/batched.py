"""Linear layers that apply to each record of a batch the weights of the record's own client.

The backbone is frozen and shared, so a batch may hold records of many clients; only the
adapters differ. A trained layer takes one of two ways to them, chosen by its shape:

- *Copies.* Every record gets a copy of its client's weights, as a leaf tensor of autograd.
  Record j's loss depends on copy j alone, so the gradients of the copies *are* the gradients
  of the records, for all clients, in one backward pass, with no hooks. This is the way of
  LoRA's factors, which are small beside a record's activations.
- *Outer products.* Where copies would be the larger part, as in a dense head that meets each
  record once, the records of a client are stacked and share its weights. A record's gradient
  is the sum over its rows of (output gradient) x (input); only these two are kept, and the norm
  of a record of one row follows from theirs (Goodfellow 2015, arXiv:1510.01799).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpipe.models import steady

# How many multiplications the memory traffic of one weight of one copy is worth: it is read, written,
# differentiated, read for the norm and read for the sum.
_TRAFFIC = 8
_FIXED = 2**17  # and how many the dozen small operations of stacking are
_MANY_ROWS = 32  # what a layer is taken to read of a record, where it reads more than one row


class Owners:
    """Which client each record of a micro-batch belongs to, and the stacks of records of one client.

    Stacks have one height, the mean number of records a client, or `steady.ROWS` if that is more: a
    client with more has several stacks. So there are at most twice as many stacks as clients.

    Parameters
    ----------
    rows : the client of each record, as a row of the state; ascending

    Attributes
    ----------
    index : the same: (n,) int64
    clients : the clients that are present, ascending: (present,) int64
    place : which of those each record belongs to: (n,) int64
    """

    def __init__(self, rows: np.ndarray, device: torch.device) -> None:
        self._rows = rows
        self._clients, place = np.unique(rows, return_inverse=True)
        self.device = device
        self.index, self.clients, self.place = (
            torch.from_numpy(numbers).to(device) for numbers in (rows, self._clients, place)
        )

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def _layout(self) -> tuple[int, Tensor, Tensor]:
        """Return the stacks' height, the present client of each stack, and the place of each record in them."""
        counts = np.unique(self._rows, return_counts=True)[1]
        height = max(steady.ROWS, -(-len(self._rows) // len(counts)))
        stacks = -(-counts // height)
        start = np.repeat(np.cumsum(stacks) - stacks, counts) * height
        places = start + np.arange(len(self._rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        owners = np.repeat(np.arange(len(counts)), stacks)
        return height, torch.from_numpy(owners).to(self.device), torch.from_numpy(places).to(self.device)

    @property
    def stacks(self) -> Tensor:
        """Which of the present clients each stack belongs to: (stacks,) int64."""
        return self._layout[1]

    def stack(self, rows: Tensor) -> Tensor:
        """Put (n, t, k), the t rows of each record, into stacks: (stacks, height * t, k), zero where empty."""
        height, stacks, places = self._layout
        empty = rows.new_zeros(len(stacks) * height, *rows.shape[1:])
        return empty.index_copy(0, places, rows).reshape(len(stacks), height * rows.shape[1], rows.shape[2])

    def unstack(self, stacked: Tensor) -> Tensor:
        """Undo `stack`."""
        height, stacks, places = self._layout
        return stacked.reshape(len(stacks) * height, -1, stacked.shape[-1]).index_select(0, places)


class OuterProducts:
    """The gradients of n records with respect to a weight, each as a sum of outer products.

    Parameters
    ----------
    inputs : (n, t, in), what the layer read
    outputs : (n, t, out), the gradients of what it wrote
    """

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        self.inputs = inputs.float()
        self.outputs = outputs.float()

    def __getitem__(self, records: slice) -> OuterProducts:
        return OuterProducts(self.inputs[records], self.outputs[records])


Gradient = Tensor | OuterProducts


def always_copied(shape: Sequence[int]) -> bool:
    """Say whether a weight of this shape is so small that copies are cheaper however few the rows."""
    return not outer_products_pay(1, shape[-1], shape[-2])


class Copier:
    """Lays tensors of all clients side by side, so that a micro-batch's copies take one gather.

    Parameters
    ----------
    tensors : name -> (clients, *shape)
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._shapes = {name: _memory_shape(tensor.shape[1:]) for name, tensor in tensors.items()}
        laid = [steady.aligned(in_memory_order(tensor).flatten(1)) for tensor in tensors.values()]
        self._widths = [part.shape[1] for part in laid]
        self._flat = torch.cat(laid, dim=1) if laid else None

    def copies(self, owners: Owners) -> dict[str, Tensor]:
        """Return name -> a leaf (n, *shape), or (n, in, out) where `is_turned`."""
        if self._flat is None:
            return {}
        parts = self._flat.index_select(0, owners.index).split(self._widths, dim=1)
        return {
            name: part[:, : math.prod(shape)].unflatten(1, shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return (n, *shape) as copies lie in memory: (n, in, out) where the weight `is_turned`."""
    return tensor.transpose(1, 2) if is_turned(tensor.shape[1:]) else tensor


def _memory_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape)[::-1] if is_turned(shape) else tuple(shape)


def outer_products_pay(rows: int, inputs: int, outputs: int) -> bool:
    """Say whether `rows` rows a record are so few that Gram matrices cost less than copies of the weights."""
    return rows * rows * (inputs + outputs) + _FIXED < _TRAFFIC * inputs * outputs


def is_turned(shape: Sequence[int]) -> bool:
    """Say whether copies of a weight of this shape, (out, in), are (n, in, out) in memory.

    With the long side last, all products that a copy takes part in read along rows; on a processor
    those of a factor `B` are then three times as fast.
    """
    return len(shape) == 2 and shape[0] > shape[1]


class _ProductOfCopies(torch.autograd.Function):
    """Rows (n, t, in) times turned copies (n, in, out): (n, t, out); or copies (n, out, in) times rows: (n, out, t).

    Each product has the long side of the copy last, forward and backward. Left to itself, autograd
    would put it first for the gradient of a copy, which takes three times as long on a processor.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, copies: Tensor, turned: bool) -> Tensor:
        ctx.turned = turned
        ctx.save_for_backward(
            rows if ctx.needs_input_grad[1] else None,
            copies if ctx.needs_input_grad[0] else None,
        )
        return steady.bmm(rows, copies) if turned else steady.bmm(copies, rows.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, copies = ctx.saved_tensors
        if ctx.turned:
            of_rows = None if copies is None else steady.bmm(gradient, copies.transpose(1, 2))
            of_copies = None if rows is None else steady.bmm(rows.transpose(1, 2), gradient)
        else:
            of_rows = None if copies is None else steady.bmm(gradient.transpose(1, 2), copies)
            of_copies = None if rows is None else steady.bmm(gradient, rows)
        return of_rows, of_copies, None


class PerClientLinear(nn.Module):
    """A linear layer with one weight, (out, in), or one for each client, (clients, out, in).

    With `owners`, inputs are (n, ..., in). Where a backbone folds positions into the batch axis,
    as window attention does (n * windows, ..., in), the windows of one record lie side by side
    and are folded back, so that a record still meets its own weights and sums its own gradient.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self._forget(None, frozenset())

    def _forget(self, owners: Owners | None, active: frozenset[str]) -> None:
        self.owners = owners
        self.active = active
        self._copies: dict[str, Tensor] = {}
        self._inputs: list[Tensor] = []
        self._probes: list[Tensor] = []

    def use(
        self,
        tensors: Mapping[str, Tensor],
        owners: Owners | None,
        active: frozenset[str],
        copies: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take these parameters, and their copies where there are some already.

        `active` names the parameters that `taps` and `gradients` are for.
        """
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self._forget(owners, active)
        for name, copied in (copies or {}).items():
            self._copies[name] = copied.requires_grad_(name in active)

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    def forward(self, inputs: Tensor) -> Tensor:
        if self.owners is None:
            bias = None if self.bias is None else self.bias.to(inputs.dtype)
            return steady.linear(inputs, self.weight.to(inputs.dtype), bias)
        if inputs.shape[0] % len(self.owners):
            raise ValueError(f"a batch of {len(self.owners)} records met a layer as {tuple(inputs.shape)}")
        if torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
        rows = inputs.reshape(len(self.owners), -1, self.in_features)
        outputs = self._stacked(rows) if self._takes_outer_products(rows.shape[1]) else self._copied(rows)
        return outputs.reshape(*inputs.shape[:-1], self.out_features)

    def _takes_outer_products(self, rows: int) -> bool:
        """Say which way; a layer that is used several times in a pass stays on the way it took first.

        The two differ in their last digits, so how long the longest record of a batch is has no say in it.
        """
        if self._copies:
            return False
        rows = rows if rows == 1 else _MANY_ROWS
        return bool(self._probes) or outer_products_pay(rows, self.in_features, self.out_features)

    def _copied(self, rows: Tensor) -> Tensor:
        weights = self._copy("weight").to(rows.dtype)
        turned = is_turned(self.weight.shape[-2:])
        outputs = _ProductOfCopies.apply(rows, weights, turned)
        outputs = outputs if turned else outputs.transpose(1, 2)
        return outputs if self.bias is None else outputs + self._copy("bias").to(rows.dtype)[:, None, :]

    def _copy(self, parameter: str) -> Tensor:
        if parameter not in self._copies:
            copies = in_memory_order(getattr(self, parameter)).index_select(0, self.owners.index)
            self._copies[parameter] = copies.requires_grad_(parameter in self.active)
        return self._copies[parameter]

    def _stacked(self, rows: Tensor) -> Tensor:
        of_stacks = self.owners.clients[self.owners.stacks]
        weights = self.weight.index_select(0, of_stacks).to(rows.dtype)
        outputs = self.owners.unstack(steady.bmm(self.owners.stack(rows), weights.transpose(1, 2)))
        if self.bias is not None:
            outputs = outputs + self.bias.index_select(0, self.owners.index).to(rows.dtype)[:, None, :]
        if not self.active:
            return outputs
        # Adding a leaf of zeros is how autograd is asked for the gradient of the output.
        self._inputs.append(rows.detach())
        self._probes.append(torch.zeros_like(outputs, requires_grad=True))
        return outputs + self._probes[-1]

    @property
    def taps(self) -> list[Tensor]:
        """The leaf tensors of the last forward pass that `gradients` needs the gradients of."""
        return [*self._probes, *(copies for name, copies in self._copies.items() if name in self.active)]

    def gradients(self, found: Iterator[Tensor]) -> dict[str, Gradient]:
        """Return the records' gradients of each active parameter that was used, given those of the taps."""
        probes = [next(found) for _ in self._probes]
        gradients: dict[str, Gradient] = {name: next(found) for name in self._copies if name in self.active}
        if "weight" in gradients and is_turned(self.weight.shape[-2:]):
            gradients["weight"] = gradients["weight"].transpose(1, 2)
        if probes:
            outputs = torch.cat(probes, dim=1)
            if "weight" in self.active:
                gradients["weight"] = OuterProducts(torch.cat(self._inputs, dim=1), outputs)
            if "bias" in self.active:
                gradients["bias"] = outputs.float().sum(1)
        return gradients


class KeyedDropout(nn.Module):
    """Dropout that belongs to the record: what is dropped follows from its seed and the place in its input.

    Which others share a record's batch has no say in it. Draws from one generator for a whole
    batch would shift with every record that comes or goes, so that one record could move the
    sum of gradients by more than the clip norm, and another token budget would be another
    computation. Without seeds it does nothing.

    Parameters
    ----------
    probability : of an input to be dropped
    layer : tells the draws of this layer from those of others
    """

    def __init__(self, probability: float, layer: int) -> None:
        super().__init__()
        self.probability = probability
        self.layer = layer
        self.seeds: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.seeds is None:
            return inputs
        rows = inputs.reshape(len(self.seeds), -1)
        places = torch.arange(rows.shape[1], device=rows.device) * _GOLDEN
        draws = _mixed(_mixed(self.seeds + self.layer)[:, None] + places)
        kept = _shifted(draws, 11) >= int(self.probability * 2**53)
        return (rows * kept / (1 - self.probability)).reshape(inputs.shape)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Shift right and fill with zeros; torch itself fills with the sign."""
    return (bits >> count) & (2 ** (64 - count) - 1)


def _mixed(bits: Tensor) -> Tensor:
    """Return 64 bits that depend on all 64 given ones (SplitMix64, Steele, Lea and Flood 2014); int64."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)
