"""Unit group from the file of records to the reports: whole groups at one client, bounded, planned, accounted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_backbone, tiny_values, write_records

from fedpipe.config import PartitionSettings, Settings, parse_settings
from fedpipe.data.federation import Federation, directory_digest, write_partition
from fedpipe.data.groups import within_bound
from fedpipe.data.partition import assign
from fedpipe.data.sources import fetch_data
from fedpipe.errors import DataError, PrivacyError, SettingsError
from fedpipe.files import read_json
from fedpipe.methods import compose
from fedpipe.methods.rules import warnings_for
from fedpipe.models.source import fetch_backbone
from fedpipe.plan import Plan, make_plan
from fedpipe.privacy.accounting import epsilon_prv
from fedpipe.privacy.recompute import verify_ledger
from fedpipe.project import Project
from fedpipe.publish import publish
from fedpipe.report import html
from fedpipe.report.data import load
from fedpipe.report.final import evaluate_adapter
from fedpipe.steps import prepare, run_round

AUTHORS = 70
GROUP: dict[str, Any] = {"unit": "group", "group": "author", "group_records": 4}


def add_authors(path: Path, authors: int = AUTHORS) -> None:
    """Give each record an author; the later an author's number, the more records."""
    head, *rows = path.read_text().splitlines()
    who = np.random.default_rng(1).choice(authors, len(rows), p=np.arange(1, authors + 1) / sum(range(authors + 1)))
    path.write_text(
        "\n".join([f"{head},author", *(f"{row},a{number:02d}" for row, number in zip(rows, who, strict=True))])
    )


def made(root: Path, backbone: bool = False, **sections: Mapping[str, Any]) -> tuple[Project, Settings]:
    """A tiny project whose records have authors, fetched and not yet dealt."""
    root.mkdir(parents=True, exist_ok=True)
    add_authors(write_records(root / "records.csv"))
    values = {"privacy": {**GROUP, **sections.pop("privacy", {})}, **sections}
    values["federation"] = {"rounds": 2, "local_steps": 2, "batch_size": 8, **sections.get("federation", {})}
    found, project = parse_settings(tiny_values(root, **values)), Project(root)
    (root / "params.yaml").write_text(json.dumps(tiny_values(root, **values)))
    fetch_data(found.data, project.raw)
    if backbone:
        make_backbone(root / "backbone", spread=0.3)
        fetch_backbone(found.model.backbone, project.backbone)
    return project, found


def authors_of(path: Path) -> dict[str, set[str]]:
    """Whose records the source says that each text is of."""
    owners: dict[str, set[str]] = {}
    for row in path.read_text().splitlines()[1:]:
        text, _, _, author = row.split(",")
        owners.setdefault(text, set()).add(author)
    return owners


SCHEMES = (
    {"scheme": "iid"},
    {"scheme": "dirichlet", "alpha": 0.5},
    {"scheme": "shards", "shards_per_client": 2},
    {"scheme": "natural", "column": "author"},
)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme["scheme"])
def test_no_group_stands_at_two_clients_or_in_the_test(scheme: dict[str, Any], tmp_path: Path) -> None:
    project, found = made(tmp_path, partition={"clients": 3, "min_records": 20, **scheme})
    manifest = write_partition(found, project.raw, project.partition)
    federation = Federation.open(project.partition)
    federation.check_fresh(found, project.raw)
    source, seen, kept = authors_of(tmp_path / "records.csv"), set(), 0
    for client in federation.clients:
        records = federation.client(client)
        held = set(records["group"])
        assert not held & seen
        seen |= held
        kept += len(records)
        assert federation.groups[client] == len(held) == manifest["clients"][int(client[1:])]["groups"]
        assert max(map(records["group"][:].count, held)) <= 4
        assert all(group in source[text] for text, group in zip(records["text"], records["group"], strict=True))
    test = federation.test()
    assert test.column_names == ["text", "label"]
    assert len(seen) < AUTHORS  # the rest is in the test, whole
    assert manifest["left_out"] == 400 - len(test) - kept > 0
    again = directory_digest(project.partition)
    write_partition(found, project.raw, project.partition)
    assert directory_digest(project.partition) == again


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_scheme_deals_whole_groups(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=12, max_size=40))
    groups = np.repeat([f"g{number}" for number in range(len(sizes))], sizes).astype(object)
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(len(groups))
    labels = np.array(["x", "y"], dtype=object)[(np.arange(len(groups)) + order) % 2]
    options = data.draw(
        st.sampled_from([{"scheme": "iid"}, {"scheme": "dirichlet", "alpha": 5.0}, {"scheme": "shards"}])
    )
    wanted = PartitionSettings(clients=3, min_records=1, **options)
    parts = assign(wanted, labels, None, data.draw(st.integers(0, 9)), groups[order])
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(groups)))
    held = [set(groups[order][part]) for part in parts]
    assert sum(map(len, held)) == len(set.union(*held)) == len(sizes)
    if options["scheme"] == "iid":
        assert max(map(len, held)) - min(map(len, held)) <= 1


def test_without_groups_a_partition_has_none_and_its_settings_know_none(tmp_path: Path) -> None:
    project, found = made(tmp_path, privacy={"unit": "record", "group": None})
    manifest = write_partition(found, project.raw, project.partition)
    federation = Federation.open(project.partition)
    assert federation.groups is None
    assert "privacy" not in manifest["settings"]
    assert "left_out" not in manifest
    assert federation.client("c000").column_names == ["text", "label"]
    with pytest.raises(DataError, match=r'stale partition: privacy.group null -> "author"'):
        federation.check_fresh(made(tmp_path)[1])
    with pytest.raises(PrivacyError, match=r"the partition has no groups; set privacy\.group"):
        make_plan(made(tmp_path)[1], federation.sizes, None, federation.groups)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 5), st.integers(0, 3))
def test_of_a_group_so_many_records_count_whatever_the_others_are(codes: list[int], most: int, seed: int) -> None:
    groups = np.array([f"g{code}" for code in codes], dtype=object)
    kept = within_bound(groups, most, seed)
    for group in set(groups):
        own = groups == group
        assert kept[own].sum() == min(most, own.sum())
        assert (within_bound(groups[own], most, seed) == kept[own]).all()  # the others have no say


def test_which_records_count_is_not_always_the_first_ones() -> None:
    groups = np.repeat([f"g{number}" for number in range(50)], 6).astype(object)
    kept = within_bound(groups, 2, 0).reshape(50, 6)
    assert len({tuple(row) for row in kept}) > 8
    assert (within_bound(groups, 2, 1).reshape(50, 6) != kept).any()


def test_natural_refuses_to_divide_a_group(tmp_path: Path) -> None:
    project, found = made(tmp_path, partition={"scheme": "natural", "column": "topic", "clients": 3, "min_records": 1})
    with pytest.raises(DataError, match=r"privacy.group: group 'a\d\d' would be divided between clients"):
        write_partition(found, project.raw, project.partition)


def test_a_test_split_by_another_column_must_not_divide_a_group(tmp_path: Path) -> None:
    project, found = made(tmp_path, data={"group": "topic", "test_fraction": 0.3})
    with pytest.raises(DataError, match=r"group 'a\d\d' has records in training and in the test"):
        write_partition(found, project.raw, project.partition)


def test_records_of_nobody_are_refused(tmp_path: Path) -> None:
    project, found = made(tmp_path)
    path = tmp_path / "records.csv"
    path.write_text(path.read_text().replace(",a10", ",").replace(",a11", ", "))
    fetch_data(found.data, project.raw)
    with pytest.raises(DataError, match=r"privacy.group: \d+ of 400 records in .* have no value in the column"):
        write_partition(found, project.raw, project.partition)


def test_more_clients_than_groups_are_refused(tmp_path: Path) -> None:
    project, found = made(tmp_path, partition={"scheme": "iid", "clients": 80, "min_records": 1})
    with pytest.raises(DataError, match=r"80 clients, but the training records are of \d\d groups"):
        write_partition(found, project.raw, project.partition)


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"unit 'group' needs privacy.group"):
        parse_settings(tiny_values(tmp_path, privacy={"unit": "group"}))
    project, found = made(tmp_path / "nearest", privacy={"group": "autor"})
    with pytest.raises(DataError, match=r"privacy.group: no column 'autor' in .*did you mean 'author'"):
        write_partition(found, project.raw, project.partition)
    opacus = parse_settings(tiny_values(tmp_path, privacy=GROUP, runtime={"engine": "opacus"}))
    with pytest.raises(SettingsError, match=r"runtime.engine: opacus .* privacy.unit group .*use cohort"):
        compose(opacus)
    weighted = parse_settings(tiny_values(tmp_path, privacy=GROUP, method={"name": "dp-lora", "weights": "samples"}))
    with pytest.raises(SettingsError, match=r"privacy.unit group protects"):
        compose(weighted)


def test_a_column_without_the_unit_is_told_of(tmp_path: Path) -> None:
    apart = parse_settings(tiny_values(tmp_path, privacy={"group": "author"}))
    assert [note for note in warnings_for(compose(apart), apart) if "privacy.group" in note]
    fitting = parse_settings(tiny_values(tmp_path, privacy=GROUP))
    assert not [note for note in warnings_for(compose(fitting), fitting) if "privacy.group" in note]


def test_the_plan_counts_groups(tmp_path: Path) -> None:
    values = tiny_values(tmp_path, privacy=GROUP, federation={"rounds": 2, "local_steps": 2, "batch_size": 8})
    found = parse_settings(values)
    sizes, groups = {"c000": 300_000, "c001": 90, "c002": 60}, {"c000": 20_000, "c001": 30, "c002": 5}
    plan = make_plan(found, sizes, None, groups)
    by_record = make_plan(parse_settings({**values, "privacy": {"epsilon": 8.0}}), groups)
    assert plan.delta == by_record.delta == 1 / 200_000
    for client, own in plan.clients.items():
        same = by_record.clients[client]
        assert (own.records, own.groups, own.units) == (sizes[client], groups[client], groups[client])
        expected = min(8, groups[client])
        assert (own.sampling_rate, own.expected_batch) == (expected / groups[client], expected)
        assert own.noise_multiplier == same.noise_multiplier
        assert (same.groups, same.units) == (None, groups[client])
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert "groups" not in by_record.to_json()["clients"]["c000"]
    with pytest.raises(PrivacyError, match="with 20000 groups at a client"):
        make_plan(parse_settings({**values, "privacy": {**GROUP, "delta": 6e-5}}), sizes, None, groups)


@pytest.mark.parametrize("adjacency", ["add-remove", "replace-one"])
def test_a_run_is_accounted_by_groups(adjacency: str, tmp_path: Path) -> None:
    project, found = made(tmp_path, backbone=True, privacy={"adjacency": adjacency, "accountant": "rdp"})
    write_partition(found, project.raw, project.partition)
    run = prepare(project, found).run
    for number in (1, 2):
        run_round(run.root, number)
    publish(run, project)
    evaluate_adapter(project)
    ledger, federation = read_json(project.reports / "ledger.json"), Federation.open(project.partition)
    words = {"add-remove": "add/remove", "replace-one": "replace"}[adjacency] + " one group of records of one client"
    assert (ledger["unit"], ledger["adjacency"]) == ("group", words)
    for client, entry in ledger["clients"].items():
        assert (entry["records"], entry["groups"]) == (federation.sizes[client], federation.groups[client])
        assert entry["sampling_rate"] == 8 / federation.groups[client]
        assert entry["entries"] == [[run.plan.clients[client].noise_multiplier, entry["sampling_rate"], 4]]
        history = [tuple(line) for line in entry["entries"]]
        assert entry["epsilon_prv"] == epsilon_prv(history, ledger["delta"], adjacency)
        assert entry["epsilon"] <= 8.0
    verified = verify_ledger(run.root)
    assert verified.adjacency == words
    assert verified.kept
    assert verified.largest[1] == ledger["epsilon_max"] == read_json(project.reports / "metrics.json")["epsilon_rdp"]
    page = html.render(load(project))
    assert words in page
    assert " groups</td>" in page
