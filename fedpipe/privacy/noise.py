"""Secret randomness that can be drawn again: noise and samples as functions of a key and a context.

Every random number that privacy rests on comes from a stream named by what it is for: the
private query, round, client, step and tensor. The stream is ChaCha20 under the HMAC-SHA256
of that name, so without the key it cannot be told from true randomness, and with it a step
that is run again after a crash draws what it drew before. Releasing the same numbers twice
spends nothing; that is why resuming a run is free. The other half of the rule: what defines
a query (settings, data, code, clip norm, noise level) must be part of its name. One noise
under two queries would cancel out of their difference.

The key is the secret (see `fedpipe.privacy.keys`).
"""

from __future__ import annotations

import hashlib
import hmac
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from fedpipe.errors import PrivacyError
from fedpipe.privacy.keys import Key, check_key
from fedpipe.privacy.normals import CHUNK, WORDS, BoxMuller

_DOMAIN = b"fedpipe keyed stream 1\0"
_STREAM_BYTES = 2**32 * 64  # ChaCha20 counts blocks of 64 bytes in 32 bits; beyond, it would repeat
_ZEROS = memoryview(bytes(8 * WORDS * CHUNK))  # what is encrypted to get the keystream itself


def client_key(run_key: bytes, client: str) -> Key:
    """Derive the key of one client, which tells nothing about the run's key or another client's."""
    return _derive(run_key, _context("client", client))


def key_id(key: bytes) -> str:
    """Return a public name of a key (32 hex digits): equal for equal keys, and no help in finding the key."""
    return _derive(key, _context("key id")).hex()[:32]


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
    was drawn. A value depends on nothing else: not on the device, the number of threads, the
    processor or the versions of libraries (see `fedpipe.privacy.normals`).
    """

    def __init__(self, key: bytes, *context: str | int) -> None:
        self._cipher = _keystream(_derive(key, _context(*context)))
        self._left = _STREAM_BYTES

    def uint64(self, n: int) -> np.ndarray:
        """Return the next `n` uniform 64-bit integers, (n,) uint64."""
        self._take(8 * n)
        words = np.empty(n, dtype=np.uint64)
        for start in range(0, n, WORDS * CHUNK):
            _fill(self._cipher, words[start : start + WORDS * CHUNK])
        return words

    def bernoulli(self, n: int, q: float) -> np.ndarray:
        """Return `n` independent coins, (n,) bool, each true with probability `q`.

        The probability is exactly floor(q 2^64) / 2^64, which is never above `q` and equals it
        for every float from 2^-11 up: the sampling rate that is accounted is the one that ran.
        """
        if not 0 <= q <= 1:
            raise PrivacyError(f"sampling rate: found {q}; expected a number between 0 and 1")
        words = self.uint64(n)
        threshold = int(math.ldexp(q, 64))
        return np.ones(n, dtype=bool) if threshold == 2**64 else words < np.uint64(threshold)

    def gaussian(self, shape: int | Sequence[int]) -> np.ndarray:
        """Return standard normals, float64 of `shape`.

        Each is half the sum of four, which hides the gaps of one (see `fedpipe.privacy.normals`).
        One block of ChaCha20 gives two; where an odd number is drawn, the last is dropped.

        This protects the sampled numbers. It does not make the sum of gradient and noise, as
        rounded to float32, an exactly discrete Gaussian, whose guarantee would hold to the last
        bit; nor does it hide how long anything takes.
        """
        size = math.prod(shape) if isinstance(shape, Sequence) else int(shape)
        pairs = (size + 1) // 2
        self._take(8 * WORDS * pairs)
        source, normals = BoxMuller(min(pairs, CHUNK)), np.empty((pairs, 2))
        for start in range(0, pairs, CHUNK):
            n = min(CHUNK, pairs - start)
            _fill(self._cipher, source.words[:n])
            normals[start : start + n] = source.normals(n)
        return normals.reshape(-1)[:size].reshape(shape)

    def _take(self, size: int) -> None:
        if size > self._left:
            raise PrivacyError("a keyed stream ends after 256 GiB; draw from one with a narrower context")
        self._left -= size


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
    _check_std(std, tensor)
    normals = KeyedStream(key, "noise", query, round, client, step, tensor).gaussian(tuple(shape))
    return torch.from_numpy(np.asarray(std * normals, dtype=np.float32))


def add_step_noise(
    sums: Mapping[str, torch.Tensor],
    query: str,
    round: int,
    clients: Sequence[str],
    step: int,
    keys: Sequence[bytes],
    stds: Sequence[float],
) -> None:
    """Add to each client's row of each tensor, in place, the `step_noise` of that client, step and tensor.

    The same bytes as one `step_noise` after the other, several times as fast: what is drawn
    at a time is `CHUNK` pairs of normals, be they of many small tensors or of a piece of a
    large one. It stays on one thread: the array operations are so short that a second one
    mostly waits for Python's lock.

    Parameters
    ----------
    sums
        Tensors by name, each (len(clients), *shape). On the processor and in float32 no copy
        is made; otherwise a tensor's noise is gathered in float32 there first.
    keys, stds
        Of each client.

    Raises
    ------
    PrivacyError
        A standard deviation is not a finite number of 0 or above, a key is not 32 bytes, or a
        tensor does not have a row for each client; nothing was added.
    """
    for client, key, std in zip(clients, keys, stds, strict=True):
        check_key(key)
        _check_std(std, client)
    hosts = {name: _on_host(total) for name, total in sums.items()}
    rows = {name: _rows(host, len(clients)) for name, host in hosts.items()}
    places = [_context("noise", query, round, client, step) for client in clients]
    pieces = (
        piece
        for name, tensor in rows.items()
        for row, key, place, std in zip(tensor, keys, places, stds, strict=True)
        for piece in _pieces(row, key, place + _context(name), std)
    )
    source = BoxMuller(CHUNK)
    for batch in _batches(pieces):
        _add_batch(batch, source)
    for name, total in sums.items():
        if hosts[name] is not total:
            total += hosts[name].to(total.device)


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


def _check_std(std: float, owner: str) -> None:
    if not 0 <= std < math.inf:
        raise PrivacyError(f"noise of {owner}: found standard deviation {std}; expected a finite number, 0 or above")


def _derive(key: bytes, context: bytes) -> Key:
    check_key(key)
    return Key(hmac.digest(key, _DOMAIN + context, hashlib.sha256))


def _keystream(key: bytes, block: int = 0) -> CipherContext:
    """Return the cipher whose output, for zeros, is the keystream from a block of 64 bytes on."""
    return Cipher(ChaCha20(key, block.to_bytes(4, "little") + bytes(12)), mode=None).encryptor()


class _Piece(NamedTuple):
    """Numbers that noise is to be added to: up to 2 `CHUNK` of one row, from a block of its stream on."""

    numbers: np.ndarray
    key: bytes
    context: bytes
    block: int
    std: float

    @property
    def pairs(self) -> int:
        return (self.numbers.size + 1) // 2


def _on_host(total: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself where noise can be added in place, zeros of its shape elsewhere."""
    direct = total.device.type == "cpu" and total.dtype == torch.float32 and total.is_contiguous()
    return total if direct else torch.zeros(total.shape, dtype=torch.float32)


def _rows(host: torch.Tensor, count: int) -> np.ndarray:
    if host.dim() == 0 or len(host) != count:
        raise PrivacyError(f"noise for {count} clients: found a tensor of shape {tuple(host.shape)}, a row is a client")
    return host.detach().numpy().reshape(count, host[0].numel())


def _pieces(row: np.ndarray, key: bytes, context: bytes, std: float) -> Iterator[_Piece]:
    for start in range(0, row.size, 2 * CHUNK):
        yield _Piece(row[start : start + 2 * CHUNK], key, context, start // 2, std)


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Gather pieces for one go of a `BoxMuller`."""
    batch, pairs = [], 0
    for piece in pieces:
        if pairs + piece.pairs > CHUNK:
            yield batch
            batch, pairs = [], 0
        batch.append(piece)
        pairs += piece.pairs
    if batch:
        yield batch


def _add_batch(batch: Sequence[_Piece], source: BoxMuller) -> None:
    total = 0
    for piece in batch:
        cipher = _keystream(_derive(piece.key, piece.context), piece.block)
        _fill(cipher, source.words[total : total + piece.pairs])
        total += piece.pairs
    normals, start = source.normals(total).reshape(-1), 0
    for piece in batch:
        noise = normals[start : start + piece.numbers.size]
        np.multiply(noise, piece.std, out=noise)
        # Rounded before it is added: the noise is the same, to the bit, as where it is drawn alone.
        np.add(piece.numbers, noise.astype(np.float32), out=piece.numbers)
        start += 2 * piece.pairs


def _fill(cipher: CipherContext, words: np.ndarray) -> None:
    """Fill `words`, (n, 8) or (8 n,) uint64 with n up to `CHUNK`, with the next keystream."""
    cipher.update_into(_ZEROS[: words.nbytes], words.view(np.uint8).reshape(-1))
    if sys.byteorder == "big":
        words.byteswap(inplace=True)


def _context(*parts: str | int) -> bytes:
    return b"".join(map(_encode, parts))


def _encode(part: str | int) -> bytes:
    """Encode with type and length, so that no two contexts have the same bytes."""
    if isinstance(part, str):
        tag, content = b"s", part.encode()
    elif isinstance(part, int) and not isinstance(part, bool):
        tag, content = b"i", str(part).encode()
    else:
        raise TypeError(f"a context is made of str and int, found {type(part).__name__}: {part!r}")
    return tag + len(content).to_bytes(8, "big") + content
