"""The backbone: fetched once, checked before every use, read from safetensors only.

A checkpoint that is a pickle can run code when it is loaded; such weights are refused
wherever they come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedpipe.data.origin import NAME as ORIGIN
from fedpipe.data.origin import base, describe, digests, read_origin, unchanged, verify, write_origin
from fedpipe.data.packages import BACKBONES, PREFIX, fetch_package, find_package
from fedpipe.errors import DataError, StateError
from fedpipe.files import digest, read_json, write_atomic

PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model")
CARD = "README.md"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Backbone:
    """A backbone whose files have been checked.

    Attributes
    ----------
    path : Path
        A directory in the Hugging Face layout, for `from_pretrained`.
    digest : str
        sha256 over the sorted (relative name, sha256) of its files.
    name : str
        `model.backbone`, as it was when it was fetched.
    origin : dict
        Source, licence and the sha256 of each file.
    """

    path: Path
    digest: str
    name: str
    origin: dict[str, Any]


def fetch_backbone(name: str, backbone: Path) -> dict[str, Any]:
    """Have the backbone `name` at hand; write `backbone/origin.json` and return it.

    `package:NAME` and a hub id are downloaded into `backbone`, once; of a local directory only
    path and sha256 are kept.

    Raises
    ------
    DataError
        There is no such backbone, it cannot be reached, or it has no safetensors weights.
    """
    path = Path(name).expanduser()
    if name.startswith(PREFIX):
        origin = fetch_package(name, find_package(name, BACKBONES, "model.backbone"), backbone)
    elif path.is_dir():
        origin = describe(name, "directory", digests(path, _files(path, name)), path=path, origin="a local directory")
    elif path.exists() or path.is_absolute() or name.startswith((".", "~")):
        raise DataError(f"model.backbone: {name}: no such directory, seen from {Path.cwd()}")
    else:
        origin = unchanged(backbone, name) or _fetch_hub(name, backbone)
    return write_origin(backbone, origin)


def open_backbone(backbone: Path, name: str | None = None) -> Backbone:
    """Check a fetched backbone, and that it is `name` where one is given.

    Raises
    ------
    DataError
        Nothing or another backbone was fetched, or a file has changed, come or gone since.
    """
    origin = read_origin(backbone, "backbone")
    if name is not None and origin["source"] != name:
        raise DataError(f"{backbone}: holds '{origin['source']}', but model.backbone is '{name}'; run `fedpipe fetch`")
    verify(backbone, origin)
    path = base(backbone, origin)
    added = {file.name for file in _files(path, origin["source"])} - set(origin["files"])
    if added:
        raise DataError(f"{path / min(added)}: was not there when the backbone was fetched; run `fedpipe fetch` again")
    return Backbone(path, digest(sorted(origin["files"].items())), origin["source"], origin)


def _files(path: Path, name: str) -> list[Path]:
    """Return the model's files, in the top directory only; refuse a model that has no safetensors."""
    if not (path / "config.json").is_file():
        raise DataError(f"model.backbone: {name}: no config.json in it; expected a model in the Hugging Face layout")
    if not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        found = f", only {pickles[0]}, which may run code when it is read" if pickles else ""
        raise DataError(
            f"model.backbone: {name}: no *.safetensors in it{found}; save the model once with "
            "save_pretrained(..., safe_serialization=True)"
        )
    for weights in sorted(path.glob("*.safetensors")):
        _check_header(weights, name)
    _check_names(path, name)
    return [file for pattern in PATTERNS for file in path.glob(pattern) if file.is_file() and file.name != ORIGIN]


def _check_names(path: Path, name: str) -> None:
    """Refuse files that lead elsewhere: all that is read must be in this directory, where its digest is taken."""
    if (path / "adapter_config.json").exists():
        raise DataError(f"model.backbone: {name}: is an adapter; merge it into its base model and save that")
    try:
        wanted = {read_json(path / "config.json").get("transformers_weights")} - {None}
        for index in path.glob("*.safetensors.index.json"):
            wanted |= set(read_json(index)["weight_map"].values())
    except (StateError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"model.backbone: {name}: its config.json or index is damaged: {error}") from error
    there = {file.name for pattern in PATTERNS for file in path.glob(pattern)}
    if strange := sorted(str(file) for file in wanted - there):
        raise DataError(f"model.backbone: {name}: names the weights {ascii(strange[0])[:80]}, which are not in it")


def _check_header(weights: Path, name: str) -> None:
    """Refuse a file that was cut off, as by a download that broke: its header says how long it must be."""
    try:
        with safe_open(weights, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"model.backbone: {name}: {weights.name} is damaged ({error}); download or save the model again"
        ) from error


def _fetch_hub(name: str, backbone: Path) -> dict[str, Any]:
    import huggingface_hub

    huggingface_hub.utils.disable_progress_bars()
    try:
        # Without local_dir the hub's cache is used: a download goes on after an interruption, and
        # a model that is in the cache needs no network.
        snapshot = Path(
            huggingface_hub.snapshot_download(name, allow_patterns=[*PATTERNS, CARD], ignore_patterns=["*/*"])
        )
    except Exception as error:  # the hub's client raises a dozen kinds for a name or a network
        reason = " ".join(str(error).split())
        raise DataError(
            f"model.backbone: '{name}' cannot be downloaded from the hub: {reason}; check the id and the network, "
            "or give a local directory or package:NAME"
        ) from error
    files = sorted(_files(snapshot, name))
    kept = {file.name: write_atomic(backbone / file.name, file.read_bytes()) for file in files}
    more = {"version": snapshot.name}
    if (snapshot / CARD).is_file():
        stated = huggingface_hub.ModelCard.load(snapshot / CARD, ignore_metadata_errors=True).data.license
        more |= {"license": stated} if isinstance(stated, str) else {}
    return describe(name, "hub", kept, origin="the Hugging Face hub", **more)
