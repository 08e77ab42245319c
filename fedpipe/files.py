"""Files that are either whole or absent, and the digests that prove it.

Every file that a run leaves behind is written here: to a temporary name in the same
directory, flushed to disk, then renamed. A reader, or a process started after a crash,
never meets half a file. Only files that can be computed again, and that are checked against
a digest before they are used, are not flushed one by one: thousands of them would wait for
the disk longer than they took to compute. A power failure can tear those; the digest tells.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors

from fedpipe.errors import StateError, StorageError

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EROFS: "the file system is read-only; choose a place that can be written",
    errno.EACCES: "permission denied; choose a place that this user can write",
    errno.EPERM: "permission denied; choose a place that this user can write",
}


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn an `OSError` on `path` into a `StorageError` that says what to do."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise StorageError(
            f"{path}: cannot write: {reason}. Run the same command again; it goes on from the last complete step."
        ) from error


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> str:
    """Serialise `value` to the one JSON text that is digested: sorted keys, no spaces, no NaN."""
    return _CANONICAL.encode(value)


def digest(value: Any) -> str:
    """Return the sha256, in hex, of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256, in hex, of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_SETTLED = 2_000_000_000  # nanoseconds: longer than any file system's clock takes to tick
_digests: dict[str, tuple[tuple[int, ...], str]] = {}
_digests_lock = threading.Lock()


def steady_digest(path: Path) -> str:
    """Return `file_digest(path)`, remembered in this process while the file's inode, size and times stay the same.

    A file that changed in the last two seconds is read every time: it could change once more
    within one tick of the file system's clock, and its times would not show it.
    """
    name, status = os.path.abspath(path), os.stat(path)
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    with _digests_lock:
        known = _digests.get(name)
    if known is not None and known[0] == stamp:
        return known[1]
    started, found = time.time_ns(), file_digest(path)
    if started - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED:
        with _digests_lock:
            if len(_digests) >= 64:
                _digests.pop(next(iter(_digests)))
            _digests[name] = (stamp, found)
    return found


def private_directory(path: Path) -> None:
    """Make a directory that only its owner may enter, and what it lies in; one that is there is left as it is."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)


def write_atomic(path: Path, content: bytes, mode: int = 0o644, durable: bool = True) -> str:
    """Write `content` so that `path` holds either all of it or what it held before; return its sha256.

    Without `durable` nothing is flushed: the promise then holds when the process dies, and not
    when the power fails. It is for what can be computed again and is checked by its digest.

    Raises
    ------
    StorageError
        The disk is full, read-only or not writable; `path` is as it was.
    """
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                fcntl.flock(handle, fcntl.LOCK_EX)  # until it is closed: `sweep` leaves it alone
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), mode)
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        if durable:
            sync_directory(path.parent)
    return hashlib.sha256(content).hexdigest()


def sweep(directory: Path) -> None:
    """Remove what writers that were killed left in a directory or below: temporaries that no process holds."""
    for path in directory.rglob(".*.tmp"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(handle)


def sync_directory(path: Path) -> None:
    """Make a rename durable: the entry lives in the directory, not in the file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> str:
    """Write `value` as indented JSON, atomically; return the file's sha256."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return write_atomic(path, (text + "\n").encode())


def read_json(path: Path, expected_digest: str | None = None) -> Any:
    """Read a JSON file, after a check against `expected_digest` (sha256, hex) where one is given."""
    return _parse(path, _read(path, expected_digest), _loads, "JSON")


def _loads(content: bytes) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number of JSON")

    return json.loads(content, parse_constant=refuse)


SEAL = "sha256"


def write_sealed(path: Path, value: Mapping[str, Any]) -> str:
    """Write a JSON object with the sha256 of its content beside it, for a file that no other one names.

    A change by accident shows when it is read. It is no signature: who can write the file can
    seal it again.
    """
    return write_json(path, {**value, SEAL: digest(json.loads(json.dumps(value, allow_nan=False)))})


class _Content(dict[str, Any]):
    """What a sealed file holds. A key that is not there is a fault of the file, and says so."""

    path: Path

    def __missing__(self, key: str) -> Any:
        raise StateError(f"{self.path}: damaged, or of another version: lacks {key!r}")


def read_sealed(path: Path, expected_digest: str | None = None) -> dict[str, Any]:
    """Read what `write_sealed` wrote, without its seal; `expected_digest` as in `read_json`.

    Raises
    ------
    StateError
        The file is missing, is no JSON object, or is not as it was written; later, where a key is asked for that it
        lacks.
    """
    value = read_json(path, expected_digest)
    sealed = value.pop(SEAL, None) if isinstance(value, dict) else None
    try:
        found = digest(value)
    except (ValueError, RecursionError):  # such as half of a surrogate pair, which no text has
        found = ""
    if sealed is None or found != sealed:
        raise StateError(f"{path}: damaged: its content is not what was written, by the sha256 in it")
    content = _Content(value)
    content.path = path
    return content


def inside(directory: Path, name: Any) -> Path:
    """Return `directory / name`, for a name that was read from a file: it may not lead out of the directory.

    Links are followed: where DVC keeps outputs as links into its cache, that is how they are.

    Raises
    ------
    StateError
        The name is absolute, has `..` in it, or is none.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts):
        raise StateError(f"{directory}: damaged: names a file {ascii(name)[:80]}, expected one inside this directory")
    return directory.joinpath(*parts)


def content_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of what `write_tensors` would write."""
    return hashlib.sha256(_dumped(tensors)).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], durable: bool = True) -> str:
    """Write named tensors as safetensors, in the order of their names; return the file's sha256."""
    return write_atomic(path, _dumped(tensors), durable=durable)


def _dumped(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return dump_safetensors({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})


def read_tensors(path: Path, expected_digest: str | None = None) -> dict[str, torch.Tensor]:
    """Read a safetensors file, after a check against `expected_digest` (sha256, hex) where one is given.

    The tensors are in order of their names: the library hands them over in another order each time, and
    what is summed over them would differ in its last bit.
    """
    tensors = _parse(path, _read(path, expected_digest), load_safetensors, "safetensors")
    return dict(sorted(tensors.items()))


def _read(path: Path, expected_digest: str | None) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StateError(f"{path}: cannot be read: {error.strerror}") from error
    if expected_digest is not None:
        found = hashlib.sha256(content).hexdigest()
        if found != expected_digest:
            raise StateError(f"{path}: damaged: its sha256 is {found[:12]}…, expected {expected_digest[:12]}…")
    return content


def _parse(path: Path, content: bytes, parse: Callable[[bytes], Any], kind: str) -> Any:
    try:
        return parse(content)
    except RecursionError:
        raise StateError(f"{path}: is not a valid {kind} file: it is nested too deeply") from None
    except (ValueError, SafetensorError) as error:
        raise StateError(f"{path}: is not a valid {kind} file: {error}") from error
