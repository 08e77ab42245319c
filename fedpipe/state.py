"""The state of a run on disk: safetensors and JSON, atomic, each file named by its digest in the next.

```
runs/<run id>/
  run.json                settings, identity, versions: written once
  runtime.json            the settings that may change between a crash and a restart
  plan.json               the plan
  ledger.jsonl            what was spent, written before it was spent
  secrets/noise.key       the noise key; destroyed when the run is complete
  rounds/0003/round.json  the round is complete once this is there
  confidential/0003/      with unit `client`, the round's plan and the updates, until it is complete
  clients/c000/           what a client keeps to itself, where the method lets it; never sent, logged or published
```
A round's directory holds `plan.json` (who trains, from which state), `updates/` (one file a
client), `cohort-00.json` (a cohort is complete once this is there), `adapter.safetensors`
(the global state after the round), `server.safetensors` (what the server remembers beside it)
and `round.json`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpipe.config import Settings, parse_settings
from fedpipe.errors import StateError
from fedpipe.files import (
    inside,
    private_directory,
    read_sealed,
    read_tensors,
    steady_digest,
    storage,
    sweep,
    write_sealed,
)
from fedpipe.identity import Identity, changed_keys, git_commit, versions
from fedpipe.models.factors import GlobalState
from fedpipe.plan import Plan
from fedpipe.privacy.keys import Key, destroy_key, new_key, read_key, write_key
from fedpipe.privacy.ledger import Ledger, open_ledger
from fedpipe.privacy.neighbours import adjacency_of
from fedpipe.privacy.noise import key_id

_INFO = {"run_id", "identity", "query", "parts", "settings", "plan_sha256", "key", "dp_valid", "test_key"}
_INFO |= {"git_commit", "versions", "started"}


@dataclass(frozen=True)
class Run:
    """A run's directory. Cheap to make; reads files when asked."""

    root: Path

    @cached_property
    def info(self) -> dict[str, Any]:
        with _irreplaceable():
            info = read_sealed(self.root / "run.json")
        if missing := _INFO - info.keys():
            raise StateError(f"{self.root / 'run.json'}: damaged, or of another version: lacks '{min(missing)}'")
        return info

    @cached_property
    def settings(self) -> Settings:
        """The settings of the run, with how it is computed *now*; the test key, if any, is in the key file only."""
        values = {**self.info["settings"], **read_sealed(self.root / "runtime.json")}
        return parse_settings(values, where=str(self.root / "run.json"))

    @cached_property
    def plan(self) -> Plan:
        with _irreplaceable():
            return _plan(self.root / "plan.json", self.info["plan_sha256"])

    @property
    def dp_valid(self) -> bool:
        """Whether the run's epsilon may be believed: private, and with a secret key."""
        return bool(self.info["dp_valid"])

    @property
    def diagnostics(self) -> bool:
        """Whether training losses are kept, which epsilon does not cover."""
        return self.settings.privacy.diagnostics

    @property
    def key_path(self) -> Path:
        return self.root / "secrets" / "noise.key"

    @property
    def key(self) -> bytes:
        """The key of all streams; without privacy it is public, and made from the seed.

        Raises
        ------
        StateError
            It is not the one that the run began with: under it, all that was drawn would be drawn, and spent, anew.
        """
        if not self.plan.private:
            return hashlib.sha256(f"fedpipe without privacy {self.settings.seed}".encode()).digest()
        key = read_key(self.key_path)
        if key_id(key) != self.info["key"]:
            raise StateError(
                f"{self.key_path}: damaged: is not the key that the run began with; restore it from a copy. Without "
                "one the run cannot go on: remove its directory to start anew, which spends privacy again"
            )
        return key

    @property
    def ledger_path(self) -> Path:
        return self.root / "ledger.jsonl"

    @cached_property
    def ledger(self) -> Ledger:
        ledger = open_ledger(self.ledger_path)
        if ledger.header["run_id"] != self.info["run_id"]:
            raise StateError(f"{self.ledger_path}: is the ledger of {ledger.header['run_id']}, not of this run")
        return ledger

    def round_dir(self, round: int) -> Path:
        return self.root / "rounds" / f"{round:04d}"

    def work_dir(self, round: int) -> Path:
        """Where a round keeps its plan and the clients' updates; not for others where who takes part is secret."""
        if self.plan.central is None:
            return self.round_dir(round)
        return self.root / "confidential" / f"{round:04d}"

    def adapter_path(self, round: int) -> Path:
        return self.round_dir(round) / "adapter.safetensors"

    def client_dir(self, client: str) -> Path:
        """Where a client keeps what is its own."""
        return inside(self.root / "clients", client)

    def memory_path(self, round: int) -> Path:
        return self.round_dir(round) / "server.safetensors"

    def round_record(self, round: int) -> dict[str, Any] | None:
        """Return what a complete round recorded, or None. It is shared between callers: do not change it."""
        path = self.round_dir(round) / "round.json"
        if not path.exists():
            return None
        try:
            return _read_once(path, steady_digest(path))
        except StateError as error:
            raise StateError(f"{error}; {self._repair(round, 'and all later rounds ')}") from None

    def _repair(self, round: int, others: str = "") -> str:
        """Say how a damaged round comes back: it is computed anew, as long as the state before it is kept."""
        if round > 0 and not self.adapter_path(round - 1).exists():
            return (
                "restore it from a copy: the state before it is no longer kept (runtime.keep_rounds), so the round "
                "cannot be computed anew"
            )
        return f"delete {self.round_dir(round)} {others}and run again: it is computed anew"

    def completed_rounds(self) -> int:
        """Return the number of the last complete round: -1 before the start state is there."""
        number = -1
        while (self.round_dir(number + 1) / "round.json").exists():
            number += 1
        return number

    def skipped(self, round: int) -> str | None:
        """Return why nobody trains in a round that was begun; None where somebody does, and of round 0."""
        record = self.round_record(round)
        if record is None:
            record = read_sealed(self.work_dir(round) / "plan.json")
        return record.get("skipped")

    def last_trained(self, round: int) -> int:
        """Return the last round up to this one that was not skipped; 0 is the start."""
        while self.skipped(round):
            round -= 1
        return round

    def state(self, round: int) -> GlobalState:
        """Return the global state after a complete round, checked against its digest."""
        return GlobalState.of(self._tensors(round, self.adapter_path(round), "state"))

    def adapter(self, round: int) -> dict[str, Tensor]:
        """Return the global adapter after a complete round."""
        return self.state(round).adapter

    def memory(self, round: int) -> dict[str, Tensor]:
        """Return what the server alone remembers after a complete round, by `part/name`."""
        return self._tensors(round, self.memory_path(round), "memory")

    def kept(self, round: int, client: str) -> tuple[int, dict[str, Tensor]]:
        """Return what a client kept of the last round that it took part in, up to `round`, and which that was.

        It is the client's own and never leaves it; (0, {}) before its first round.
        """
        entry = (self.round_record(round) or {}).get("kept", {}).get(client)
        if entry is None:
            return 0, {}
        return entry["round"], self.read_kept(entry)

    def read_kept(self, entry: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what a client kept, given what a round recorded of it."""
        try:
            return read_tensors(inside(self.root, entry["file"]), entry["sha256"])
        except StateError as error:
            again = self._repair(entry["round"], "and all later rounds ") if "round" in entry else "run again"
            raise StateError(f"{error}; {again}") from None

    def _tensors(self, round: int, path: Path, key: str) -> dict[str, Tensor]:
        record = self.round_record(round)
        if record is None:
            raise StateError(f"{self.round_dir(round)}: the round is not complete")
        if record.get(key) is None:
            return {}
        try:
            return read_tensors(path, record[key])
        except StateError as error:
            keep = self.settings.runtime.keep_rounds
            if keep is not None and 0 < round <= self.completed_rounds() - keep:
                raise StateError(f"{path}: is not kept: runtime.keep_rounds is {keep}") from None
            raise StateError(f"{error}; {self._repair(round)}") from None

    @property
    def complete(self) -> bool:
        return (self.root / "complete.json").exists()

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run complete and destroy its noise key."""
        write_sealed(self.root / "complete.json", summary)
        shutil.rmtree(self.root / "confidential", ignore_errors=True)
        with storage(self.root):
            for path in self.root.glob("clients/*/outbox-*.safetensors"):
                path.unlink()  # of a last round that was recorded just before a crash
        if self.key_path.exists():
            destroy_key(self.key_path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run: one process at a time drives its rounds.

        Raises
        ------
        StateError
            Another process holds it; the message says which. The lock ends with its process.
        """
        path = self.root / "lock"
        with storage(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
                raise StateError(f"{self.root}: in use by {holder}; wait for it, or stop it and run again") from None
            os.ftruncate(handle, 0)
            since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
            sweep(self.root)
            yield
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Opened:
    """A run that was opened: whether it was there before, and what made it another than the last one."""

    run: Run
    resumed: bool
    changes: tuple[str, ...] = ()
    previous: str | None = None


def open_run(runs: Path, identity: Identity, settings: Settings, make_plan: Callable[[], Plan]) -> Opened:
    """Open the run of this identity, or make its directory.

    Parameters
    ----------
    runs : directory of all runs
    make_plan : called for a new run only, since calibration takes a while

    Raises
    ------
    StateError
        Another process holds the run, or what is in its directory does not fit together.
    """
    root = runs / identity.run_id
    run = Run(root)
    plan = None if (root / "run.json").exists() else make_plan()
    private_directory(root)
    # Of two processes that both found no run, the slower would replace the key and the ledger of the faster.
    with run.lock():
        if not (root / "run.json").exists():
            return _create(run, _latest(runs), identity, settings, plan or make_plan())
        if run.info["identity"] != identity.run:
            raise StateError(f"{root}: belongs to a run with another identity; move it away and run again")
        _write_runtime(root, settings)
        return Opened(run, resumed=True)


def _create(run: Run, previous: Run | None, identity: Identity, settings: Settings, plan: Plan) -> Opened:
    """Write all that a run needs before its first round; `run.json` last."""
    root = run.root
    if (root / "rounds").exists() or (plan.private and _new_ledger(run, identity, plan).entries()):
        raise StateError(f"{root}: has lost its run.json, but privacy was spent in it; move it away and run again")
    plan_sha256 = write_sealed(root / "plan.json", plan.to_json())
    if plan.private:
        # Before `run.json`, and never again: a key that noise was drawn from must not be replaced.
        _make_key(run, settings)
    _write_runtime(root, settings)
    # A tracking URI may hold a password, and is no part of what was computed.
    values = settings.model_dump(mode="json", exclude={"tracking"})
    values["privacy"]["test_key"] = None
    write_sealed(
        root / "run.json",
        {
            "format": 1,
            "run_id": identity.run_id,
            "identity": identity.run,
            "query": identity.query,
            "parts": identity.parts,
            "settings": values,
            "plan_sha256": plan_sha256,
            "key": key_id(read_key(run.key_path)) if plan.private else None,
            "dp_valid": plan.private and settings.privacy.test_key is None,
            "test_key": settings.privacy.test_key is not None,
            "git_commit": git_commit(Path.cwd()),
            "versions": versions(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    changes: list[str] = []
    with contextlib.suppress(StateError):  # what is wrong with another run is not this one's trouble
        changes = changed_keys(previous.info["parts"], identity.parts) if previous else []
    return Opened(run, resumed=False, changes=tuple(changes), previous=previous.root.name if previous else None)


def _new_ledger(run: Run, identity: Identity, plan: Plan) -> Ledger:
    return Ledger(run.ledger_path, identity.run_id, plan.unit, adjacency_of(plan.adjacency))


@contextlib.contextmanager
def _irreplaceable() -> Iterator[None]:
    """Say what to do about a file that cannot be computed again."""
    try:
        yield
    except StateError as error:
        raise StateError(
            f"{error}; restore it from a copy. Without one, move the run's directory away and start anew, which "
            "spends privacy again"
        ) from None


@functools.lru_cache(maxsize=2)
def _read_once(path: Path, sha256: str) -> Any:
    """Parse a file once for every content; a round's record with thousands of clients takes a while."""
    return read_sealed(path, sha256)


@functools.lru_cache(maxsize=2)
def _plan_once(path: Path, sha256: str) -> Plan:
    return Plan.from_json(read_sealed(path, sha256))


def _plan(path: Path, sha256: str) -> Plan:
    """Return the plan, parsed once, after a check of the file that is there now."""
    with contextlib.suppress(OSError):
        if steady_digest(path) == sha256:
            return _plan_once(path, sha256)
    return Plan.from_json(read_sealed(path, sha256))


def _write_runtime(root: Path, settings: Settings) -> None:
    """Keep what may change between a crash and a restart, such as a smaller token budget."""
    write_sealed(root / "runtime.json", settings.model_dump(mode="json", include={"runtime"}))


def _make_key(run: Run, settings: Settings) -> None:
    """Write the key before `run.json`: a crash between the two leaves a key that no noise was drawn from."""
    run.key_path.unlink(missing_ok=True)
    fixed = settings.privacy.test_key
    write_key(run.key_path, Key.fromhex(fixed) if fixed else new_key())


def _latest(runs: Path) -> Run | None:
    """Return the run that was started last, whatever became of it."""
    files = sorted(runs.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    return Run(files[-1].parent) if files else None
