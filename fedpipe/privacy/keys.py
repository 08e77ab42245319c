"""The key of the noise: made, kept in a file that only its owner can read, and destroyed when the run ends.

Whoever has it can take the noise off again; without it nobody can.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import NoReturn, SupportsIndex

from fedpipe.errors import PrivacyError, StateError
from fedpipe.files import storage, sync_directory

KEY_BYTES = 32


class Key(bytes):
    """A key that does not show itself: not in a log line, a traceback with locals or the print of an object.

    It is the same bytes to whatever computes with it. It cannot be pickled or copied by `copy`, so it
    cannot get into a cache, a queue between processes or a workflow engine's results by accident.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "<key>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a key is not pickled")


def new_key() -> Key:
    """Return 32 fresh bytes from the operating system's generator."""
    return Key(os.urandom(KEY_BYTES))


def write_key(path: Path, key: bytes) -> None:
    """Write a key to a new file that only its owner can read, and flush it to disk.

    Raises
    ------
    PrivacyError
        The file exists, or its directory exists and lets others in.
    StorageError
        The disk is full, read-only or not writable.
    """
    check_key(key)
    with storage(path):
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(mode=0o700)
        mode = stat.S_IMODE(path.parent.stat().st_mode)
        if mode & 0o077:
            raise PrivacyError(
                f"{path.parent}: others may enter (mode {mode:04o}); a key needs a directory of mode 0700"
            )
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise PrivacyError(f"{path}: a key is there already, and noise may have been drawn with it") from None
        try:
            _write_synced(handle, key)
        except BaseException:
            os.unlink(path)
            raise
        sync_directory(path.parent)


def read_key(path: Path) -> Key:
    """Read a key that `write_key` wrote.

    Raises
    ------
    PrivacyError
        The file is a link or no regular file, is not this user's, or others may read or write it.
    StateError
        It is missing, cannot be read, or does not hold 32 bytes.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise PrivacyError(f"{path}: is a link; expected the key file itself") from None
        raise StateError(
            f"{path}: the key of the noise cannot be read: {error.strerror}. Without it the run cannot go on; "
            "remove the run's directory to start anew, which spends privacy again"
        ) from error
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PrivacyError(f"{path}: expected a regular file of this user's own")
        if mode & ~0o600:
            raise PrivacyError(
                f"{path}: its mode is {mode:04o}, so that others may have read the key of the noise; expected 0600. "
                "If nobody did, run: chmod 600 on it"
            )
        key = Key(file.read(KEY_BYTES + 1))
    if len(key) != KEY_BYTES:
        raise StateError(
            f"{path}: holds {status.st_size} bytes, expected {KEY_BYTES}: its write was interrupted or it was changed; "
            "remove the run's directory to start anew"
        )
    return key


def destroy_key(path: Path) -> None:
    """Overwrite a key, flush, and remove the file; do nothing where there is none.

    Overwriting reaches the old bytes only where the file system writes in place. Flash drives
    that level wear, file systems that journal data or copy on write, snapshots and backups may
    keep them. Where that matters, keep keys on an encrypted or a memory file system.
    """
    with storage(path):
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        _write_synced(handle, bytes(max(KEY_BYTES, os.fstat(handle).st_size)))
        os.unlink(path)
        sync_directory(path.parent)


def check_key(key: bytes) -> None:
    """Refuse what is no key.

    Raises
    ------
    PrivacyError
        It is not 32 bytes.
    """
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise PrivacyError(f"key: expected {KEY_BYTES} bytes")


def _write_synced(handle: int, content: bytes) -> None:
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
