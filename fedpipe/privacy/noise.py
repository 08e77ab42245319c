"""Secret randomness that can be drawn again: noise and samples as functions of a key and a context.

Every random number that privacy rests on comes from a stream named by what it is for: the
private query, round, client, step and tensor. The stream is ChaCha20 under the HMAC-SHA256
of that name, so without the key it cannot be told from true randomness, and with it a step
that is run again after a crash draws what it drew before. Releasing the same numbers twice
spends nothing; that is why resuming a run is free. The other half of the rule: what defines
a query (settings, data, code, clip norm, noise level) must be part of its name. One noise
under two queries would cancel out of their difference.

The key is the secret. It lives in a file of its own that only its owner can read, and is
destroyed when the run ends; afterwards nobody can take the noise off again.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import os
import stat
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from fedpipe.errors import PrivacyError, StateError
from fedpipe.files import storage, sync_directory

KEY_BYTES = 32

_DOMAIN = b"fedpipe keyed stream 1\0"
_STREAM_BYTES = 2**32 * 64  # ChaCha20 counts blocks of 64 bytes in 32 bits; beyond, it would repeat
_CHUNK = 4096  # pairs of normals at a time: the working set stays in the processor's cache


def new_key() -> bytes:
    """Return 32 fresh bytes from the operating system's generator."""
    return os.urandom(KEY_BYTES)


def write_key(path: Path, key: bytes) -> None:
    """Write a key to a new file that only its owner can read, and flush it to disk.

    Raises
    ------
    PrivacyError
        The file exists, or its directory exists and lets others in.
    StorageError
        The disk is full, read-only or not writable.
    """
    _check_key(key)
    with storage(path):
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(mode=0o700)
        mode = stat.S_IMODE(path.parent.stat().st_mode)
        if mode & 0o077:
            raise PrivacyError(
                f"{path.parent}: others may enter (mode {mode:04o}); a key needs a directory of mode 0700"
            )
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise PrivacyError(f"{path}: a key is there already, and noise may have been drawn with it") from None
        try:
            _write_synced(handle, key)
        except BaseException:
            os.unlink(path)
            raise
        sync_directory(path.parent)


def read_key(path: Path) -> bytes:
    """Read a key that `write_key` wrote.

    Raises
    ------
    PrivacyError
        The file is a link or no regular file, is not this user's, or others may read or write it.
    StateError
        It is missing, cannot be read, or does not hold 32 bytes.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise PrivacyError(f"{path}: is a link; expected the key file itself") from None
        raise StateError(
            f"{path}: the key of the noise cannot be read: {error.strerror}. Without it the run cannot go on; "
            "remove the run's directory to start anew, which spends privacy again"
        ) from error
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PrivacyError(f"{path}: expected a regular file of this user's own")
        if mode & ~0o600:
            raise PrivacyError(
                f"{path}: its mode is {mode:04o}, so that others may have read the key of the noise; expected 0600. "
                "If nobody did, run: chmod 600 on it"
            )
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        raise StateError(
            f"{path}: holds {status.st_size} bytes, expected {KEY_BYTES}: its write was interrupted or it was changed; "
            "remove the run's directory to start anew"
        )
    return key


def destroy_key(path: Path) -> None:
    """Overwrite a key, flush, and remove the file; do nothing where there is none.

    Overwriting reaches the old bytes only where the file system writes in place. Flash drives
    that level wear, file systems that journal data or copy on write, snapshots and backups may
    keep them. Where that matters, keep keys on an encrypted or a memory file system.
    """
    with storage(path):
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        _write_synced(handle, bytes(max(KEY_BYTES, os.fstat(handle).st_size)))
        os.unlink(path)
        sync_directory(path.parent)


def client_key(run_key: bytes, client: str) -> bytes:
    """Derive the key of one client, which tells nothing about the run's key or another client's."""
    return _derive(run_key, ("client", client))


def key_id(key: bytes) -> str:
    """Return a public name of a key (32 hex digits): equal for equal keys, and no help in finding the key."""
    return _derive(key, ("key id",)).hex()[:32]


class KeyedStream:
    """The random stream of one context: the same for the same key and context, unrelated to every other.

    Parameters
    ----------
    key
        32 secret bytes.
    context
        Strings and integers. They are encoded with their types and lengths, so `("ab", "c")`,
        `("a", "bc")`, `("1",)` and `(1,)` are four streams.

    Notes
    -----
    A stream is drawn from its start; drawing again from the same object goes on behind what
    was drawn. All arithmetic is NumPy's on the processor: neither the device nor the number of
    threads changes a value. (Its logarithms and cosines may differ by a last bit of float64
    between processor families.)
    """

    def __init__(self, key: bytes, *context: str | int) -> None:
        self._cipher = Cipher(ChaCha20(_derive(key, context), bytes(16)), mode=None).encryptor()
        self._left = _STREAM_BYTES

    def uint64(self, n: int) -> np.ndarray:
        """Return the next `n` uniform 64-bit integers, (n,) uint64."""
        size = 8 * n
        if size > self._left:
            raise PrivacyError("a keyed stream ends after 256 GiB; draw from one with a narrower context")
        self._left -= size
        words = np.empty(n, dtype="<u8")
        if n:
            self._cipher.update_into(bytes(size), words.view(np.uint8))
        return words.astype(np.uint64, copy=False)

    def bernoulli(self, n: int, q: float) -> np.ndarray:
        """Return `n` independent coins, (n,) bool, each true with probability `q`.

        The probability is exactly floor(q 2^64) / 2^64, which is never above `q` and equals it
        for every float from 2^-11 up: the sampling rate that is accounted is the one that ran.
        """
        if not 0 <= q <= 1:
            raise PrivacyError(f"sampling rate: found {q}; expected a number between 0 and 1")
        words = self.uint64(n)
        threshold = math.floor(Fraction(float(q)) * 2**64)
        return np.ones(n, dtype=bool) if threshold == 2**64 else words < np.uint64(threshold)

    def gaussian(self, shape: int | Sequence[int]) -> np.ndarray:
        """Return standard normals, float64 of `shape`.

        Each is half the sum of four, from four different Box-Muller pairs of 53-bit uniforms
        in (0, 1]; one block of ChaCha20 gives two. A single float64 sampler leaves gaps and
        multiplicities in its output that can tell two data sets apart (Mironov 2012); a sum of
        four makes the search for them infeasible (Holohan and Braghin 2021, arXiv:2107.10138).

        This protects the sampled numbers. It does not make the sum of gradient and noise, as
        rounded to float32, an exactly discrete Gaussian, whose guarantee would hold to the last
        bit; nor does it hide how long anything takes.
        """
        size = math.prod(shape) if isinstance(shape, Sequence) else int(shape)
        pairs = (size + 1) // 2
        normals = np.empty((pairs, 2))
        for start in range(0, pairs, _CHUNK):
            stop = min(start + _CHUNK, pairs)
            normals[start:stop] = _box_muller(self.uint64(8 * (stop - start)))
        return normals.reshape(-1)[:size].reshape(shape)


def step_noise(
    key: bytes,
    query: str,
    round: int,
    client: str,
    step: int,
    tensor: str,
    shape: Sequence[int],
    std: float,
) -> torch.Tensor:
    """Return the noise of one tensor in one local step: N(0, std²), float32 of `shape`, on the CPU.

    `query` must bind everything that the step's gradients and `std` depend on. A changed query
    then draws fresh noise, and has a ledger entry of its own.
    """
    if not 0 <= std < math.inf:
        raise PrivacyError(f"noise of {tensor}: found standard deviation {std}; expected a finite number, 0 or above")
    normals = KeyedStream(key, "noise", query, round, client, step, tensor).gaussian(tuple(shape))
    return torch.from_numpy(np.asarray(std * normals, dtype=np.float32))


def poisson_sample(key: bytes, query: str, round: int, client: str, step: int, n: int, q: float) -> np.ndarray:
    """Return which of a client's `n` records take part in one local step, sorted int64 indices; maybe none.

    Notes
    -----
    The query is bound here as it is for the noise. Accounting adds up steps whose samples are
    independent. If two queries shared a sample, a record would be in both or in neither: together
    they would be one subsampled Gaussian with noise multiplier sigma / sqrt(2), which spends more
    than the two entries in the ledger. The sample is secret for the same reason, so it comes from
    the key and not from the experiment's seed.
    """
    return np.flatnonzero(KeyedStream(key, "sample", query, round, client, step).bernoulli(n, q)).astype(np.int64)


def _check_key(key: bytes) -> None:
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise PrivacyError(f"key: expected {KEY_BYTES} bytes")


def _derive(key: bytes, context: Sequence[str | int]) -> bytes:
    _check_key(key)
    return hmac.new(key, _DOMAIN + b"".join(map(_encode, context)), hashlib.sha256).digest()


def _encode(part: str | int) -> bytes:
    """Encode with type and length, so that no two contexts have the same bytes."""
    if isinstance(part, str):
        tag, content = b"s", part.encode()
    elif isinstance(part, int) and not isinstance(part, bool):
        tag, content = b"i", str(part).encode()
    else:
        raise TypeError(f"a context is made of str and int, found {type(part).__name__}: {part!r}")
    return tag + len(content).to_bytes(8, "big") + content


def _box_muller(words: np.ndarray) -> np.ndarray:
    """Turn (8 n,) uint64 into (n, 2) normals: words 0-3 of each block are radii, words 4-7 angles."""
    blocks = np.ascontiguousarray(words.reshape(-1, 8).T)
    uniforms = ((blocks >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
    radii = np.sqrt(-2.0 * np.log(uniforms[:4]))
    angles = (2 * math.pi) * uniforms[4:]
    cosines, sines = radii * np.cos(angles), radii * np.sin(angles)
    # Written out: numpy's own sum over an axis may associate differently from version to version.
    pair = [((z[0] + z[1]) + (z[2] + z[3])) / 2 for z in (cosines, sines)]
    return np.stack(pair, axis=1)


def _write_synced(handle: int, content: bytes) -> None:
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
