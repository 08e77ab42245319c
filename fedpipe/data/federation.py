"""A partition on disk, and the federation that it is when it is opened.

`write_partition` leaves one Arrow stream a client, one for the test, and, last,
`manifest.json` with the sha256 of each: a directory with a manifest is complete. The bytes
depend on the records and on the settings of the partition only. Nothing is read from a
file that is not, byte for byte, the one in the manifest. So only the manifest is flushed to
disk: what a power failure tears is refused, and dealt again to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedpipe.config import Settings
from fedpipe.data.groups import KEY, check_apart, within_bound
from fedpipe.data.origin import NAME as ORIGIN
from fedpipe.data.origin import read_origin
from fedpipe.data.partition import assign, natural_values, split_test
from fedpipe.data.sources import read_records
from fedpipe.errors import DataError, StateError, nearest
from fedpipe.files import file_digest, inside, private_directory, read_sealed, storage, write_atomic, write_sealed

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
TEST = "test.arrow"
AUDIT = "audit"  # a manifest's key for what was asked of its canaries; an ordinary partition has none
AGAIN = "run `fedpipe partition` (or `dvc repro partition`) again"


class _File(BaseModel):
    """What the manifest says of a file of records. `file` is a plain name, so it stays in the directory."""

    model_config = ConfigDict(strict=True)

    file: Annotated[str, Field(pattern=r"\A[A-Za-z0-9_-]+\.arrow\z")]
    records: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
    histogram: dict[str, Annotated[int, Field(ge=0)]]


class _Client(_File):
    id: Annotated[str, Field(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_-]*\z", max_length=64)]  # it becomes a file's name
    records: Annotated[int, Field(ge=1)]
    groups: Annotated[int, Field(ge=1)] | None = None


class _Source(BaseModel):
    model_config = ConfigDict(strict=True)

    source: str
    files: dict[str, str]


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True)

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    source: _Source
    settings: dict[str, Any]
    left_out: Annotated[int, Field(ge=0)] = 0
    labels: Annotated[list[str], Field(min_length=1)]
    clients: Annotated[list[_Client], Field(min_length=1)]
    test: _File


def write_partition(settings: Settings, raw: Path, partition: Path) -> dict[str, Any]:
    """Deal the fetched records to clients, write them into `partition`, and return the manifest.

    The same records and settings give the same bytes. Arrow files, and a manifest, that stand
    in the directory are removed first.

    Raises
    ------
    DataError
        The records cannot be read, or cannot be dealt as the settings ask.
    """
    column = settings.partition.column if settings.partition.scheme == "natural" else None
    table = read_records(settings.data, raw, column, settings.privacy.group)
    values = {name: table[name].to_numpy() for name in table.column_names if name != "text"}
    units = values.get("unit")
    training, test, left_out = _split(settings, values)
    natural = values["column"][training] if column else None
    dealt = None if units is None else units[training]
    parts = assign(settings.partition, values["label"][training], natural, settings.seed, dealt)
    names = natural_values(natural, parts) if natural is not None else [None] * len(parts)
    labels = sorted(set(values["label"]))
    records = table.select(["text", "label"])
    own = records if units is None else records.append_column("group", table["unit"])
    _clear(partition)
    clients = []
    digits = max(3, len(str(len(parts) - 1)))
    for index, (part, name) in enumerate(zip(parts, names, strict=True)):
        client = f"c{index:0{digits}d}"
        entry = write_table(partition / f"{client}.arrow", own.take(pa.array(training[part])), labels)
        clients.append({"id": client, "name": name, **entry})
    manifest = {
        "format": FORMAT,
        "source": read_origin(raw, "data"),
        "settings": partition_settings(settings),
        "labels": labels,
        "clients": clients,
        **({} if units is None else {"left_out": left_out}),
        "test": write_table(partition / TEST, records.take(pa.array(test)), labels),
    }
    write_sealed(partition / MANIFEST, manifest)
    logger.info("dealt %d records to %d clients, %d for the test", len(training), len(clients), len(test))
    return manifest


def _split(settings: Settings, values: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, int]:
    """Set the test apart; leave out of training, and count, what is beyond `privacy.group_records` of a group."""
    units, groups = values.get("unit"), values.get("group")
    by, key = (units, KEY) if groups is None and units is not None else (groups, "data.group")
    training, test = split_test(values["label"], by, settings.data.test_fraction, settings.seed, key)
    if units is None:
        return training, test, 0
    check_apart(units, training, test)
    kept = within_bound(units[training], settings.privacy.group_records, settings.seed)
    left_out, most = int(np.count_nonzero(~kept)), settings.privacy.group_records
    if left_out:
        logger.warning("left out %d training records: of a group at most %d count (%s_records)", left_out, most, KEY)
    return training[kept], test, left_out


def partition_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that a partition depends on. How long a text may be in training is none of them."""
    grouped = settings.privacy.group is not None
    return {
        "seed": settings.seed,
        "data": settings.data.model_dump(exclude={"max_length"}),
        "partition": settings.partition.model_dump(),
        **({"privacy": settings.privacy.model_dump(include={"group", "group_records"})} if grouped else {}),
    }


def _clear(partition: Path) -> None:
    """Remove an earlier partition, its manifest first, and what a killed process left of one."""
    private_directory(partition)  # it holds the clients' records
    with storage(partition):
        (partition / MANIFEST).unlink(missing_ok=True)
        for pattern in ("*.arrow", ".*.tmp"):
            for path in partition.glob(pattern):
                path.unlink()


def write_table(path: Path, table: pa.Table, labels: list[str]) -> dict[str, Any]:
    """Write records, columns `text` and `label` among them; return their entry in a manifest.

    Where there is a column `group`, its values stay in the file, and their number is told.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table.combine_chunks())
    found, counts = np.unique(table["label"].to_numpy(), return_counts=True)
    histogram = dict.fromkeys(labels, 0) | dict(zip(found.tolist(), counts.tolist(), strict=True))
    digest = write_atomic(path, sink.getvalue().to_pybytes(), durable=False)
    groups = {"groups": len(table["group"].unique())} if "group" in table.column_names else {}
    return {"file": path.name, "records": len(table), **groups, "sha256": digest, "histogram": histogram}


def directory_digest(directory: Path) -> str:
    """Return the hash that DVC 3 gives a directory, `<md5>.dir`: the same string as in `dvc.lock`.

    It is the md5 of a JSON list of the files' md5 and relative path, sorted by path; so the
    partition in a run, in `dvc.lock` and in a tracking server can be found by one string.
    """
    entries = []
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
            entries.append({"md5": content.hexdigest(), "relpath": path.relative_to(directory).as_posix()})
    entries.sort(key=lambda entry: entry["relpath"])
    listing = json.dumps(entries, sort_keys=True).encode()
    return f"{hashlib.md5(listing, usedforsecurity=False).hexdigest()}.dir"


@dataclass(frozen=True)
class Federation:
    """A partition, opened: who the clients are, and each one's records.

    Attributes
    ----------
    path : Path
        The partition's directory.
    manifest : dict
        Its `manifest.json`: source and licence, settings, sizes and label histograms.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, partition: Path) -> Federation:
        """Open a partition; its files are checked when they are used.

        Raises
        ------
        DataError
            There is no partition, or its manifest is damaged.
        """
        if not (partition / MANIFEST).exists():
            raise DataError(
                f"{partition}: no complete partition here; run `fedpipe partition` (or `dvc repro partition`)"
            )
        try:
            manifest = read_sealed(partition / MANIFEST)
        except StateError as error:
            raise DataError(f"{error}; {AGAIN}") from error
        if wrong := _wrong(manifest):
            raise DataError(f"{partition / MANIFEST}: damaged, or of another version: {wrong}; {AGAIN}")
        return cls(partition, manifest)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels' names, sorted; a label's class is its place here."""
        return tuple(self.manifest["labels"])

    @property
    def clients(self) -> tuple[str, ...]:
        """The clients' ids."""
        return tuple(self.sizes)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Records by client id. They are private: aggregation with uniform weights does not need them."""
        return {entry["id"]: entry["records"] for entry in self.manifest["clients"]}

    @cached_property
    def groups(self) -> dict[str, int] | None:
        """Groups of records by client id; None where the partition has none (`privacy.group`)."""
        entries = self.manifest["clients"]
        return None if entries[0].get("groups") is None else {entry["id"]: entry["groups"] for entry in entries}

    @property
    def canaries(self) -> dict[str, list[int]]:
        """Which records are canaries: client -> where they begin, how many. Empty but in an audit's own partition."""
        return dict(self.manifest.get(AUDIT, {}).get("slots", {}))

    @cached_property
    def digest(self) -> str:
        """The directory's DVC hash, `<md5>.dir`, at the first time of asking."""
        return directory_digest(self.path)

    @cached_property
    def _entries(self) -> dict[str, dict[str, Any]]:
        return {entry["id"]: entry for entry in self.manifest["clients"]}

    def client(self, client: str) -> datasets.Dataset:
        """Return a client's records, memory-mapped: columns `text`, `label` and, if there are groups, `group`: strings.

        Raises
        ------
        DataError
            There is no such client, or its file is missing or damaged.
        """
        if client not in self._entries:
            raise DataError(f"{self.path}: no client '{client}'; {nearest(client, self.clients)}")
        return self._dataset(self._entries[client])

    def test(self) -> datasets.Dataset:
        """Return the test records, as `client` does."""
        return self._dataset(self.manifest["test"])

    def _dataset(self, entry: dict[str, Any]) -> datasets.Dataset:
        path = self._checked(entry)
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path}: is not a table of records: {' '.join(str(error).split())}; {AGAIN}") from error
        if wrong := self._unlike(entry, table):
            raise DataError(f"{path}: is not what the manifest says: {wrong}; {AGAIN}")
        # Dataset.from_file would write the results of `map` beside the file, into DVC's output.
        # Without a fingerprint the library pickles the table to find one, which takes longer than to read it.
        return datasets.Dataset(table, fingerprint=entry["sha256"])

    def _unlike(self, entry: dict[str, Any], table: pa.Table) -> str | None:
        """Say what of a table differs from its entry: noise is planned by the number of records that it names."""
        names = ["text", "label", *(["group"] if entry.get("groups") is not None else [])]
        if table.schema.names != names or set(table.schema.types) != {pa.string()}:
            return f"expected the columns {', '.join(names)}, strings"
        if "group" in names and (table["group"].null_count or len(table["group"].unique()) != entry["groups"]):
            return f"expected {entry['groups']} groups, and no record without one"
        if len(table) != entry["records"]:
            return f"{len(table)} records, expected {entry['records']}"
        known = pc.is_in(table["label"], pa.array(self.labels, pa.string()))
        if table["text"].null_count or not pc.all(known, min_count=0).as_py():
            return "a record without a text, or with a label that is none of the manifest's"
        return None

    def _checked(self, entry: dict[str, Any]) -> Path:
        path = inside(self.path, entry["file"])
        try:
            found = file_digest(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; {AGAIN}") from error
        if found != entry["sha256"]:
            raise DataError(f"{path}: damaged: its sha256 is not the manifest's; {AGAIN}")
        return path

    def verify(self) -> None:
        """Check all files against the manifest.

        Raises
        ------
        DataError
            A file is missing or damaged.
        """
        for entry in (*self.manifest["clients"], self.manifest["test"]):
            self._checked(entry)

    def check_fresh(self, settings: Settings, raw: Path | None = None) -> None:
        """Check that this partition is the one that `settings` ask for.

        Parameters
        ----------
        raw
            Where the records were fetched to. Where they are there, they must be the ones that
            were dealt; a partition can also be used without them.

        Raises
        ------
        DataError
            It was made with other settings, and the message names each key, old and new value; or
            of other records.
        """
        old, new = _flat(self.manifest["settings"]), _flat(partition_settings(settings))
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if changed:
            listed = ", ".join(f"{key} {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}" for key in changed)
            raise DataError(f"{self.path}: stale partition: {listed}; run `dvc repro` or `fedpipe partition`")
        source = self.manifest["source"]
        if raw is not None and (raw / ORIGIN).exists() and read_origin(raw, "data")["files"] != source["files"]:
            raise DataError(
                f"{self.path}: stale partition: {source['source']} has other records now; "
                "run `dvc repro` or `fedpipe partition`"
            )


def _wrong(manifest: dict[str, Any]) -> str | None:
    """Say what of a manifest cannot be used; a partition may come from somebody else."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    ids = [entry["id"] for entry in manifest["clients"]]
    files = [entry["file"] for entry in (*manifest["clients"], manifest["test"])]
    if len(set(ids)) != len(ids) or len(set(files)) != len(files):
        return "two clients have one id or one file"
    if len({entry.get("groups") is None for entry in manifest["clients"]}) > 1:
        return "some clients have groups, and some have not"
    if len(set(manifest["labels"])) != len(manifest["labels"]):
        return "labels: one is there twice"
    return None


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(
            {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        )
    return flat
