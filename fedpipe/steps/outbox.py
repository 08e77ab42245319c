"""What clients hold ready for a secure sum: on their own side, and known to the server by a mark that tells nothing.

A plain digest in the server's files would be a function of an update that nobody else may see: with it a
guess at the update could be confirmed, and where clients are the unit no noise is in it yet. So the
digest goes through a stream of the client's key: without the key, the mark is a random number.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedpipe.errors import StateError
from fedpipe.files import file_digest, inside, private_directory, read_tensors, write_tensors
from fedpipe.models.factors import State
from fedpipe.privacy.noise import KeyedStream, client_key
from fedpipe.state import Run


def put(run: Run, round: int, client: str, update: State) -> dict[str, str]:
    """Write an update where only the client reads it; return the file's name below the run, and its mark."""
    path = run.client_dir(client) / f"outbox-{round:04d}.safetensors"
    private_directory(path.parent.parent)
    # Not flushed: a torn one does not have its mark, and its cohort is trained again to the same bytes.
    sha256 = write_tensors(path, dict(update), durable=False)
    return {"file": str(path.relative_to(run.root)), "mark": _mark(run, client, sha256)}


def take(run: Run, client: str, entry: Mapping[str, str]) -> dict[str, Tensor]:
    """Read an update again.

    Raises
    ------
    StateError
        It is missing, or not what was put there.
    """
    path = inside(run.root, entry["file"])
    if not path.exists() or _mark(run, client, file_digest(path)) != entry["mark"]:
        raise StateError(f"{path}: is missing or damaged; run the same command again: it is computed anew")
    return read_tensors(path)


def empty(run: Run, round: int) -> None:
    """Delete what clients held ready, up to a round: it is summed, and nobody else's."""
    for path in sorted((run.root / "clients").glob("*/outbox-*.safetensors")):
        if int(path.stem.removeprefix("outbox-")) <= round:
            path.unlink()


def _mark(run: Run, client: str, sha256: str) -> str:
    return KeyedStream(client_key(run.key, client), "mark of an outbox", sha256).uint64(4).tobytes().hex()
