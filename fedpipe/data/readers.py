"""Tables of records, whatever they are stored in: their columns first, their contents when asked.

Every column that is asked for comes back as strings: a label is a name, and "01" in a
file stays "01". A column of class numbers that carries its names (the `datasets` library
stores them so) comes back as these names; a number without a name, such as the -1 of a
hidden label, becomes null.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from fedpipe.errors import DataError, FedpipeError
from fedpipe.files import inside, read_json

if TYPE_CHECKING:
    import datasets

CSV = (".csv", ".csv.bz2", ".csv.gz")
TSV = (".tsv", ".tsv.bz2", ".tsv.gz")
PARQUET = (".parquet",)
JSONL = (".jsonl", ".jsonl.gz")
SUFFIXES = CSV + TSV + PARQUET + JSONL

# A few kilobytes can unpack to more than a disk holds. Text packs 3 to 10 times smaller, rarely 50 times.
FREE_BYTES = 2**28  # that any file may unpack to
MOST_TIMES = 200  # its own size, beyond
FREE_ROWS = 2**20


@dataclass(frozen=True)
class Reader:
    """An opened table: `names` are its columns, `read(names)` returns some of them as strings.

    `splits` names the splits that were joined, where the source has splits.
    """

    names: tuple[str, ...]
    read: Callable[[Sequence[str]], pa.Table]
    splits: tuple[str, ...] = ()


def open_file(path: Path) -> Reader:
    """Open a file by its suffix, one of `SUFFIXES`.

    Raises
    ------
    DataError
        The file is not what its suffix says. Reading may raise it too.
    """
    name = path.name.lower()
    openers: list[tuple[tuple[str, ...], Callable[[Path], Reader]]] = [
        (CSV, lambda file: _open_csv(file, ",")),
        (TSV, lambda file: _open_csv(file, "\t")),
        (PARQUET, _open_parquet),
        (JSONL, _open_jsonl),
    ]
    for suffixes, opener in openers:
        if name.endswith(suffixes):
            return _explained(path, opener)
    raise DataError(f"{path}: unknown kind of file; expected one of: {', '.join(SUFFIXES)}")


def is_saved(path: Path) -> bool:
    """Tell whether a directory was written by `save_to_disk` of the `datasets` library."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def open_saved(path: Path) -> Reader:
    """Open a directory written by `save_to_disk`; the splits of a `DatasetDict` are joined."""
    from datasets import load_from_disk

    def opened(directory: Path) -> Reader:
        _check_saved(directory)
        return open_splits(load_from_disk(str(directory)))

    return _explained(path, opened)


def _check_saved(path: Path) -> None:
    """Refuse a directory whose lists name files that lie elsewhere, or that `fetch` takes no digest of."""
    splits = [path]
    if (path / "dataset_dict.json").is_file():
        splits = [inside(path, name) for name in read_json(path / "dataset_dict.json")["splits"]]
    for split in splits:
        for entry in read_json(split / "state.json")["_data_files"]:
            if inside(split, entry["filename"]).name.startswith(("cache-", ".")):
                raise DataError(f"{split / 'state.json'}: names {entry['filename']}, which is no file of records")


def open_splits(loaded: datasets.Dataset | datasets.DatasetDict) -> Reader:
    """Open what the `datasets` library has loaded: columns of plain values that all its splits have."""
    from datasets import ClassLabel, Value

    splits = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
    names = [
        name
        for name in splits[0].column_names
        if all(isinstance(split.features.get(name), (Value, ClassLabel)) for split in splits)
    ]

    def read(wanted: Sequence[str]) -> pa.Table:
        # The arrow format follows a selection or a shuffle of the split; its raw table does not.
        tables = [split.select_columns(list(wanted)).with_format("arrow")[:] for split in splits]
        return pa.concat_tables([_strings(table, wanted) for table in tables])

    return Reader(tuple(names), read, tuple(map(str, loaded)) if isinstance(loaded, dict) else ())


_UNREADABLE = (pa.ArrowException, OSError, EOFError, ValueError, zlib.error, json.JSONDecodeError)
_UNREADABLE += (KeyError, TypeError, AttributeError, IndexError, NotImplementedError, RecursionError)


def _explained(path: Path, opener: Callable[[Path], Reader]) -> Reader:
    """Open `path` so that what goes wrong, now or when it is read, is told in one line."""

    def guarded(step: Callable[[], Reader | pa.Table]) -> Reader | pa.Table:
        try:
            return step()
        except FedpipeError as error:
            raise DataError(str(error)) from error
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: cannot be read: {reason}") from error

    reader = guarded(lambda: opener(path))
    return Reader(reader.names, lambda wanted: guarded(lambda: reader.read(wanted)), reader.splits)


def _open_csv(path: Path, delimiter: str) -> Reader:
    # A text may hold line breaks, in quotes.
    parsing = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with pa.csv.open_csv(_unpacked(path), parse_options=parsing) as stream:
        names = tuple(stream.schema.names)

    def read(wanted: Sequence[str]) -> pa.Table:
        types = pa.csv.ConvertOptions(include_columns=list(wanted), column_types=dict.fromkeys(wanted, pa.string()))
        return pa.csv.read_csv(_unpacked(path), parse_options=parsing, convert_options=types)

    return Reader(names, read)


def _open_parquet(path: Path) -> Reader:
    facts = pa.parquet.read_metadata(path)
    if facts.num_rows > max(FREE_ROWS, MOST_TIMES * path.stat().st_size):
        raise DataError(f"{path}: says that it has {facts.num_rows} rows, which so small a file cannot hold")
    names = tuple(pa.parquet.read_schema(path).names)
    return Reader(names, lambda wanted: _strings(pa.parquet.read_table(path, columns=list(wanted)), wanted))


def _open_jsonl(path: Path) -> Reader:
    # A record must fit into a block; the default block is smaller than a long document.
    table = pa.json.read_json(_unpacked(path), read_options=pa.json.ReadOptions(block_size=1 << 24))
    return Reader(tuple(table.schema.names), lambda wanted: _strings(table, wanted))


class _Bounded(io.RawIOBase):
    """What a compressed file unpacks to, up to a number of bytes."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._left = max(FREE_BYTES, MOST_TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        part = self._file.read(len(buffer))
        self._left -= len(part)
        if self._left < 0:
            raise DataError(f"{self._path}: unpacks to more than {MOST_TIMES} times its size; unpack it yourself")
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()


def _unpacked(path: Path) -> Path | _Bounded:
    """Return a file's plain content: the file itself, unless its name says that it is compressed."""
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix.lower())
    return path if opener is None else _Bounded(path, opener(path, "rb"))


def _strings(table: pa.Table, wanted: Sequence[str]) -> pa.Table:
    classes = _class_names(table.schema)
    columns = {}
    for name in wanted:
        column = table.column(name)
        columns[name] = _decode(column, classes[name]) if name in classes else column.cast(pa.string())
    return pa.table(columns)


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import ClassLabel, Features

    features = Features.from_arrow_schema(schema)
    return {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}


def _decode(column: pa.ChunkedArray, names: Sequence[str]) -> pa.ChunkedArray:
    codes = column.fill_null(-1).to_numpy().astype(np.int64)
    known = (codes >= 0) & (codes < len(names))
    return pa.chunked_array([pa.array(list(names), pa.string()).take(pa.array(codes, mask=~known))])
