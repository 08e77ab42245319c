"""Who spent what: an append-only, hash-chained file with one line per noisy step of a client.

A line is on disk before its step runs, so a crash can leave a step counted that did not run,
and never one that ran uncounted. A step that is run again draws the same sample and the same
noise (see `noise`), which is no new release: its line is there already and is not written
twice. The same step under another query or another key is a new release, and is counted.

The file is JSONL. The first line names the run, the unit of privacy and the adjacency. Every
further line carries the sha256 of itself and of its client's line before it (the header, for
a client's first line). There is one chain per client, so that what a client's chain says does
not depend on the order in which workers finish. A chain shows every change inside it; that
its end was cut off shows only against the `heads` that the run's reports keep. It is no
signature: who can write the file can also write a new chain.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import sys
import threading
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpipe.errors import PrivacyError, StateError
from fedpipe.files import canonical_json, storage, sync_directory
from fedpipe.privacy.accounting import ADD_REMOVE, Entry, check_entry, merge
from fedpipe.privacy.distributed import MECHANISM
from fedpipe.privacy.neighbours import adjacency_of, neighbours

log = logging.getLogger(__name__)

Release = tuple[str, int, int, str]

FORMAT = 1
GAUSSIAN = "poisson-gaussian"
RENYI_ONLY = frozenset({MECHANISM})  # mechanisms of which the effective sigma holds at every Rényi order, and no more
EVERY = "every client"  # whose line a noisy sum over all clients is, with unit `client`


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One noisy step of one client: a Gaussian mechanism on a Poisson sample, or what is as good as one.

    `query` is the digest of all that defines what is released: settings, data, code, and an
    identity of the key (`noise.key_id`), since under a new key the same step is a new release.
    """

    client: str
    round: int
    step: int
    sigma: float
    q: float
    query: str
    mechanism: str = GAUSSIAN

    def __post_init__(self) -> None:
        for name, kind in _KINDS:
            value = getattr(self, name)
            if kind is float and isinstance(value, float | int) and not isinstance(value, bool):
                value = float(value)
                object.__setattr__(self, name, value)
            if type(value) is not kind:
                raise PrivacyError(f"ledger entry: {name} is {value!r}; expected {kind.__name__}")
        check_entry(self.sigma, self.q, 1)
        if self.mechanism not in (GAUSSIAN, *RENYI_ONLY):
            raise PrivacyError(f"ledger entry: the mechanism '{self.mechanism}' is not known, nor what it spends")
        if self.mechanism in RENYI_ONLY and self.q != 1:
            raise PrivacyError(f"ledger entry: {self.mechanism} has no amplification by sampling; found q {self.q}")

    @property
    def release(self) -> Release:
        """What gives equal noise: entries with equal releases are one."""
        return self.client, self.round, self.step, self.query


_KINDS = (
    ("client", str),
    ("round", int),
    ("step", int),
    ("sigma", float),
    ("q", float),
    ("query", str),
    ("mechanism", str),
)


class Ledger:
    """The ledger of one run, shared by any number of threads and processes.

    A line is read and checked once; what a round asks takes time proportional to what the
    round spent, or to the number of clients, and not to all that was spent before.

    Parameters
    ----------
    path
        The file. With a `run_id` it is made where there is none; without, it must be there.
    run_id, unit, adjacency
        What the header says; the ledger of another run, unit or adjacency is refused.

    Raises
    ------
    StateError
        The file is missing or cannot be read.
    StorageError
        It cannot be made.
    PrivacyError
        A line does not parse or does not chain, or the header is not as asked.
    """

    def __init__(
        self, path: Path, run_id: str | None = None, unit: str = "record", adjacency: str = ADD_REMOVE
    ) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        self._mutex = threading.RLock()
        self._failure: PrivacyError | None = None
        self._forget()
        if run_id is None:
            self._refresh()
            return
        if (words := neighbours(unit, adjacency)) is None:
            raise PrivacyError(f"ledger: unit '{unit}' spends no privacy and has no ledger")
        header = {"format": FORMAT, "run_id": run_id, "unit": unit, "adjacency": words}
        _create(path, _seal(header)[0])
        self._refresh()
        if self.header != header:
            found, expected = canonical_json(self.header), canonical_json(header)
            raise PrivacyError(f"{path}: is the ledger of {found}; expected {expected}")

    @property
    def adjacency(self) -> str:
        """How neighbours differ, as the header says: `add-remove` or `replace-one`."""
        return adjacency_of(self.header["adjacency"])

    def append(self, entries: Sequence[LedgerEntry]) -> None:
        """Put entries on disk, in one write and one fsync, before the steps that they stand for run.

        Entries of releases that are there already are not written again.

        Raises
        ------
        PrivacyError
            A release is there with another sigma or q, which would undo its noise; or the file was changed.
        StorageError
            The disk is full, read-only or not writable. The steps must not run.
        """
        with self._mutex, storage(self.path), _locked(self.path, os.O_RDWR | os.O_APPEND, fcntl.LOCK_EX) as handle:
            self._catch_up(handle, repair=True)
            lines, heads = [], ChainMap({}, self._heads)
            for entry in self._fresh(entries):
                line, sealed = _seal(asdict(entry) | {"prev": heads.get(entry.client, self._genesis)})
                heads[entry.client] = sealed
                lines.append(line)
            # Also where nothing is new: the lines of a writer that died may not be on disk yet.
            _write(handle, b"".join(lines))
            self._catch_up(handle, repair=False)

    def entries(self, client: str | None = None) -> tuple[LedgerEntry, ...]:
        """Return all entries in the order of the file, or one client's."""
        with self._mutex:
            self._refresh()
            return tuple(self._releases.values() if client is None else self._clients.get(client, ()))

    def history(self, client: str, through_round: int | None = None) -> tuple[Entry, ...]:
        """Return what a client spent, as merged `(sigma, q, steps)`, up to and including a round."""
        if through_round is None:
            with self._mutex:
                self._refresh()
                return self._spent_by(client)
        return merge((e.sigma, e.q, 1) for e in self.entries(client) if e.round <= through_round)

    def by_renyi_only(self, client: str) -> bool:
        """Say whether a client's history may be accounted by RDP only (see `RENYI_ONLY`)."""
        with self._mutex:
            self._refresh()
            return client in self._renyi_only

    def histories(self) -> set[tuple[Entry, ...]]:
        """Return the different histories that clients have."""
        with self._mutex:
            self._refresh()
            return {self._spent_by(client) for client in self._spent}

    def taken(self, round: int, query: str) -> Counter[str]:
        """Return how many noisy steps each client took in a round of this query."""
        with self._mutex:
            self._refresh()
            return Counter(entry.client for entry in self._rounds.get((round, query), ()))

    def taken_in_all(self) -> Counter[str]:
        """Return how many noisy steps each client took, in any round of any query."""
        with self._mutex:
            self._refresh()
            return Counter({client: len(entries) for client, entries in self._clients.items()})

    def participations(self, client: str) -> int:
        """Return in how many rounds a client took at least one step."""
        return len({entry.round for entry in self.entries(client)})

    def clients(self) -> tuple[str, ...]:
        """Return the clients that have an entry, sorted."""
        return tuple(self.heads())

    def heads(self) -> dict[str, str]:
        """Return the hash of every client's last line: what a copy of the ledger is checked against."""
        with self._mutex:
            self._refresh()
            return dict(sorted(self._heads.items()))

    def verify(self) -> None:
        """Check every line again, from the start: by their common sha256, and one by one where that is another.

        Raises
        ------
        PrivacyError
            A line was changed, removed, added or moved; the message names the first that does not fit.
        """
        with self._mutex, _reading(self.path), _locked(self.path, os.O_RDONLY, fcntl.LOCK_SH) as handle:
            if self._failure is None and self._same(handle):
                self._catch_up(handle, repair=False)
                return
            missing = set(self._heads.values())
            self._forget()
            self._missing = missing
            self._catch_up(handle, repair=False)
            if missing:
                raise self._damaged(self._lines + 1, "lines that were here are gone")

    def unchanged(self) -> bool:
        """Say whether all that this object has read is still in the file as it was; more may follow it.

        By inode, size and times, and where they differ by sha256. A change within one tick of
        the file system's clock after the last line is left to `verify`, which every round calls.
        """
        with self._mutex:
            if self._failure is not None:
                return False
            try:
                if _stamp(os.stat(self.path)) == self._stamp:
                    return True
                with _locked(self.path, os.O_RDONLY, fcntl.LOCK_SH) as handle:
                    return self._same(handle)
            except OSError:
                return False

    def _same(self, handle: int) -> bool:
        found, start = hashlib.sha256(), 0
        while start < self._offset and (part := os.pread(handle, min(1 << 20, self._offset - start), start)):
            found.update(part)
            start += len(part)
        return start == self._offset and found.digest() == self._sha256.digest()

    def _forget(self) -> None:
        self._offset = self._lines = 0
        self._sha256 = hashlib.sha256()
        self._stamp: tuple[int, ...] = ()
        self._genesis = ""
        self._heads: dict[str, str] = {}
        self._missing: set[str] = set()
        self._releases: dict[Release, LedgerEntry] = {}
        self._clients: dict[str, list[LedgerEntry]] = {}
        self._rounds: dict[tuple[int, str], list[LedgerEntry]] = {}
        self._spent: dict[str, Counter[tuple[float, float]]] = {}
        self._renyi_only: set[str] = set()

    def _spent_by(self, client: str) -> tuple[Entry, ...]:
        return tuple((sigma, q, steps) for (sigma, q), steps in sorted(self._spent.get(client, {}).items()))

    def _refresh(self) -> None:
        """Take in what other workers appended."""
        with self._mutex, _reading(self.path):
            if self._failure is None and self._lines and os.stat(self.path).st_size == self._offset:
                return
            with _locked(self.path, os.O_RDONLY, fcntl.LOCK_SH) as handle:
                self._catch_up(handle, repair=False)

    def _catch_up(self, handle: int, repair: bool) -> None:
        """Take in the lines from the last known one on; the caller holds the lock, so none is in the making."""
        if self._failure is not None:
            raise self._failure
        size = os.fstat(handle).st_size
        if size < self._offset:
            raise self._damaged(self._lines, "lines that were here are gone")
        *lines, torn = _read(handle, self._offset, size).split(b"\n")
        for line in lines:
            self._take(line)
            self._sha256.update(line + b"\n")
            self._offset += len(line) + 1
        if not self._lines:
            raise self._damaged(1, "the header is missing")
        if torn and repair:
            log.warning("%s: dropped a torn last line; its step had not begun", self.path)
            os.ftruncate(handle, self._offset)
        self._stamp = _stamp(os.fstat(handle))

    def _take(self, line: bytes) -> None:
        try:
            text = line.decode()
            value = json.loads(text)
            # A quote inside a string is escaped, so this stands where the key is, and nowhere else.
            bare = text.replace(f'"hash":"{value["hash"]}",', "", 1)
            if canonical_json(value) != text or hashlib.sha256(bare.encode()).hexdigest() != value["hash"]:
                raise ValueError("its hash is not that of its content")
            claimed = value.pop("hash")
            if self._lines:
                self._take_entry(value, claimed)
            else:
                self._take_header(value, claimed)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, PrivacyError) as error:
            raise self._damaged(self._lines + 1, str(error)) from None
        self._lines += 1

    def _take_header(self, value: dict[str, Any], claimed: str) -> None:
        if value.get("format") != FORMAT or set(value) != {"format", "run_id", "unit", "adjacency"}:
            raise ValueError(f"expected the header of a ledger of format {FORMAT}")
        if value["adjacency"] != neighbours(value["unit"], adjacency_of(value["adjacency"])):
            raise ValueError(f"the adjacency '{value['adjacency']}' is not one of unit '{value['unit']}'")
        self.header, self._genesis = value, claimed

    def _take_entry(self, value: dict[str, Any], claimed: str) -> None:
        previous = value.pop("prev")
        # One string and one number for all lines that hold it: a ledger may have a million lines.
        shared = {name: sys.intern(item) if type(item) is str else item for name, item in value.items()}
        entry = LedgerEntry(**shared)
        if previous != self._heads.get(entry.client, self._genesis):
            raise ValueError(f"it does not follow the line of {entry.client} before it")
        if entry.release in self._releases:
            raise ValueError("it repeats a release")
        self._heads[entry.client] = claimed
        self._missing.discard(claimed)
        self._releases[entry.release] = entry
        self._clients.setdefault(entry.client, []).append(entry)
        self._rounds.setdefault((entry.round, entry.query), []).append(entry)
        self._spent.setdefault(entry.client, Counter())[entry.sigma, entry.q] += 1
        if entry.mechanism in RENYI_ONLY:
            self._renyi_only.add(entry.client)

    def _fresh(self, entries: Sequence[LedgerEntry]) -> list[LedgerEntry]:
        """Return the entries whose releases are not there yet, each once."""
        fresh: dict[Release, LedgerEntry] = {}
        for entry in entries:
            known = self._releases.get(entry.release) or fresh.setdefault(entry.release, entry)
            if known != entry:
                raise PrivacyError(
                    f"{self.path}: {entry.client}, round {entry.round}, step {entry.step} is recorded with sigma "
                    f"{known.sigma} and q {known.q}, and asked for with {entry.sigma} and {entry.q} under the same "
                    "query: one noise at two scales would cancel out. A query's digest must bind sigma and q"
                )
        return list(fresh.values())

    def _damaged(self, number: int, reason: str) -> PrivacyError:
        """Return the error that this object answers with from now on."""
        self._failure = PrivacyError(
            f"{self.path}: line {number}: {reason}. The ledger was changed or damaged, so epsilon is not known; "
            "restore the file from a copy"
        )
        return self._failure


_KEPT = 2  # ledgers of one process
_opened: dict[str, Ledger] = {}
_opened_lock = threading.Lock()


def open_ledger(path: Path) -> Ledger:
    """Return this process's reader of a ledger that is there, which has read what did not change since the last time.

    Where the file's times or size are not those of the last reading or writing, what was read
    is compared by its sha256; where that differs, the file is read and checked from the start,
    as by a new process.

    Raises
    ------
    StateError
        The file is missing or cannot be read.
    PrivacyError
        A line does not parse or does not chain.
    """
    name = os.path.abspath(path)
    with _opened_lock:
        known = _opened.pop(name, None)
        if known is None or not known.unchanged():
            known = Ledger(path)
        known._refresh()
        while len(_opened) >= _KEPT:
            _opened.pop(next(iter(_opened)))
        _opened[name] = known
        return known


def _create(path: Path, header: bytes) -> None:
    """Make the file where it is missing, or where a crash in this very place left the start of a header."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX) as handle:
            found = os.pread(handle, len(header), 0)
            if found != header and header.startswith(found):
                os.ftruncate(handle, 0)
                _write(handle, header)
        sync_directory(path.parent)


def _seal(value: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return a line, and the hash of what is in it."""
    sealed = hashlib.sha256(canonical_json(value).encode()).hexdigest()
    return (canonical_json({**value, "hash": sealed}) + "\n").encode(), sealed


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextlib.contextmanager
def _locked(path: Path, flags: int, lock: int) -> Iterator[int]:
    """Open and lock a file; each opening has a lock of its own, so threads exclude each other too."""
    handle = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, lock)
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(
            f"{path}: the privacy ledger cannot be read: {error.strerror}; without it epsilon is not known: restore "
            "the file from a copy"
        ) from error


def _read(handle: int, start: int, stop: int) -> bytes:
    content = b""
    while start + len(content) < stop:
        part = os.pread(handle, stop - start - len(content), start + len(content))
        if not part:
            break
        content += part
    return content


def _write(handle: int, content: bytes) -> None:
    """Append and flush, or leave the file as it was."""
    size = os.fstat(handle).st_size
    try:
        # One write, unless the disk fills up in the middle of it: the next one then says so.
        while content:
            content = content[os.write(handle, content) :]
        os.fsync(handle)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(handle, size)
        raise
