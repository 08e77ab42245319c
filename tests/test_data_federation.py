"""A partition on disk: complete, repeatable, checked, and known to DVC by the same string."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from ruamel.yaml import YAML

from fedpipe.config import Settings, parse_settings
from fedpipe.data.federation import Federation, directory_digest, write_partition
from fedpipe.data.sources import fetch_data
from fedpipe.errors import DataError, StorageError
from fedpipe.files import file_digest, read_sealed

RECORDS = 240


@pytest.fixture
def source(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    path = tmp_path / "reviews.csv"
    rows = [f"sentence number {i},{'pos' if generator.random() < 0.6 else 'neg'},film {i % 24}" for i in range(RECORDS)]
    path.write_text("\n".join(["text,label,film", *rows]) + "\n")
    return path


@pytest.fixture
def make(source: Path, tmp_path: Path):
    """Return a function that writes a partition, with changes to the settings, into a directory."""

    def write(name: str = "partition", **partition: object) -> tuple[Settings, Path]:
        values = {
            "data": {"source": str(source), "group": "film"},
            "partition": {"scheme": "dirichlet", "clients": 4, "alpha": 1.0, "min_records": 10, **partition},
            "model": {"backbone": "none"},
            "federation": {"clients_per_round": None},
        }
        settings = parse_settings(values)
        fetch_data(settings.data, tmp_path / "raw")
        write_partition(settings, tmp_path / "raw", tmp_path / name)
        return settings, tmp_path / name

    return write


def test_what_is_written_is_what_is_read(make, source: Path) -> None:
    settings, path = make()
    federation = Federation.open(path)
    manifest = federation.manifest
    assert federation.labels == ("neg", "pos")
    assert federation.clients == ("c000", "c001", "c002", "c003")
    assert manifest["settings"]["seed"] == settings.seed
    assert manifest["source"] == read_sealed(source.parent / "raw" / "origin.json")
    seen: list[str] = []
    for entry in [*manifest["clients"], manifest["test"]]:
        records = federation.client(entry["id"]) if "id" in entry else federation.test()
        assert isinstance(records, datasets.Dataset)
        assert records.column_names == ["text", "label"]
        assert {str(feature.dtype) for feature in records.features.values()} == {"string"}
        assert len(records) == entry["records"]
        assert {name: list(records["label"]).count(name) for name in federation.labels} == entry["histogram"]
        assert file_digest(path / entry["file"]) == entry["sha256"]
        stock = datasets.Dataset.from_file(str(path / entry["file"]))
        assert stock.to_dict() == records.to_dict()
        seen += records["text"]
    assert sorted(seen) == sorted(f"sentence number {i}" for i in range(RECORDS))
    assert federation.sizes == {entry["id"]: entry["records"] for entry in manifest["clients"]}
    assert {entry["name"] for entry in manifest["clients"]} == {None}


def test_no_film_is_on_both_sides(make) -> None:
    _, path = make()
    federation = Federation.open(path)

    def films(records: datasets.Dataset) -> set[int]:
        return {int(text.split()[-1]) % 24 for text in records["text"]}

    trained = set().union(*(films(federation.client(client)) for client in federation.clients))
    tested = films(federation.test())
    assert not trained & tested
    assert len(tested) == 5  # films have 10 records each: the fifth reaches 48 of 240


def test_the_same_settings_give_the_same_bytes(make) -> None:
    _, one = make("one")
    _, other = make("other")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}
    before = directory_digest(one)
    make("one")
    assert directory_digest(one) == before


def test_a_smaller_partition_leaves_nothing_of_a_larger_one(make) -> None:
    _, path = make(scheme="iid", clients=6)
    (path / ".c000.arrow.x.tmp").write_bytes(b"left by a killed process")
    make(scheme="iid", clients=2)
    assert {file.name for file in path.iterdir()} == {"c000.arrow", "c001.arrow", "test.arrow", "manifest.json"}


def test_natural_clients_have_names(make) -> None:
    _, path = make(scheme="natural", clients=None, column="film")
    federation = Federation.open(path)
    names = [entry["name"] for entry in federation.manifest["clients"]]
    assert names == sorted(names)
    assert len(names) == 24 - 5
    assert set(federation.sizes.values()) == {10}
    _, path = make(scheme="natural", clients=3, column="film")
    names = [name for entry in Federation.open(path).manifest["clients"] for name in entry["name"]]
    assert len(names) == len(set(names)) == 24 - 5


def test_working_on_the_records_leaves_the_directory_alone(make) -> None:
    _, path = make()
    before = directory_digest(path)
    federation = Federation.open(path)
    federation.client("c000").map(lambda row: {"length": len(row["text"])})
    assert directory_digest(path) == before == federation.digest


def test_damage_is_found_and_told(make) -> None:
    _, path = make()
    federation = Federation.open(path)
    content = bytearray((path / "c001.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "c001.arrow").write_bytes(content)
    (path / "test.arrow").unlink()
    federation.client("c000")
    with pytest.raises(
        DataError, match=r"c001\.arrow: damaged: .*run `fedpipe partition` \(or `dvc repro partition`\)"
    ):
        federation.client("c001")
    with pytest.raises(DataError, match=r"test\.arrow: cannot be read: No such file.*`fedpipe partition`"):
        federation.test()
    with pytest.raises(DataError, match=r"no client 'c01'; did you mean 'c00?1'"):
        federation.client("c01")


@pytest.mark.parametrize("content", [b"", bytes(2000)])
def test_what_a_power_failure_tore_is_refused_and_dealt_again(make, content: bytes) -> None:
    _, path = make()
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    (path / "c001.arrow").write_bytes(content)
    for use in (lambda: Federation.open(path).client("c001"), Federation.open(path).verify):
        with pytest.raises(DataError, match=r"c001\.arrow: damaged: .*; run `fedpipe partition`"):
            use()
    make()
    Federation.open(path).verify()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_only_the_manifest_waits_for_the_disk(make, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    _, path = make()
    inside = [name for name in flushed if name.startswith(str(path))]
    assert len(inside) == 2
    assert "manifest.json" in inside[0]
    assert inside[1] == str(path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 99}'])
def test_a_damaged_manifest_is_refused(content: str, make) -> None:
    _, path = make()
    (path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json.*`fedpipe partition`"):
        Federation.open(path)


def test_no_partition_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no complete partition here; run `fedpipe partition`"):
        Federation.open(tmp_path)


def test_a_stale_partition_names_the_changed_keys(make) -> None:
    settings, path = make()
    federation = Federation.open(path)
    federation.check_fresh(settings)
    longer = settings.data.model_copy(update={"max_length": 128})
    federation.check_fresh(settings.model_copy(update={"data": longer}))
    partition = settings.partition.model_copy(update={"alpha": 0.1})
    with pytest.raises(DataError) as error:
        federation.check_fresh(settings.model_copy(update={"partition": partition, "seed": 18}))
    assert "stale partition: partition.alpha 1.0 -> 0.1, seed 17 -> 18; run `dvc repro`" in str(error.value)


def test_an_impossible_partition_keeps_the_one_there_is(make) -> None:
    _, path = make()
    before = directory_digest(path)
    with pytest.raises(DataError, match=r"partition\.min_records"):
        make(min_records=1000)
    assert directory_digest(path) == before


def test_a_place_that_cannot_be_written_is_told(make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        make("file/partition")


def test_the_digest_is_the_one_in_dvc_lock(make, tmp_path: Path) -> None:
    _, path = make()
    (path / "sub").mkdir()
    (path / "sub" / "naïve.txt").write_text("a\r\nb\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  partition:\n    cmd: echo nothing\n    outs:\n      - partition\n")
    quiet = {**os.environ, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(tmp_path / "site")}
    for command in (["init", "--no-scm", "--quiet"], ["commit", "--force", "--quiet"]):
        subprocess.run(
            [sys.executable, "-m", "dvc", *command], cwd=tmp_path, env=quiet, check=True, capture_output=True
        )
    lock = YAML(typ="safe", pure=True).load((tmp_path / "dvc.lock").read_text())
    (out,) = lock["stages"]["partition"]["outs"]
    assert out["nfiles"] == 7
    assert Federation.open(path).digest == out["md5"]
