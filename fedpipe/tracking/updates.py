"""Many small files as a few: the updates of a round, for a store that charges for each file.

A server takes some milliseconds for every artifact, whatever its size. So of more than `FEW`
clients, the updates are put together, `FEW` to a file. The names of the tensors then begin with
the client, `c0003/...`, and the name of the file says which clients are in it. Opened with
`safetensors.safe_open`, such a file gives one client's tensors without reading the others.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedpipe.files import read_sealed, read_tensors, write_tensors

FEW = 64  # clients; the tensors of so many are in memory at once


@contextlib.contextmanager
def few_files(directory: Path) -> Iterator[Path]:
    """Yield a directory with the same content in fewer files: `directory` itself where `updates/` holds few.

    What is yielded otherwise is a temporary directory, gone after the body.

    Raises
    ------
    StateError
        An update cannot be read.
    StorageError
        There is no space for temporary files.
    """
    updates = sorted((directory / "updates").glob("*.safetensors"))
    if len(updates) <= FEW:
        yield directory
        return
    listings = (read_sealed(path)["updates"] for path in directory.glob("cohort-*.json"))
    digests = {client: entry.get("sha256") for listing in listings for client, entry in listing.items()}
    with tempfile.TemporaryDirectory(prefix="fedpipe-updates-") as name:
        copy = Path(name)
        for path in directory.iterdir():
            if path.is_file() and not path.name.startswith("."):
                shutil.copyfile(path, copy / path.name)
        for start in range(0, len(updates), FEW):
            _join(updates[start : start + FEW], copy / "updates", digests)
        yield copy


def _join(updates: list[Path], target: Path, digests: Mapping[str, str]) -> None:
    tensors = {
        f"{path.stem}/{name}": tensor
        for path in updates
        for name, tensor in read_tensors(path, digests.get(path.stem)).items()
    }
    # Gone in a moment, so not worth waiting for the disk.
    write_tensors(target / f"{updates[0].stem}-{updates[-1].stem}.safetensors", tensors, durable=False)
