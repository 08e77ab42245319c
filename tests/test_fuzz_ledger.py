"""A ledger with changed bytes or lines is refused, or says no more than each client's chain up to some line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import EXPLORED, changed_bytes, changed_lines, changed_tree, snapshot, tried
from hypothesis import given
from hypothesis import strategies as st

from fedpipe.errors import FedpipeError, PrivacyError, StateError
from fedpipe.files import canonical_json
from fedpipe.privacy.ledger import Ledger, LedgerEntry, open_ledger
from fedpipe.privacy.recompute import verify_ledger

CLIENTS = ("c000", "c001", "c002")
STEPS = [
    LedgerEntry(client, round, step, 1.5, 0.25, f"q{round}")
    for round in (1, 2)
    for step in (1, 2)
    for client in CLIENTS
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger")


def _content() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "ledger.jsonl")
        ledger = Ledger(path, "run-1")
        ledger.append(STEPS[:5])
        ledger.append(STEPS[5:])
        return path.read_bytes()


CONTENT = _content()
LINES = CONTENT.splitlines(keepends=True)


@st.composite
def changed_entry(draw: st.DrawFn) -> bytes:
    """Edit one line as JSON; spelled canonically or not, with the old hash."""
    at = draw(st.integers(0, len(LINES) - 1))
    line = draw(changed_tree(json.loads(LINES[at])))
    try:
        text = canonical_json(line).encode() if draw(st.booleans()) else json.dumps(line).encode()
    except ValueError:
        text = json.dumps(line).encode()
    return b"".join([*LINES[:at], text + b"\n", *LINES[at + 1 :]])


CHANGED = st.one_of(changed_bytes(CONTENT), changed_lines(CONTENT), changed_entry())


def prefixes(entries: tuple[LedgerEntry, ...]) -> Iterator[int]:
    """Check that what each client is said to have spent is the beginning of what it spent; yield how much."""
    for client in CLIENTS:
        found = [entry for entry in entries if entry.client == client]
        assert found == [entry for entry in STEPS if entry.client == client][: len(found)]
        yield len(found)
    assert not {entry.client for entry in entries} - set(CLIENTS)


def refused_or_a_beginning(path: Path, content: bytes) -> None:
    path.write_bytes(CONTENT)
    known, heads = Ledger(path), Ledger(path).heads()
    shared = open_ledger(path)
    path.write_bytes(content)
    before = snapshot(path.parent)
    try:
        counts = list(prefixes(Ledger(path).entries()))
    except (PrivacyError, StateError):
        with pytest.raises(FedpipeError):
            verify_ledger(path, 1e-5)
    else:
        # What is missing is seen by who knows the heads, and by who has read it before.
        complete = sum(counts) == len(STEPS)
        assert (Ledger(path).heads() == heads) == complete
        assert verify_ledger(path, 1e-5).entries == sum(counts)
        if not complete:
            with pytest.raises(PrivacyError):
                known.verify()
        assert list(prefixes(open_ledger(path).entries())) == counts
        Ledger(path).append(STEPS)  # goes on from there: torn lines are dropped, missing ones written again
        assert Ledger(path).heads() == heads
        return
    assert shared.header["run_id"] == "run-1"
    assert snapshot(path.parent) == before


@tried(400)
@given(content=CHANGED)
def test_changed_ledgers(content: bytes, directory: Path) -> None:
    refused_or_a_beginning(directory / "ledger.jsonl", content)


@tried(100)
@given(content=st.binary(max_size=200) | st.text().map(str.encode))
def test_other_bytes(content: bytes, directory: Path) -> None:
    path = directory / "ledger.jsonl"
    path.write_bytes(content)
    with pytest.raises((PrivacyError, StateError)):
        Ledger(path)


@tried(100)
@given(tree=changed_tree({"delta": 1e-5, "epsilon": 8.0, "accountant": "prv"}))
def test_a_plan_beside_it_that_was_not_sealed_is_refused(tree: object, directory: Path) -> None:
    path = directory / "alone" / "ledger.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(CONTENT)
    path.with_name("plan.json").write_text(json.dumps(tree))
    with pytest.raises(FedpipeError):
        verify_ledger(path)


@pytest.mark.slow
@tried(EXPLORED)
@given(content=CHANGED)
def test_many_more(content: bytes, directory: Path) -> None:
    refused_or_a_beginning(directory / "ledger.jsonl", content)
