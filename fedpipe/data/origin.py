"""Where fetched files came from: `origin.json`, and the check that they are still the same.

An origin has the keys `format`, `source` (the setting, verbatim), `kind` (package, file,
saved, folder, hub, directory), `license`, `origin` (one line for people), `path` (the
directory that holds the files; null: the one that holds `origin.json`) and `files` (sha256
by name). A package also has `package` and `version`. There is no time in it, so fetching
the same thing twice gives the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedpipe.errors import DataError, StateError
from fedpipe.files import file_digest, inside, read_sealed, storage, sweep, write_sealed

FORMAT = 1
NAME = "origin.json"


def describe(
    source: str,
    kind: str,
    files: Mapping[str, str],
    *,
    path: Path | None = None,
    license: str = "not stated by the source",
    origin: str,
    **more: str,
) -> dict[str, Any]:
    """Return an origin; see the module's docstring for what the keys mean."""
    head = {"format": FORMAT, "source": source, "kind": kind, "license": license, "origin": origin, **more}
    return {**head, "path": None if path is None else str(path), "files": dict(sorted(files.items()))}


def write_origin(directory: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """Write `origin` into `directory`, remove what the fetch before it left there, and return `origin`.

    Only files that the former origin lists are removed: the directory may hold other people's files.
    """
    sweep(directory)
    with contextlib.suppress(DataError):
        former = read_origin(directory, "files")
        if former["path"] is None:
            kept = {} if origin["path"] else origin["files"]
            with storage(directory):
                for name in set(former["files"]) - set(kept):
                    (directory / name).unlink(missing_ok=True)
    write_sealed(directory / NAME, origin)
    return origin


def read_origin(directory: Path, what: str) -> dict[str, Any]:
    """Read the origin of `what` ("data", "backbone") from `directory`.

    Raises
    ------
    DataError
        Nothing was fetched, or the file is damaged.
    """
    if not (directory / NAME).exists():
        raise DataError(f"{directory}: no {what} here yet; run `fedpipe fetch` (or `dvc repro fetch`)")
    try:
        origin = read_sealed(directory / NAME)
    except StateError as error:
        raise DataError(f"{error}; run `fedpipe fetch` again") from error
    texts = [origin.get(key) for key in ("source", "kind", "license", "origin")]
    where, files = origin.get("path", ""), origin.get("files")
    right = all(isinstance(text, str) for text in texts) and (where is None or (isinstance(where, str) and where))
    if origin.get("format") != FORMAT or not right or not isinstance(files, dict) or not files:
        raise DataError(f"{directory / NAME}: damaged, or of another version; run `fedpipe fetch` again")
    try:
        for name in files:
            inside(directory, name)
    except StateError as error:
        raise DataError(f"{directory / NAME}: {error}; run `fedpipe fetch` again") from None
    return origin


def base(directory: Path, origin: Mapping[str, Any]) -> Path:
    """Return the directory that holds an origin's files."""
    return Path(origin["path"]) if origin.get("path") else directory


def verify(directory: Path, origin: Mapping[str, Any]) -> None:
    """Check every file of an origin against its sha256.

    Raises
    ------
    DataError
        A file is missing, or is not what was fetched.
    """
    where = base(directory, origin)
    for name, expected in origin["files"].items():
        if not (where / name).is_file():
            raise DataError(f"{where / name}: missing since fetch; run `fedpipe fetch` again")
        if file_digest(where / name) != expected:
            raise DataError(f"{where / name}: changed since fetch; run `fedpipe fetch` again")


def unchanged(directory: Path, source: str) -> dict[str, Any] | None:
    """Return the origin in `directory` where it is of `source` and all its files are whole, else None."""
    try:
        origin = read_origin(directory, "files")
        verify(directory, origin)
    except DataError:
        return None
    return origin if origin["source"] == source else None


def digests(directory: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the sha256 of `files` by their name relative to `directory`."""
    return {file.relative_to(directory).as_posix(): file_digest(file) for file in sorted(files)}
