"""An update of any bytes or tensors: refused with a reason, or used like an honest one; the others count as ever."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import EXPLORED, ODD_TEXTS, SCALARS, changed_bytes, changed_tree, only_told, snapshot, tried
from hypothesis import given
from hypothesis import strategies as st
from made_rounds import make_round
from safetensors.torch import save
from torch import Tensor

from fedpipe.client.prefix import read_prefix
from fedpipe.errors import StateError, TrainingError
from fedpipe.files import file_digest, read_tensors, write_sealed, write_tensors
from fedpipe.methods import CATALOGUE
from fedpipe.methods.axes import AXES
from fedpipe.models.factors import GlobalState
from fedpipe.server.checks import refuse_reason
from fedpipe.server.round import Updates, server_round

ROUND, HONEST = make_round(dtype=torch.float32)
EXPECTED = [spec for spec in ROUND.specs if spec.factor in ("A", "B", "head")]
LIAR = "client-002"
# Rules that need nothing but the updates.
RULES = ("mean", "median", "trimmed-mean", "krum", "geometric-median", "norm-bound", "ties", "fedex")
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64]
VALUES = [float("nan"), float("inf"), float("-inf"), 1e38, -3.4e38, 1e-45, -0.0, 0.0, 1e19]
CONTENT = save(HONEST[LIAR])


@st.composite
def lies(draw: st.DrawFn) -> dict[str, Tensor]:
    """An honest update with one to three things wrong."""
    update = {name: tensor.clone() for name, tensor in HONEST[LIAR].items()}
    for _ in range(draw(st.integers(1, 3))):
        if not update:
            break
        name = draw(st.sampled_from(sorted(update)))
        tensor = update[name]
        kind = draw(st.sampled_from(["value", "value", "all", "dtype", "shape", "drop", "name", "extra", "size"]))
        if kind in ("value", "all") and tensor.is_floating_point() and tensor.numel():
            place = draw(st.integers(0, tensor.numel() - 1)) if kind == "value" else slice(None)
            tensor.view(-1)[place] = draw(st.sampled_from(VALUES))
        elif kind == "dtype":
            update[name] = torch.nan_to_num(tensor.real.float()).to(draw(st.sampled_from(DTYPES)))
        elif kind == "shape":
            sizes = draw(st.lists(st.integers(0, 4), max_size=4))
            update[name] = torch.zeros(sizes)
        elif kind == "drop":
            del update[name]
        elif kind == "name":
            update[draw(st.sampled_from(ODD_TEXTS[:6]))] = update.pop(name)
        elif kind == "extra":
            update[draw(st.text(max_size=5, alphabet="ab./é"))] = torch.ones(2)
        elif kind == "size" and tensor.is_floating_point():
            update[name] = tensor * 10.0 ** draw(st.integers(-30, 30))
    return {name: tensor.contiguous() for name, tensor in update.items()}


def outcome(rule: str, updates: dict[str, Path | dict[str, Tensor]], directory: Path):
    method = replace(CATALOGUE["dp-lora"], aggregation=AXES["aggregation"][rule]())
    read = {
        name: functools.partial(read_tensors, update, file_digest(update))
        if isinstance(update, Path)
        else functools.partial(dict, update)
        for name, update in updates.items()
    }
    given = Updates(read=read, started={}, shares={})
    return server_round(method, ROUND, GlobalState(ROUND.start), {}, given, 5, lambda name: torch.zeros(6, 5))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("updates")


def refused_or_harmless(rule: str, lie: dict[str, Tensor], directory: Path) -> None:
    path = directory / "lie.safetensors"
    write_tensors(path, lie)
    before = snapshot(directory)
    try:
        result = outcome(rule, {**HONEST, LIAR: path}, directory)
    except TrainingError:  # too few are left for the rule
        result = None
    if result is None:
        assert refuse_reason(lie, EXPECTED, ROUND.start)
        return
    assert snapshot(directory) == before
    reason = refuse_reason(lie, EXPECTED, ROUND.start)
    assert result.refused == ({LIAR: reason} if reason else {})
    for name, tensor in result.state.adapter.items():
        assert torch.isfinite(tensor).all()
        assert tensor.shape == ROUND.start[name].shape
    if reason:
        without = outcome(rule, {name: own for name, own in HONEST.items() if name != LIAR}, directory)
        for name, tensor in without.state.adapter.items():
            torch.testing.assert_close(result.state.adapter[name], tensor, rtol=0, atol=0)


def test_the_honest_round_is_taken(directory: Path) -> None:
    for rule in RULES:
        assert not outcome(rule, HONEST, directory).refused


@tried(150)
@given(rule=st.sampled_from(RULES), lie=lies())
def test_lying_clients(rule: str, lie: dict[str, Tensor], directory: Path) -> None:
    refused_or_harmless(rule, lie, directory)


def tensors_or_told(content: bytes, directory: Path) -> None:
    path = directory / "file.safetensors"
    path.write_bytes(content)
    with only_told():
        read = read_tensors(path)
        assert sum(tensor.numel() * tensor.element_size() for tensor in read.values()) <= len(content)
        refuse_reason(read, EXPECTED, ROUND.start)
    if content != CONTENT:
        with pytest.raises(StateError, match="damaged"):
            read_tensors(path, SHA256)


SHA256 = hashlib.sha256(CONTENT).hexdigest()
LENGTH = struct.unpack("<Q", CONTENT[:8])[0]
HEADER = json.loads(CONTENT[8 : 8 + LENGTH])


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Another header before the same numbers, with a length that is true, or is not."""
    text = json.dumps(draw(changed_tree(HEADER))).encode()
    length = draw(st.just(len(text)) | st.sampled_from([0, 1, 2**31, 2**40, 2**63, 2**64 - 1, 100_000_001]))
    return struct.pack("<Q", length) + text + CONTENT[8 + LENGTH :]


FILES = st.one_of(st.binary(max_size=80), changed_bytes(CONTENT), headers())


@tried(400)
@given(content=FILES)
def test_files(content: bytes, directory: Path) -> None:
    tensors_or_told(content, directory)


@pytest.mark.slow
@tried(EXPLORED)
@given(content=FILES, rule=st.sampled_from(RULES), lie=lies())
def test_many_more(content: bytes, rule: str, lie: dict[str, Tensor], directory: Path) -> None:
    tensors_or_told(content, directory)
    refused_or_harmless(rule, lie, directory)


@tried(150)
@given(data=st.data())
def test_what_the_frozen_layers_left(data: st.DataObject, directory: Path) -> None:
    """Arrays whose digest is right, too: they are NumPy's format, which may ask to be unpickled."""
    path = directory / "prefix.npy"
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(path, rows)
    path.write_bytes(data.draw(changed_bytes(path.read_bytes())))
    if data.draw(st.booleans()):
        write_sealed(path.with_suffix(".json"), {"rows": file_digest(path)})
    elif data.draw(st.booleans()):
        path.with_suffix(".json").write_text(json.dumps(data.draw(SCALARS)))
    found = read_prefix(path, 4)
    assert found is None or (found.shape[0], found.dtype) == (4, np.float32)


def test_an_array_of_objects_is_not_unpickled(directory: Path) -> None:
    path = directory / "objects.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    write_sealed(path.with_suffix(".json"), {"rows": file_digest(path)})
    assert read_prefix(path) is None
