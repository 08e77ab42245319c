"""The ledger: nothing runs uncounted, nothing is counted twice, nothing is changed unseen."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from fedpipe.errors import PrivacyError, StateError, StorageError
from fedpipe.files import canonical_json, digest
from fedpipe.privacy.accounting import epsilon_prv, epsilon_rdp
from fedpipe.privacy.ledger import Ledger, LedgerEntry, open_ledger
from fedpipe.privacy.summary import summary


def step(client: str = "c000", round: int = 1, step: int = 1, query: str = "q", sigma: float = 1.1, q: float = 0.1):
    return LedgerEntry(client, round, step, sigma, q, query)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run" / "ledger.jsonl"


@pytest.fixture
def ledger(path) -> Ledger:
    return Ledger(path, run_id="run-1")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_canonical_and_chained_to_its_clients_line_before(ledger, path):
    ledger.append([step("c000"), step("c001", sigma=2)])
    ledger.append([step("c001", step=2, sigma=2), step("c000", step=2)])
    header, *rest = lines(path)
    assert path.read_bytes() == b"".join(canonical_json(line).encode() + b"\n" for line in (header, *rest))
    adjacency = "add/remove one record of one client"
    assert {name: header[name] for name in header if name != "hash"} == {
        "format": 1, "run_id": "run-1", "unit": "record", "adjacency": adjacency,
    }  # fmt: skip
    for line in (header, *rest):
        assert line["hash"] == digest({name: line[name] for name in line if name != "hash"})
    assert [line["client"] for line in rest] == ["c000", "c001", "c001", "c000"]
    assert [line["prev"] for line in rest] == [header["hash"], header["hash"], rest[1]["hash"], rest[0]["hash"]]
    assert rest[1] | {"hash": "", "prev": ""} == {
        "client": "c001", "round": 1, "step": 1, "sigma": 2.0, "q": 0.1, "query": "q",
        "mechanism": "poisson-gaussian", "hash": "", "prev": "",
    }  # fmt: skip
    assert ledger.heads() == {"c000": rest[3]["hash"], "c001": rest[2]["hash"]}
    ledger.verify()


def test_what_was_appended_is_read_back(ledger, path):
    entries = [step("c001"), step("c000"), step("c000", step=2), step("c000", round=3, sigma=2.0)]
    ledger.append(entries)
    for reader in (ledger, Ledger(path), Ledger(path, run_id="run-1")):
        assert reader.entries() == tuple(entries)
        assert reader.entries("c000") == tuple(entries[1:])
        assert reader.clients() == ("c000", "c001")
        assert reader.history("c000") == ((1.1, 0.1, 2), (2.0, 0.1, 1))
        assert reader.history("c000", through_round=2) == ((1.1, 0.1, 2),)
        assert reader.history("nobody") == ()
        assert [reader.participations(client) for client in ("c000", "c001", "nobody")] == [2, 1, 0]


def test_chains_do_not_depend_on_the_order_of_clients(tmp_path):
    batches = [[step(client, step=number) for number in (1, 2, 3)] for client in ("c0", "c1", "c2")]
    heads = []
    for number, order in enumerate(itertools.permutations(batches)):
        ledger = Ledger(tmp_path / f"{number}.jsonl", run_id="run-1")
        for entry in itertools.chain(*(zip(*order, strict=True) if number % 2 else order)):
            ledger.append([*entry] if isinstance(entry, tuple) else [entry])
        ledger.verify()
        heads.append((ledger.heads(), [ledger.history(client) for client in ("c0", "c1", "c2")]))
    assert all(head == heads[0] for head in heads)
    assert Ledger(tmp_path / "other.jsonl", run_id="run-2").header != ledger.header


def test_the_same_chain_in_another_run_has_other_hashes(tmp_path):
    ledgers = [Ledger(tmp_path / run_id, run_id=run_id) for run_id in ("a", "b")]
    for ledger in ledgers:
        ledger.append([step()])
    assert ledgers[0].heads() != ledgers[1].heads()


def test_a_step_that_runs_again_is_not_counted_again(ledger, path):
    ledger.append([step(), step("c001")])
    before = path.read_bytes()
    ledger.append([step(), step("c001")])
    Ledger(path).append([step("c001")])
    assert path.read_bytes() == before
    ledger.append([step(step=2), step(step=2), step()])
    assert ledger.history("c000") == ((1.1, 0.1, 2),)


def test_the_same_step_under_another_query_is_counted(ledger):
    for query in ("q", "p", "q"):
        ledger.append([step(query=query)])
    assert ledger.history("c000") == ((1.1, 0.1, 2),)
    assert ledger.participations("c000") == 1


@pytest.mark.parametrize("change", [{"sigma": 2.0}, {"q": 0.2}])
def test_one_query_with_two_mechanisms_is_refused(ledger, path, change):
    ledger.append([step()])
    before = path.read_bytes()
    for entries in ([step(**change)], [step(step=2), step(step=2, **change)]):
        with pytest.raises(PrivacyError, match="would cancel out"):
            ledger.append(entries)
    assert path.read_bytes() == before


def test_an_append_is_one_write_and_one_fsync_of_the_ledger_before_it_returns(ledger, path, monkeypatch):
    calls = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda handle, content: calls.append(("write", content)) or write(handle, content))
    monkeypatch.setattr(
        os, "fsync", lambda handle: calls.append(("fsync", os.readlink(f"/proc/self/fd/{handle}"))) or fsync(handle)
    )
    before = path.read_bytes()
    ledger.append([step(f"c{number:03}") for number in range(20)])
    assert calls == [("write", path.read_bytes()[len(before) :]), ("fsync", str(path))]
    calls.clear()
    ledger.append([step("c003")])  # it may have been written by a process that died before its fsync
    assert calls == [("fsync", str(path))]


@pytest.mark.parametrize("failing", ["write", "second write", "fsync"])
def test_a_full_disk_stops_the_step_and_leaves_the_ledger_as_it_was(ledger, path, monkeypatch, failing):
    ledger.append([step()])
    before, write = path.read_bytes(), os.write

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(handle, content):
        monkeypatch.setattr(os, "write", full)
        return write(handle, content[: len(content) // 2])

    with monkeypatch.context():
        name, fake = {"write": ("write", full), "second write": ("write", half), "fsync": ("fsync", full)}[failing]
        monkeypatch.setattr(os, name, fake)
        with pytest.raises(StorageError, match="disk is full"):
            ledger.append([step(step=2), step("c001")])
        monkeypatch.undo()
    assert path.read_bytes() == before
    assert ledger.entries() == (step(),)
    ledger.append([step(step=2)])
    assert Ledger(path).history("c000") == ((1.1, 0.1, 2),)


def test_a_short_write_is_completed(ledger, path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: write(handle, content[:7]))
    ledger.append([step(), step("c001")])
    monkeypatch.undo()
    assert Ledger(path).entries() == (step(), step("c001"))


def test_a_torn_last_line_is_dropped_at_whatever_byte_it_broke(tmp_path, caplog):
    whole = Ledger(tmp_path / "whole.jsonl", run_id="run-1")
    whole.append([step(), step("c001")])
    start = len(whole.path.read_bytes())
    whole.append([step(step=2)])
    content = whole.path.read_bytes()
    path = tmp_path / "torn.jsonl"
    for end in range(start, len(content)):
        path.write_bytes(content[:end])
        caplog.clear()
        ledger = Ledger(path)
        ledger.verify()
        assert ledger.history("c000") == ((1.1, 0.1, 1),)
        assert path.read_bytes() == content[:end]  # a reader changes nothing
        ledger.append([step(step=2)])
        assert path.read_bytes() == content
        assert ("torn" in caplog.text) == (end > start)
        assert ledger.heads() == whole.heads()


def test_a_torn_batch_keeps_its_whole_lines(ledger, path):
    ledger.append([step(f"c{number}") for number in range(4)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 400])
    again = Ledger(path)
    kept = again.clients()
    assert 0 < len(kept) < 4
    again.append([step(f"c{number}") for number in range(4)])
    assert path.read_bytes() == content


def test_a_torn_header_is_written_anew(path, ledger):
    header = path.read_bytes()
    for end in (0, 1, len(header) // 2, len(header) - 1):
        path.write_bytes(header[:end])
        if end == len(header) - 1:
            with pytest.raises(PrivacyError, match="line 1: the header is missing"):
                Ledger(path)
        assert Ledger(path, run_id="run-1").header["run_id"] == "run-1"
        assert path.read_bytes() == header


def changed(content: bytes) -> dict[str, tuple[bytes, int]]:
    """Return changed files, each with the number of the line that must be named."""
    rows = content.splitlines(keepends=True)
    c0, c1, c0_next, c0_last = rows[1:5]
    forged = json.loads(c0_next) | {"sigma": 9.0}
    forged["hash"] = digest({name: forged[name] for name in forged if name != "hash"})
    return {
        "edited value": (content.replace(b'"sigma":1.1', b'"sigma":1.2', 1), 2),
        "edited hash": (content.replace(json.loads(c1)["hash"].encode(), b"0" * 64), 3),
        "edited header": (content.replace(b'"unit":"record"', b'"unit":"client"'), 1),
        "edited with a new hash": (
            b"".join([*rows[:3], canonical_json(forged).encode() + b"\n", c0_last]), 5,
        ),
        "added space": (content.replace(b'"round":1', b'"round": 1', 1), 2),
        "removed first": (b"".join([rows[0], c1, c0_next, c0_last]), 3),
        "removed middle": (b"".join([rows[0], c0, c1, c0_last]), 4),
        "swapped": (b"".join([rows[0], c0, c1, c0_last, c0_next]), 4),
        "repeated": (content + c0_last, 6),
        "another client": (content.replace(b'"client":"c001"', b'"client":"c009"'), 3),
        "not JSON": (content + b"nonsense\n", 6),
        "not a line of this kind": (content + b"[1]\n", 6),
        "an empty line": (content + b"\n", 6),
        "zeros": (content + bytes(50) + b"\n", 6),
        "NaN": (content + b'{"hash":NaN}\n', 6),
        "removed header": (b"".join(rows[1:]), 1),
        "nothing": (b"", 1),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(changed(b'{"hash":""}\n' * 5)))
def test_changes_are_found_and_the_line_is_named(ledger, path, kind):
    ledger.append([step("c000"), step("c001"), step("c000", step=2), step("c000", step=3)])
    content, number = changed(path.read_bytes())[kind]
    assert content != path.read_bytes()
    path.write_bytes(content)
    for reader in (lambda: Ledger(path), ledger.verify):
        with pytest.raises(PrivacyError, match=f"line {number}: "):
            reader()
    before = path.read_bytes()
    with pytest.raises(PrivacyError):
        ledger.append([step("c002")])
    assert path.read_bytes() == before


def test_a_cut_off_end_is_seen_by_who_knew_it_and_by_the_heads(ledger, path):
    ledger.append([step(), step(step=2)])
    heads = ledger.heads()
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    for use in (ledger.verify, lambda: ledger.append([step(step=3)])):
        with pytest.raises(PrivacyError, match="are gone"):
            use()
    assert Ledger(path).heads() != heads


def test_steps_are_counted_by_round_and_query_and_in_all(ledger):
    assert ledger.taken(1, "q") == ledger.taken_in_all() == {}
    assert ledger.histories() == set()
    ledger.append([step(), step(step=2), step(query="p"), step("c001"), step("c001", round=2, sigma=2.0)])
    for reader in (ledger, Ledger(ledger.path)):
        assert reader.taken(1, "q") == {"c000": 2, "c001": 1}
        assert reader.taken(1, "p") == {"c000": 1}
        assert reader.taken(2, "p") == {}
        assert reader.taken_in_all() == {"c000": 3, "c001": 2}
        assert reader.histories() == {((1.1, 0.1, 3),), ((1.1, 0.1, 1), (2.0, 0.1, 1))}
        assert reader.histories() == {reader.history(client) for client in reader.clients()}


def test_a_process_reads_a_line_once(ledger, path, monkeypatch):
    ledger.append([step(), step("c001")])
    taken = []
    take = Ledger._take
    monkeypatch.setattr(Ledger, "_take", lambda self, line: taken.append(line) or take(self, line))
    for _ in range(3):
        assert open_ledger(path).taken_in_all() == {"c000": 1, "c001": 1}
    assert len(taken) == 3  # the header and two lines
    Ledger(path).append([step(round=2)])  # as another process would
    taken.clear()
    os.utime(path, ns=(1, 1))  # the times say nothing: what was read is compared, and not read again
    assert open_ledger(path).taken_in_all() == {"c000": 2, "c001": 1}
    assert len(taken) == 1
    open_ledger(path).verify()
    assert len(taken) == 1


@pytest.mark.parametrize("kind", list(changed(b'{"hash":""}\n' * 5)))
def test_a_process_that_has_read_the_ledger_finds_changes(ledger, path, kind):
    ledger.append([step("c000"), step("c001"), step("c000", step=2), step("c000", step=3)])
    known = open_ledger(path)
    content, number = changed(path.read_bytes())[kind]
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))  # so that the times tell, however fast this was
    with pytest.raises(PrivacyError, match=f"line {number}: "):
        open_ledger(path)
    with pytest.raises(PrivacyError):
        known.verify()


def test_a_process_takes_a_ledger_cut_short_or_replaced_as_a_new_process_does(ledger, path):
    ledger.append([step(), step(step=2), step("c001")])
    assert open_ledger(path).taken_in_all() == {"c000": 2, "c001": 1}
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    assert open_ledger(path).taken_in_all() == {"c000": 1}
    path.write_bytes(whole)
    assert open_ledger(path).taken_in_all() == {"c000": 2, "c001": 1}
    path.unlink()
    with pytest.raises(StateError, match="cannot be read"):
        open_ledger(path)


def test_a_missing_ledger_and_that_of_another_run_are_refused(tmp_path, path, ledger):
    with pytest.raises(StateError, match="cannot be read"):
        Ledger(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()
    with pytest.raises(PrivacyError, match="run-2"):
        Ledger(path, run_id="run-2")
    with pytest.raises(PrivacyError, match="expected"):
        Ledger(path, run_id="run-1", unit="client")
    with pytest.raises(PrivacyError, match="did you mean 'record'"):
        Ledger(tmp_path / "x.jsonl", run_id="run-1", unit="records")


@pytest.mark.parametrize(
    "change", [{"sigma": 0.0}, {"q": 1.5}, {"sigma": float("nan")}, {"round": "1"}, {"step": True}, {"query": None}]
)
def test_impossible_entries_are_refused(change):
    with pytest.raises(PrivacyError, match="expected"):
        step(**change)


def test_objects_on_one_file_see_each_other(path, ledger):
    other = Ledger(path)
    ledger.append([step()])
    assert other.history("c000") == ((1.1, 0.1, 1),)
    other.append([step(step=2), step("c001")])
    assert ledger.history("c000") == ((1.1, 0.1, 2),)
    assert ledger.clients() == ("c000", "c001")


def test_threads_share_one_object(ledger, path):
    def work(client: str) -> None:
        for number in range(20):
            ledger.append([step(client, step=number), step("shared", step=number)])

    threads = [threading.Thread(target=work, args=(f"c{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Ledger(path).verify()
    assert len(lines(path)) == 1 + 4 * 20 + 20


def test_writers_and_readers_wait_for_a_writer(ledger, path):
    other, done = Ledger(path), []
    with open(path, "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, os.SEEK_END)
        file.write(b'{"a line in the making')
        file.flush()
        tasks = [lambda: ledger.append([step()]), lambda: other.entries()]
        threads = [threading.Thread(target=lambda task=task: done.append(task())) for task in tasks]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        assert not done
        file.truncate(len(path.read_bytes()) - 22)
    for thread in threads:
        thread.join()
    assert len(done) == 2
    assert ledger.entries() == Ledger(path).entries() == (step(),)


def _worker(path: str, client: str) -> None:
    ledger = Ledger(Path(path), run_id="run-1")
    for number in range(15):
        ledger.append([step(client, step=number), step("shared", step=number)])


def test_processes_share_one_file(path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(str(path), client)) for client in ("c0", "c1")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    ledger = Ledger(path)
    assert {client: ledger.history(client) for client in ledger.clients()} == dict.fromkeys(
        ("c0", "c1", "shared"), ((1.1, 0.1, 15),)
    )
    assert len(lines(path)) == 1 + 3 * 15


def test_summary(ledger):
    ledger.append([step("c000", round, number) for round in (1, 2) for number in (1, 2, 3)])
    ledger.append([step("c001", 2, number, sigma=0.9, q=0.2) for number in (1, 2, 3)])
    sizes = {"c002": 70, "c000": 100, "c001": 50}
    result = summary(ledger, 1e-5, "prv", sizes, dp_valid=True, unit="record")
    first, second = [(1.1, 0.1, 6)], [(0.9, 0.2, 3)]
    assert json.loads(canonical_json(result)) == {
        "unit": "record",
        "adjacency": "add/remove one record of one client",
        "delta": 1e-5,
        "accountant": "prv",
        "epsilon_max": epsilon_prv(second, 1e-5),
        "epsilon_max_rdp": epsilon_rdp(second, 1e-5),
        "dp_valid": True,
        "head": ledger.heads(),
        "clients": {
            "c000": {"records": 100, "sampling_rate": 0.1, "entries": [[1.1, 0.1, 6]], "participations": 2,
                     "epsilon_prv": epsilon_prv(first, 1e-5), "epsilon_rdp": epsilon_rdp(first, 1e-5),
                     "epsilon": epsilon_prv(first, 1e-5)},
            "c001": {"records": 50, "sampling_rate": 0.2, "entries": [[0.9, 0.2, 3]], "participations": 1,
                     "epsilon_prv": epsilon_prv(second, 1e-5), "epsilon_rdp": epsilon_rdp(second, 1e-5),
                     "epsilon": epsilon_prv(second, 1e-5)},
            "c002": {"records": 70, "sampling_rate": None, "entries": [], "participations": 0,
                     "epsilon_prv": 0.0, "epsilon_rdp": 0.0, "epsilon": 0.0},
        },
    }  # fmt: skip
    by_rdp = summary(ledger, 1e-5, "rdp", sizes, dp_valid=False, sampling_rates={"c002": 0.3})
    assert by_rdp["epsilon_max"] == by_rdp["epsilon_max_rdp"] == epsilon_rdp(second, 1e-5)
    assert by_rdp["dp_valid"] is False
    assert by_rdp["clients"]["c002"]["sampling_rate"] == 0.3


def test_summary_without_privacy_has_no_epsilon():
    result = summary(None, 1e-5, "prv", {"c000": 10}, dp_valid=True, unit="none")
    assert (result["epsilon_max"], result["adjacency"], result["dp_valid"]) == (None, None, False)
    assert result["clients"]["c000"]["epsilon"] is None


def test_summary_refuses_a_ledger_that_does_not_fit(ledger):
    ledger.append([step("c009")])
    with pytest.raises(PrivacyError, match="'c009', which the partition has not"):
        summary(ledger, 1e-5, "prv", {"c000": 10}, dp_valid=True)
    with pytest.raises(PrivacyError, match="unit 'client'"):
        summary(ledger, 1e-5, "prv", {"c009": 10}, dp_valid=True, unit="client")
    with pytest.raises(PrivacyError, match="unit 'record'"):
        summary(None, 1e-5, "prv", {"c009": 10}, dp_valid=True)
