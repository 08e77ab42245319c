"""The key of the noise: in one file while a run lasts, in nothing that anyone prints or stores, and then nowhere."""

from __future__ import annotations

import base64
import copy
import dataclasses
import hashlib
import importlib
import json
import logging
import os
import pickle
import pkgutil
import re
import stat
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import Fault, fedpipe, new_project, prefect_home

import fedpipe as package
from fedpipe import steps
from fedpipe.config import Settings, parse_settings
from fedpipe.errors import PrivacyError, StateError
from fedpipe.files import read_json
from fedpipe.privacy import keys, noise
from fedpipe.privacy.keys import Key, destroy_key, new_key, read_key, write_key
from fedpipe.privacy.noise import KeyedStream, client_key
from fedpipe.project import Project
from fedpipe.publish import publish
from fedpipe.report import write_report
from fedpipe.report.final import evaluate_adapter
from fedpipe.state import Run

pytestmark = pytest.mark.usefixtures("fresh_process")

CLIENTS = ("c000", "c001", "c002")


def spellings(key: bytes) -> dict[str, bytes]:
    """The ways in which a key's bytes get into a text or a binary file by accident."""
    decimal = list(map(str, key))
    texts = {
        "hex": key.hex(),
        "hex in capitals": key.hex().upper(),
        "hex by byte": key.hex(" "),
        "base64": base64.b64encode(key).decode().rstrip("="),
        "base64 for addresses": base64.urlsafe_b64encode(key).decode().rstrip("="),
        "base32": base64.b32encode(key).decode().rstrip("="),
        "decimal": ", ".join(decimal),
        "decimal without spaces": ",".join(decimal),
        "decimal in lines": "\n".join(decimal),
        "array": " ".join(decimal),
        "repr": repr(bytes(key))[2:-1],
        "json": json.dumps(key.decode("latin-1"))[1:-1],
        "number": str(int.from_bytes(key, "big")),
        "number from the other end": str(int.from_bytes(key, "little")),
    }
    return {"raw": bytes(key), **{name: text.encode() for name, text in texts.items()}}


def found(key: bytes, content: bytes) -> list[str]:
    return [name for name, spelling in spellings(key).items() if spelling in content]


def found_in_files(key: bytes, *roots: Path) -> list[str]:
    """Return the files below these directories, or with these names, that hold a key or a client's key."""
    secrets = [key, *(client_key(key, client) for client in CLIENTS)]
    files = [path for root in roots for path in (root.rglob("*") if root.is_dir() else [root]) if path.is_file()]
    assert len(files) > 20
    return sorted(str(path) for path in files if any(found(secret, path.read_bytes()) for secret in secrets))


@pytest.fixture
def settings(tiny: tuple[Project, Settings]) -> Settings:
    values = tiny[1].model_dump(mode="json")
    values["privacy"] |= {"test_key": None, "accountant": "rdp"}
    values["federation"]["rounds"] = 2
    return parse_settings(values)


@pytest.fixture
def project(tiny_copy: Project) -> Project:
    return tiny_copy


# The search itself


def test_the_search_finds_every_spelling(tmp_path: Path) -> None:
    key = os.urandom(32)
    for name, spelling in spellings(key).items():
        assert name in found(key, b"before" + spelling + b"after")
    assert found(os.urandom(32), b"".join(spellings(key).values())) == []


# The type


def test_a_key_computes_like_its_bytes_and_shows_nothing() -> None:
    raw = os.urandom(32)
    key = Key(raw)
    assert key == raw
    assert hashlib.sha256(key).digest() == hashlib.sha256(raw).digest()
    assert np.array_equal(KeyedStream(key, "a", 1).uint64(9), KeyedStream(raw, "a", 1).uint64(9))
    shown = (repr(key), str(key), f"{key}", f"{key!r:>9}", f"{key:s}", "%s" % key, repr([key]))  # noqa: UP031
    assert all(found(raw, text.encode()) == [] and "<key>" in text for text in shown)
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            take(key)
    with pytest.raises(TypeError):
        json.dumps(key)


def test_every_key_that_is_made_is_of_this_type(tmp_path: Path) -> None:
    write_key(tmp_path / "secrets" / "noise.key", key := new_key())
    made = (key, read_key(tmp_path / "secrets" / "noise.key"), client_key(key, "c000"), noise._derive(key, b""))
    assert {type(one) for one in made} == {Key}
    piece = noise._Piece(np.zeros(2, np.float32), client_key(key, "c000"), b"", 0, 1.0)
    assert "key=<key>" in repr(piece)


def test_no_dataclass_prints_a_key() -> None:
    """Also those of modules that are still to be written: a key's field is kept out of what is printed."""
    seen, kept = 0, set()
    for module in pkgutil.walk_packages(package.__path__, "fedpipe."):
        for kind in vars(importlib.import_module(module.name)).values():
            if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
                continue
            seen += 1
            for field in dataclasses.fields(kind):
                if "bytes" in str(field.type) and re.search("key|secret|seed", field.name):
                    kept.add(f"{kind.__qualname__}.{field.name}")
                    assert not field.repr, f"{kind.__module__}.{kind.__qualname__}.{field.name}"
    assert seen > 30
    assert "CohortWork.key" in kept


def test_a_test_key_is_not_in_the_print_of_the_settings(tiny: tuple[Project, Settings]) -> None:
    settings = tiny[1]
    assert settings.privacy.test_key == "ab" * 32
    assert "ab" * 32 not in f"{settings!r} {settings} {settings.privacy!r}"


# The file


def test_its_file_is_its_owners_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_key(tmp_path / "run" / "secrets" / "noise.key", new_key())
    finally:
        os.umask(before)
    path = tmp_path / "run" / "secrets" / "noise.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_it_is_never_open_to_others_not_even_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at between the making of the file and the first byte in it."""
    modes, write = [], keys._write_synced

    def looked(handle: int, content: bytes) -> None:
        modes.append((stat.S_IMODE(os.fstat(handle).st_mode), os.fstat(handle).st_size))
        write(handle, content)

    monkeypatch.setattr(keys, "_write_synced", looked)
    write_key(tmp_path / "secrets" / "noise.key", new_key())
    assert modes == [(0o600, 0)]


def test_a_destroyed_key_is_overwritten_where_it_lay(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "noise.key"
    write_key(path, key := new_key())
    os.link(path, tmp_path / "link")
    with path.open("rb") as opened:
        destroy_key(path)
        assert not path.exists()
        assert opened.read() == bytes(32) == (tmp_path / "link").read_bytes()
    assert key != bytes(32)
    destroy_key(path)  # nothing is there


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660])
def test_a_key_that_others_may_have_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secrets" / "noise.key"
    write_key(path, key := new_key())
    path.chmod(mode)
    with pytest.raises(PrivacyError, match="others may have read") as error:
        read_key(path)
    assert found(key, str(error.value).encode()) == []


def test_a_torn_key_is_refused_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "noise.key"
    write_key(path, key := new_key())
    path.write_bytes(key[:31])
    with pytest.raises(StateError, match="31 bytes, expected 32") as error:
        read_key(path)
    assert key[:8].hex() not in str(error.value)


# In a process


class _Everything(logging.Handler):
    """What all loggers say at the lowest level, arguments included, as any handler could print it."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += [record.getMessage(), repr(record.args), repr(record.__dict__)]


@pytest.fixture
def logged() -> Iterator[_Everything]:
    """Listen to all loggers, those included that keep what they say to themselves."""
    handler, root = _Everything(), logging.getLogger()
    loggers = [root, *(logging.getLogger(name) for name in list(logging.Logger.manager.loggerDict))]
    before = [(logger, logger.level, logger.propagate, logger.disabled) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.disabled = False
        logger.propagate = True
    root.addHandler(handler)
    yield handler
    root.removeHandler(handler)
    for logger, level, propagate, disabled in before:
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled


def said(lines: Iterable[str]) -> bytes:
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def test_a_whole_run_says_it_to_nobody(
    project: Project, settings: Settings, logged: _Everything, capfd: pytest.CaptureFixture[str]
) -> None:
    run = steps.prepare(project, settings).run
    key = run.key
    assert found_in_files(key, project.root) == [str(run.key_path)]
    for number in (1, 2):
        steps.run_round(run.root, number)
        assert found_in_files(key, project.root) == [str(run.key_path)]
        assert found(key, Path("/proc/self/environ").read_bytes() + said([*sys.argv, *os.environ.values()])) == []
    os.link(run.key_path, project.root.parent / "link")
    run.finish(publish(run, project))
    evaluate_adapter(project)
    write_report(project)
    assert not run.key_path.exists()
    assert (project.root.parent / "link").read_bytes() == bytes(32)
    assert found_in_files(key, project.root) == []
    captured = capfd.readouterr()
    logging.getLogger("fedpipe").debug("the end")
    assert any("the end" in line for line in logged.lines)
    assert found(key, said([*logged.lines, captured.out, captured.err])) == []


@pytest.mark.parametrize("place", ["_add_batch", "_keystream", "poisson_sample"])
def test_a_traceback_does_not_show_it_even_with_locals(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    run = steps.prepare(project, settings).run
    key, clients = run.key, [client_key(run.key, client) for client in run.plan.clients]
    steps.begin_round(run.root, 1)

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("an injected fault")

    where = importlib.import_module("fedpipe.client.training") if place == "poisson_sample" else noise
    monkeypatch.setattr(where, place, broken)
    with pytest.raises(RuntimeError, match="injected") as error:
        steps.train(run.root, 1, 0)
    shown = "".join(traceback.TracebackException.from_exception(error.value, capture_locals=True).format())
    assert "<key>" in shown
    for secret in (key, *clients):
        assert found(secret, shown.encode()) == []


# A whole run through the command


def test_a_killed_run_keeps_it_and_the_finished_one_leaves_none(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project", tracked=True, federation={"rounds": 2}, privacy={"test_key": None})
    failed = fedpipe(project, "run", fault=Fault("fedpipe.privacy.noise", "_batches", 3, "BUG"))
    assert failed.code == 1
    (path,) = project.glob("runs/*/secrets/noise.key")
    key = read_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert found_in_files(key, project, prefect_home()) == [str(path)]
    link = tmp_path / "link"
    os.link(path, link)
    with path.open("rb") as opened:
        done = fedpipe(project, "run")
        assert done.code == 0, done.err
        assert opened.read() == bytes(32)
    assert link.read_bytes() == bytes(32)
    assert not path.exists()
    assert found_in_files(key, project, prefect_home()) == []
    assert found(key, (failed.out + failed.err + done.out + done.err).encode()) == []
    assert read_json(project / "reports" / "metrics.json")["dp_valid"] is True
    assert (project / "mlflow.db").exists()
    assert list(project.glob("mlruns/**/round.json"))


@pytest.mark.parametrize(
    ("fault", "left"),
    [
        (Fault("fedpipe.state", "destroy_key", 1), "the key"),
        (Fault("fedpipe.privacy.keys", "_write_synced", 2, after=True), "zeros"),  # the first one wrote it
    ],
)
def test_a_crash_before_it_is_gone_is_made_good_by_the_next_start(tmp_path: Path, fault: Fault, left: str) -> None:
    project = new_project(tmp_path / "project", federation={"rounds": 1}, privacy={"test_key": None})
    assert fedpipe(project, "run", fault=fault).code == -9
    (path,) = project.glob("runs/*/secrets/noise.key")
    assert Run(path.parents[1]).complete
    assert (path.read_bytes() == bytes(32)) == (left == "zeros")
    os.link(path, tmp_path / "link")
    done = fedpipe(project, "run")
    assert done.code == 0, done.err
    assert "resumed: all 1 round were done before" in done.err
    assert not path.exists()
    assert (tmp_path / "link").read_bytes() == bytes(32)
