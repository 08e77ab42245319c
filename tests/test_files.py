"""Files are whole or absent, digests prove it, and what the disk refuses is one clear line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpipe import files
from fedpipe.errors import StateError, StorageError, nearest
from fedpipe.files import (
    canonical_json,
    digest,
    file_digest,
    read_json,
    read_sealed,
    read_tensors,
    steady_digest,
    storage,
    write_atomic,
    write_json,
    write_sealed,
    write_tensors,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class TestWriteAtomic:
    def test_it_makes_the_directories_and_returns_the_digest(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b" / "file"
        assert write_atomic(path, b"content") == hashlib.sha256(b"content").hexdigest() == file_digest(path)
        assert path.read_bytes() == b"content"
        assert [found.name for found in path.parent.iterdir()] == ["file"]

    def test_it_replaces(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        write_atomic(path, b"old and longer")
        write_atomic(path, b"new")
        assert path.read_bytes() == b"new"

    @pytest.mark.parametrize("mode", [0o644, 0o600])
    def test_it_is_readable_by_whom_it_should(self, tmp_path: Path, mode: int) -> None:
        before = os.umask(0o077)
        try:
            write_atomic(tmp_path / "file", b"x", mode)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode

    @pytest.mark.parametrize("function", ["fsync", "fchmod", "replace"])
    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
    def test_a_failure_leaves_the_old_content_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
    ) -> None:
        path = tmp_path / "file"
        write_atomic(path, b"old")

        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(os, function, fail)
        with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
            write_atomic(path, b"new")
        assert path.read_bytes() == b"old"
        assert [found.name for found in tmp_path.iterdir()] == ["file"]

    @pytest.mark.parametrize("function", ["fsync", "replace"])
    def test_a_killed_process_leaves_the_old_content(self, tmp_path: Path, function: str) -> None:
        path = tmp_path / "file"
        write_atomic(path, b"old")
        child = os.fork()
        if child == 0:
            setattr(os, function, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            write_atomic(path, b"new")
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert path.read_bytes() == b"old"
        write_atomic(path, b"newer")
        assert path.read_bytes() == b"newer"

    def test_what_killed_processes_left_is_swept_away_and_no_more(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left = tmp_path / "below" / ".file.abc.tmp"
        left.parent.mkdir()
        for path in (left, left.with_name("file.tmp"), left.with_name(".file")):
            path.write_text("x")
        sync = os.fsync
        # While another file is written.
        monkeypatch.setattr(os, "fsync", lambda handle: (files.sweep(tmp_path), sync(handle)))
        write_atomic(tmp_path / "below" / "other", b"x")
        assert sorted(path.name for path in left.parent.iterdir()) == [".file", "file.tmp", "other"]
        files.sweep(tmp_path / "nowhere")

    def test_a_file_in_the_way_of_a_directory(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("a file")
        with pytest.raises(StorageError, match=r"a/b/file: cannot write: .*"):
            write_atomic(tmp_path / "a" / "b" / "file", b"x")

    def test_only_what_need_not_last_is_not_flushed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flushed: list[str] = []
        monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
        digest = write_atomic(tmp_path / "a", b"x", durable=False)
        assert flushed == []
        assert digest == file_digest(tmp_path / "a") == write_atomic(tmp_path / "a", b"x")
        assert len(flushed) == 2
        assert flushed[1] == str(tmp_path)


class TestSteadyDigest:
    def test_it_is_that_of_the_file_there_is_now(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        for content in (b"one", b"two", b"longer"):  # within a tick of the clock, perhaps
            path.write_bytes(content)
            assert steady_digest(path) == hashlib.sha256(content).hexdigest()

    def test_a_file_that_rests_is_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, read = tmp_path / "file", []
        path.write_bytes(b"one")
        monkeypatch.setattr(files, "_SETTLED", -1)
        monkeypatch.setattr(files, "file_digest", lambda path: read.append(path) or file_digest(path))
        assert steady_digest(path) == steady_digest(path) == file_digest(path)
        assert read == [path]
        path.unlink()
        path.write_bytes(b"two")
        os.utime(path, ns=(1, 1))
        assert steady_digest(path) == file_digest(path)
        assert len(read) == 2

    def test_a_file_that_just_changed_is_read_every_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, read = tmp_path / "file", []
        path.write_bytes(b"one")
        os.utime(path, ns=(1, 1))  # the time of the change itself cannot be set
        monkeypatch.setattr(files, "file_digest", lambda path: read.append(path) or file_digest(path))
        assert steady_digest(path) == steady_digest(path)
        assert len(read) == 2

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="No such file"):
            steady_digest(tmp_path / "file")


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "the disk quota is used up; free some space"),
        (errno.EROFS, "the file system is read-only; choose a place that can be written"),
        (errno.EACCES, "permission denied; choose a place that this user can write"),
        (errno.EPERM, "permission denied; choose a place that this user can write"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_disk_refuses_says_where_why_and_what_to_do(number: int, reason: str) -> None:
    with pytest.raises(StorageError) as caught, storage(Path("reports/run.json")):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == (
        f"reports/run.json: cannot write: {reason}. Run the same command again; it goes on from the last complete step."
    )
    assert caught.value.exit_code == 4


class TestJson:
    @given(JSON)
    def test_equal_values_have_equal_digests_whatever_their_order(self, value: object) -> None:
        text = canonical_json({"first": value, "second": [value]})
        assert digest({"second": [value], "first": value}) == hashlib.sha256(text.encode()).hexdigest()
        assert json.loads(text) == {"first": value, "second": [value]}

    def test_values_that_differ_have_other_digests(self) -> None:
        values = [1, 1.5, "1", True, None, [], {}, [1], {"1": 1}]
        assert len({digest(value) for value in values}) == len(values)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
    def test_what_json_does_not_know_is_refused(self, tmp_path: Path, value: object) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical_json(value)
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "file.json", value)
        assert not list(tmp_path.iterdir())

    @given(JSON)
    def test_read_gives_what_was_written(self, tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
        path = tmp_path_factory.getbasetemp() / "value.json"
        assert read_json(path, write_json(path, value)) == value

    def test_it_ends_with_a_line_and_keeps_letters(self, tmp_path: Path) -> None:
        write_json(tmp_path / "file.json", {"a": "ü"})
        assert (tmp_path / "file.json").read_text(encoding="utf-8") == '{\n  "a": "ü"\n}\n'

    @pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe", b"{'a': 1}"])
    def test_a_damaged_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "file.json"
        path.write_bytes(content)
        with pytest.raises(StateError, match=rf"^{re.escape(str(path))}: is not a valid JSON file: "):
            read_json(path)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(StateError, match=r"file\.json: cannot be read: No such file or directory"):
            read_json(tmp_path / "file.json")


class TestTensors:
    def test_read_gives_what_was_written_in_any_order(self, tmp_path: Path) -> None:
        tensors = {"b": torch.randn(3, 4), "a": torch.arange(5), "c": torch.randn(4, 2).t()}
        first = write_tensors(tmp_path / "first", tensors)
        second = write_tensors(tmp_path / "second", dict(reversed(tensors.items())))
        assert first == second
        found = read_tensors(tmp_path / "first", first)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)

    def test_one_changed_bit_is_found(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        expected = write_tensors(path, {"a": torch.zeros(8)})
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        found = hashlib.sha256(content).hexdigest()
        with pytest.raises(StateError, match=f"damaged: its sha256 is {found[:12]}…, expected {expected[:12]}…"):
            read_tensors(path, expected)

    def test_a_file_that_is_cut_off(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        write_tensors(path, {"a": torch.zeros(8)})
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(StateError, match="file: is not a valid safetensors file: "):
            read_tensors(path)


def test_the_nearest_name_or_all() -> None:
    assert nearest("dirichet", ["iid", "dirichlet"]) == "did you mean 'dirichlet'?"
    assert nearest("x", ["iid", "shards"]) == "expected one of: iid, shards"


def test_a_key_that_a_sealed_file_lacks_is_a_fault_of_the_file(tmp_path: Path) -> None:
    write_sealed(tmp_path / "round.json", {"round": 1})
    found = read_sealed(tmp_path / "round.json")
    assert found == {"round": 1}
    assert json.loads(json.dumps(found)) == {"round": 1}
    assert found.get("metrics") is None
    with pytest.raises(StateError, match=r"round\.json: damaged, or of another version: lacks 'metrics'"):
        found["metrics"]
