"""Local files, saved directories and the hub's layout: the same records out of each."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from fedpipe.config import DataSettings
from fedpipe.data.sources import fetch_data, read_records
from fedpipe.errors import DataError
from fedpipe.files import file_digest, read_sealed

TEXTS = ["good, really", 'a "quoted"\nline', "bad", "naïve café", "so-so", "fine"]
LABELS = ["pos", "pos", "neg", "pos", "neg", "pos"]
FILMS = ["a", "a", "b", "b", "c", "c"]
COLUMNS = {"text": TEXTS, "label": LABELS, "film": FILMS}


def csv_bytes(delimiter: str = ",") -> bytes:
    quoted = [
        [f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row] for row in zip(*COLUMNS.values(), strict=True)
    ]
    return "\n".join(delimiter.join(row) for row in [list(COLUMNS), *quoted]).encode()


def write_source(kind: str, where: Path) -> Path:
    path = where / f"records.{kind}"
    if kind.startswith("csv") or kind == "tsv":
        content = csv_bytes("\t" if kind == "tsv" else ",")
        compress = {"csv.bz2": bz2.compress, "csv.gz": gzip.compress}.get(kind, bytes)
        path.write_bytes(compress(content))
    elif kind == "parquet":
        pa.parquet.write_table(pa.table(COLUMNS), path)
    elif kind == "jsonl":
        rows = zip(*COLUMNS.values(), strict=True)
        path.write_text("\n".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in rows))
    elif kind == "saved":
        datasets.Dataset.from_dict(COLUMNS).save_to_disk(str(path))
    elif kind == "saved splits":
        halves = {
            name: datasets.Dataset.from_dict({column: values[part] for column, values in COLUMNS.items()})
            for name, part in (("train", slice(0, 4)), ("test", slice(4, 6)))
        }
        datasets.DatasetDict(halves).save_to_disk(str(path))
    else:
        (path / "data").mkdir(parents=True)
        pa.parquet.write_table(pa.table(COLUMNS), path / "data" / "train-00000-of-00001.parquet")
    return path


KINDS = ["csv", "csv.bz2", "csv.gz", "tsv", "parquet", "jsonl", "saved", "saved splits", "folder"]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw"


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_records(kind: str, tmp_path: Path, raw: Path) -> None:
    settings = DataSettings(source=str(write_source(kind, tmp_path)), group="film")
    origin = fetch_data(settings, raw)
    assert read_sealed(raw / "origin.json") == origin
    table = read_records(settings, raw, column="film")
    assert table.to_pydict() == {"text": TEXTS, "label": LABELS, "group": FILMS, "column": FILMS}
    assert set(table.schema.types) == {pa.string()}
    before = (raw / "origin.json").read_bytes()
    fetch_data(settings, raw)
    assert (raw / "origin.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "saved"])
def test_local_records_are_not_copied_and_a_change_is_noticed(kind: str, tmp_path: Path, raw: Path) -> None:
    path = write_source(kind, tmp_path)
    settings = DataSettings(source=str(path))
    fetch_data(settings, raw)
    assert [file.name for file in raw.iterdir()] == ["origin.json"]
    changed = next(path.glob("data-*.arrow")) if path.is_dir() else path
    changed.write_bytes(changed.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"changed since fetch; run `fedpipe fetch` again"):
        read_records(settings, raw)
    changed.unlink()
    with pytest.raises(DataError, match="missing since fetch"):
        read_records(settings, raw)


def test_the_splits_of_a_source_are_noted(tmp_path: Path, raw: Path) -> None:
    assert fetch_data(DataSettings(source=str(write_source("saved splits", tmp_path))), raw)["splits"] == "train, test"
    origin = fetch_data(DataSettings(source=str(write_source("folder", tmp_path))), raw)
    assert origin["splits"] == "train"
    assert origin["files"] == {"records.parquet": file_digest(raw / "records.parquet")}


def test_class_numbers_become_their_names(tmp_path: Path, raw: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    rows.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    rows.to_parquet(tmp_path / "folder" / "train.parquet")
    for source in ("saved", "folder", "folder/train.parquet"):
        settings = DataSettings(source=str(tmp_path / source))
        fetch_data(settings, raw)
        assert read_records(settings, raw).to_pydict() == {"text": ["a", "b"], "label": ["yes", "no"]}


def test_a_label_stays_as_it_is_written(tmp_path: Path, raw: Path) -> None:
    path = tmp_path / "codes.csv"
    path.write_text("body,code\nx,01\ny,1\nz,NA\n")
    settings = DataSettings(source=str(path), text="body", label="code")
    fetch_data(settings, raw)
    assert read_records(settings, raw)["label"].to_pylist() == ["01", "1", "NA"]


def test_number_labels_become_text(tmp_path: Path, raw: Path) -> None:
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n{"text": "c", "label": null}\n')
    settings = DataSettings(source=str(path))
    fetch_data(settings, raw)
    assert read_records(settings, raw).to_pydict() == {"text": ["a", "b"], "label": ["0", "1"]}


def test_empty_and_repeated_records_are_left_out(tmp_path: Path, raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "records.csv"
    path.write_text("text,label,film\none,a,x\n  ,a,x\ntwo,,x\nthree,b,\none,b,y\nOne,b,y\ntwo,b,y\n")
    settings = DataSettings(source=str(path), group="film")
    fetch_data(settings, raw)
    with caplog.at_level(logging.INFO, logger="fedpipe"):
        table = read_records(settings, raw)
    assert table.to_pydict() == {"text": ["one", "One", "two"], "label": ["a", "b", "b"], "group": ["x", "y", "y"]}
    assert "left out 3 records with an empty text or label or group" in caplog.text
    assert "left out 1 records whose text came before" in caplog.text
    kept = read_records(settings.model_copy(update={"deduplicate": False}), raw)
    assert kept["text"].to_pylist() == ["one", "one", "One", "two"]


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, raw: Path) -> None:
    path = write_source("csv", tmp_path)
    fetch_data(DataSettings(source=str(path)), raw)
    with pytest.raises(DataError) as error:
        read_records(DataSettings(source=str(path), text="texts"), raw)
    assert "data.text: no column 'texts'" in str(error.value)
    assert "text, label, film; did you mean 'text'?" in str(error.value)
    with pytest.raises(DataError, match=r"data\.group: no column 'movie'"):
        read_records(DataSettings(source=str(path), group="movie"), raw)
    with pytest.raises(DataError, match=r"partition\.column: no column 'films'.*did you mean 'film'"):
        read_records(DataSettings(source=str(path)), raw, column="films")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "cannot be read: Empty CSV file"),
        ("a.csv", b"text,label\na,b,c\n", "Expected 2 columns, got 3"),
        ("a.csv", b"text,label\n\xff\xfe,b\n", "invalid UTF8"),
        ("a.csv", b"text,label\n,\n", "holds no record"),
        ("a.csv.bz2", b"text,label\na,b\n", "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.jsonl", b'{"text": "a"\n', "cannot be read"),
        ("a.xlsx", b"", r"unknown kind of file; expected one of: \.csv"),
    ],
)
def test_bad_files_are_one_line(name: str, content: bytes, message: str, tmp_path: Path, raw: Path) -> None:
    (tmp_path / name).write_bytes(content)
    settings = DataSettings(source=str(tmp_path / name))

    def fetch_and_read() -> None:
        fetch_data(settings, raw)
        read_records(settings, raw)

    with pytest.raises(DataError, match=message) as error:
        fetch_and_read()
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.source: nothing\.csv: no such file"):
        fetch_data(DataSettings(source="nothing.csv"), raw)
    with pytest.raises(DataError, match="no data here yet; run `fedpipe fetch`"):
        read_records(DataSettings(source="nothing.csv"), raw)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is not a folder of data files") as error:
        fetch_data(DataSettings(source=str(tmp_path / "empty")), raw)
    assert "\n" not in str(error.value)


def test_data_fetched_for_another_source_are_refused(tmp_path: Path, raw: Path) -> None:
    fetch_data(DataSettings(source=str(write_source("csv", tmp_path))), raw)
    with pytest.raises(DataError, match=r"records\.csv', but data\.source is 'other\.csv'; run `fedpipe fetch`"):
        read_records(DataSettings(source="other.csv"), raw)


def test_another_source_removes_what_the_first_left_and_nothing_else(tmp_path: Path, raw: Path) -> None:
    fetch_data(DataSettings(source=str(write_source("folder", tmp_path))), raw)
    (raw / "notes.txt").write_text("mine")
    fetch_data(DataSettings(source=str(write_source("csv", tmp_path))), raw)
    assert {file.name for file in raw.iterdir()} == {"origin.json", "notes.txt"}
    with pytest.raises(DataError, match="move it elsewhere"):
        fetch_data(DataSettings(source=str(raw / "notes.txt")), raw)


def test_a_hub_id_is_loaded_once(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str) -> datasets.DatasetDict:
        asked.append(name)
        split = datasets.Dataset.from_dict(COLUMNS)
        split.info.download_checksums = {f"hf://datasets/{name}@0123abc/data/train.parquet": {}}
        split.info.license = "cc-by-4.0"
        return datasets.DatasetDict(train=split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = DataSettings(source="someone/reviews", group="film")
    origin = fetch_data(settings, raw)
    assert (origin["kind"], origin["version"], origin["license"]) == ("hub", "0123abc", "cc-by-4.0")
    assert fetch_data(settings, raw) == origin
    assert asked == ["someone/reviews"]
    assert read_records(settings, raw)["text"].to_pylist() == TEXTS


def test_an_unreachable_hub_is_one_line(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str) -> datasets.DatasetDict:
        raise ConnectionError(f"Couldn't reach '{name}'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as error:
        fetch_data(DataSettings(source="someone/reviews"), raw)
    assert str(error.value) == (
        "data.source: 'someone/reviews' cannot be loaded from the hub; check the id and the network: "
        "Couldn't reach 'someone/reviews' on the Hub"
    )
