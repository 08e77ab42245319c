"""The same sums, to the bit, for any cohorts, any micro-batches, any number of workers and any order of clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CPU, State, make_records, random_state
from tiny import make_backbone

from fedpipe.client import exact
from fedpipe.client.batching import Budget
from fedpipe.client.clip import JOINT, PerFactor
from fedpipe.client.engine import CohortEngine
from fedpipe.client.objectives import Contrast
from fedpipe.client.raw import full_gradients
from fedpipe.config import LoraSettings
from fedpipe.models import steady
from fedpipe.models.lora import AdaptedModel, build_model
from fedpipe.models.source import Backbone
from fedpipe.models.task import Encoded, TextClassification
from fedpipe.server.evaluate import evaluate

CLIENTS, RECORDS = 5, 10
TOKENS = [1, 20, 40, 100, 10_000]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    backbone = Backbone(make_backbone(tmp_path_factory.mktemp("same_bytes") / "backbone"), "0" * 64, "tiny", {})
    settings = LoraSettings(rank=2, alpha=4.0, dropout=0.3)
    return build_model(backbone, TextClassification(("bad", "good")), settings, 0)


def long_and_short(seed: int = 0) -> list[Encoded]:
    """Records of one token and of more than two whole widths, of exactly one, as long as may be, and between."""
    made, generator = [], np.random.default_rng(seed)
    for own in make_records(CLIENTS, RECORDS, seed):
        lengths = generator.integers(1, 22, RECORDS)
        lengths[:5] = 8, 16, 1, 21, 20
        tokens = generator.integers(5, 25, lengths.sum())
        made.append(replace(own, tokens=tokens, offsets=np.cumsum([0, *lengths]), room=21))
    return made


def trained_in(
    model: AdaptedModel, cohorts: Sequence[Sequence[int]], tokens: int, workers: int, how: str, clip_norm: float | None
) -> State:
    """Return each client's sum, (clients, *shape), computed in these cohorts."""
    generator = np.random.default_rng(5)
    records, state = long_and_short(), random_state(model.specs, CLIENTS)
    batches = [np.sort(generator.choice(RECORDS, size, replace=False)) for size in (1, 4, 10, 0, 7)]
    seeds = [generator.integers(0, 2**60, RECORDS) for _ in batches]
    groups = [generator.integers(0, 4, RECORDS) for _ in batches]
    if how == "groups":
        batches = [np.flatnonzero(np.isin(own, own[batch])) for own, batch in zip(groups, batches, strict=True)]
    others = [random_state(model.specs, CLIENTS, seed) for seed in (1, 2)]
    found = {spec.name: torch.zeros(CLIENTS, *spec.shape) for spec in model.specs}
    engine = CohortEngine([model.to_batched() for _ in range(workers)], CPU, "fp32", Budget(tokens))
    for cohort in cohorts:
        rows = list(cohort)
        received, previous = ({name: tensor[rows] for name, tensor in other.items()} for other in others)
        contrast = Contrast(received, previous, 0.5 * torch.tensor(rows), 0.5)
        sums = engine.clipped_sums(
            {name: tensor[rows] for name, tensor in state.items()},
            [records[row] for row in rows],
            [batches[row] for row in rows],
            model.specs,
            clip_norm,
            [seeds[row] for row in rows] if how == "dropout" else None,
            PerFactor() if how == "per-factor" else JOINT,
            contrast if how == "contrast" else None,
            [groups[row] for row in rows] if how == "groups" else None,
        )
        for name, total in sums.items():
            found[name][rows] = total
    return found


COHORTS = st.permutations(range(CLIENTS)).flatmap(
    lambda order: st.sets(st.integers(1, CLIENTS - 1)).map(
        lambda cuts: [part.tolist() for part in np.split(np.array(order), sorted(cuts))]
    )
)


@pytest.mark.parametrize("how", ["records", "groups", "per-factor", "dropout", "contrast"])
@settings(max_examples=12, deadline=None)
@given(
    cohorts=COHORTS,
    tokens=st.sampled_from(TOKENS),
    workers=st.sampled_from([1, 2]),
    clip_norm=st.sampled_from([None, 0.1, 3.0]),
)
def test_sums_have_the_same_bits(
    model: AdaptedModel, how: str, cohorts: list[list[int]], tokens: int, workers: int, clip_norm: float | None
) -> None:
    expected = trained_in(model, [range(CLIENTS)], 60, 1, how, clip_norm)
    found = trained_in(model, cohorts, tokens, workers, how, clip_norm)
    for name, total in expected.items():
        assert torch.equal(found[name], total), name
    assert all(total[[0, 1, 2, 4]].flatten(1).any() for total in expected.values())  # there is something to compare


@pytest.mark.parametrize("tokens", TOKENS)
def test_so_do_evaluation_and_whole_gradients(model: AdaptedModel, tokens: int) -> None:
    records, adapter = long_and_short()[0], {n: t[0] for n, t in random_state(model.specs, 1).items()}
    twins = [model.to_batched(), model.to_batched()]
    found, expected = (evaluate(twins, adapter, records, CPU, "fp32", Budget(size)) for size in (tokens, 60))
    assert found == expected
    found, expected = (full_gradients(twins[0], adapter, records, CPU, size) for size in (tokens, 60))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


NUMBERS = st.floats(-50, 50, width=32)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12), st.randoms(), st.integers(1, 5))
def test_sums_do_not_depend_on_order_or_grouping(rows: list[tuple[float, float]], random, size: int) -> None:
    gradient, unit = torch.tensor(rows), exact.unit_of(1.0)

    def total(order: list[int], cuts: list[int]) -> torch.Tensor:
        parts = np.split(np.array(order), cuts)
        sums = (
            exact.sums(gradient[part], torch.zeros(len(part), dtype=torch.int64), 1, unit)
            for part in parts
            if len(part)
        )
        return sum(sums, torch.zeros(1, 2, dtype=torch.float64))

    order = list(range(len(rows)))
    whole = total(order, [])
    random.shuffle(order)
    assert torch.equal(total(order, list(range(size, len(order), size))), whole)
    torch.testing.assert_close(whole[0], gradient.double().sum(0), rtol=0, atol=len(rows) * unit)


@given(st.floats(1e-6, 1e6))
def test_no_record_exceeds_its_norm_by_being_cut(clip_norm: float) -> None:
    gradient = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([clip_norm / float(gradient.double().norm())], dtype=torch.float64)
    one = torch.zeros(1, dtype=torch.int64)
    clipped = exact.sums(gradient, one, 1, exact.unit_of(clip_norm), factors)
    assert float(clipped.norm()) <= clip_norm * (1 + 1e-15)
    assert float(clipped.norm()) == pytest.approx(clip_norm, rel=1e-9)


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=50))
def test_widths_are_whole_eights_and_waste_little(lengths: list[int]) -> None:
    widths = steady.widths(np.array(lengths))
    assert all(width % 8 == 0 and length < width for width, length in zip(widths, lengths, strict=True))
    assert all(width - length <= max(8, length / 4 + 1) for width, length in zip(widths, lengths, strict=True))


def test_widths_stay_within_the_room() -> None:
    records = long_and_short()[0]
    assert set(replace(records, room=None).widths) <= {8, 16, 24}
    assert records.widths.max() == 21
    cut, uncut = records.lengths == 21, records.lengths == 20
    assert set(records.kinds[cut]) == {43}
    assert set(records.kinds[uncut]) == {42}
