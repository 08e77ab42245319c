"""Secure aggregation, simulated: the server gets the sum of vectors, and no vector (Bonawitz et al. 2017).

In four steps, each of which clients may fail to reach. (1) Every client sends two public keys. (2) It
deals shares of its two secrets to the others, sealed so that the server, which passes them on, cannot
open them. (3) It sends its vector plus a mask for each pair, which one of the two adds and the
other subtracts, plus a mask of its own. (4) Told who has sent, it reveals its shares: of the own
mask of those who have, of the pair secret of those who have not. The server takes off what did not
cancel. Why the own mask: of a client declared dropped the pair masks become known, and its vector
may only have been late.

A `Server` is handed messages and gives back a `Sum`. It has no way to a vector: nothing that it is
passed or keeps contains one, or what would unmask one.

All parties follow the protocol and may pool what they see. A server that lies about public keys, or
tells each client something else, needs the paper's signatures, which are not here. The sum itself is
not private: what it tells about one client only noise can hide. CCS 2017, doi 10.1145/3133956.3133982.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedpipe.errors import PrivacyError
from fedpipe.privacy.noise import KeyedStream
from fedpipe.server.masking import Sum, Terms, add_mask, seed
from fedpipe.server.shamir import SHARE_BYTES, combine, draw, split

_NONCE = bytes(12)  # each key seals one message


class TooFewClientsError(PrivacyError):
    """Fewer clients than the threshold took a step of the protocol, so no sum was opened."""


@dataclass(frozen=True)
class Advert:
    """Step 1: a client's public keys, for sealing shares and for agreeing on pair masks."""

    client: str
    sealing: bytes
    masking: bytes


@dataclass(frozen=True)
class Deal:
    """Step 2: by receiver, a client's shares of its two secrets, sealed for the receiver."""

    client: str
    sealed: Mapping[str, bytes]


@dataclass(frozen=True)
class Upload:
    """Step 3: a client's masked integers, (entries,) uint32: uniform for whom the masks are secret."""

    client: str
    numbers: np.ndarray


@dataclass(frozen=True)
class Reveal:
    """Step 4: a client's shares of the own masks of those who sent, and of the pair secrets of those who did not."""

    client: str
    own: Mapping[str, int]
    pair: Mapping[str, int]


class Client:
    """One client of one round: it holds its vector and gives away masked integers only.

    Parameters
    ----------
    name
        One of `terms.clients`.
    key
        32 secret bytes of this client (`fedpipe.privacy.noise.client_key`).
    terms
        Of the round.
    vector
        (terms.size,) floating point.
    weight
        As `terms.codec` asks for it.

    Notes
    -----
    All its secrets are functions of the key, the terms and the encoded vector. A round that is run
    again sends the same bytes; another vector under the same terms gets other masks, so that no
    mask is ever under two vectors, where it would cancel out of their difference.
    """

    def __init__(self, name: str, key: bytes, terms: Terms, vector: np.ndarray, weight: int | None = None) -> None:
        if name not in terms.points or np.shape(vector) != (terms.size,):
            raise PrivacyError(f"secure aggregation: {name} with shape {np.shape(vector)} is not in the round's terms")
        self.name, self._terms = name, terms
        self._numbers = terms.codec.encode(vector, weight, KeyedStream(key, "rounding", terms.name, name))
        place = (terms.name, name, hashlib.sha256(self._numbers.astype("<u4")).hexdigest())
        self._own, self._masking = seed(key, "own mask", *place), seed(key, "pair masks", *place)
        self._sealing = seed(key, "sealing", *place)
        self._coefficients = KeyedStream(key, "shares", *place)
        self._adverts: dict[str, Advert] = {}
        self._held: dict[str, tuple[int, int]] = {}
        self._told: frozenset[str] | None = None

    def advertise(self) -> Advert:
        """Return the public keys."""
        return Advert(self.name, _public(self._sealing), _public(self._masking))

    def deal(self, adverts: Iterable[Advert]) -> Deal:
        """Return shares of the two secrets for each client that advertised, the own ones kept."""
        if self._adverts:
            raise PrivacyError(f"secure aggregation: {self.name} has dealt its shares in this round already")
        adverts = {advert.client: advert for advert in adverts}
        self._check_enough(adverts, "sent their keys")
        self._adverts = adverts
        points = [self._terms.points[client] for client in adverts]
        own, pair = (
            split(int.from_bytes(secret), draw(self._coefficients, self._terms.threshold - 1), points)
            for secret in (self._own, self._masking)
        )
        shares = {client: (own[point], pair[point]) for client, point in zip(adverts, points, strict=True)}
        self._held = {self.name: shares.pop(self.name)}
        return Deal(self.name, {client: self._seal(client, pair) for client, pair in shares.items()})

    def upload(self, sealed: Mapping[str, bytes]) -> Upload:
        """Return the masked vector; `sealed` are the shares for this client, by the client that dealt them."""
        self._check_enough({self.name, *sealed}, "dealt their shares")
        if len(self._held) > 1 or not self._adverts.keys() >= {self.name, *sealed}:
            raise PrivacyError(f"secure aggregation: {self.name} was passed shares twice, or of a client without keys")
        self._held |= {client: self._open(client, message) for client, message in sealed.items()}
        numbers = self._numbers.copy()
        add_mask(numbers, self._own, 1)
        for other in sealed:
            shared = _agree(self._masking, self._adverts[other].masking)
            add_mask(numbers, shared, _sign(self._terms, self.name, other))
        return Upload(self.name, numbers)

    def reveal(self, survivors: Iterable[str]) -> Reveal:
        """Return the shares that unmask the sum over `survivors`, once.

        Raises
        ------
        PrivacyError
            Fewer than the threshold, or not those with shares; or another list than before: both
            secrets of one client would unmask its vector.
        """
        told = frozenset(survivors)
        self._check_enough(told, "sent their vectors")
        if not self._held.keys() >= told or self.name not in told:
            raise PrivacyError(f"secure aggregation: {self.name} is asked about clients that it has no shares of")
        if self._told not in (None, told):
            raise PrivacyError(f"secure aggregation: {self.name} has revealed its shares for other survivors already")
        self._told = told
        own = {client: shares[0] for client, shares in self._held.items() if client in told}
        pair = {client: shares[1] for client, shares in self._held.items() if client not in told}
        return Reveal(self.name, own, pair)

    def _check_enough(self, clients: Collection[str], did: str) -> None:
        _check_enough(self._terms, clients, did)

    def _seal(self, receiver: str, shares: tuple[int, int]) -> bytes:
        content = b"".join(share.to_bytes(SHARE_BYTES) for share in shares)
        return self._cipher(receiver, self.name, receiver).encrypt(_NONCE, content, None)

    def _open(self, dealer: str, message: bytes) -> tuple[int, int]:
        try:
            content = self._cipher(dealer, dealer, self.name).decrypt(_NONCE, message, None)
        except InvalidTag:
            raise PrivacyError(f"secure aggregation: the shares of {dealer} for {self.name} were changed") from None
        return int.from_bytes(content[:SHARE_BYTES]), int.from_bytes(content[SHARE_BYTES:])

    def _cipher(self, other: str, dealer: str, receiver: str) -> ChaCha20Poly1305:
        shared = _agree(self._sealing, self._adverts[other].sealing)
        return ChaCha20Poly1305(seed(shared, "shares", self._terms.name, dealer, receiver))


class Server:
    """The server of one round: it is handed messages, adds masked integers up, and gives back the sum."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._keys: dict[str, bytes] = {}
        self._dealt: tuple[str, ...] = ()
        self._arrived: list[str] = []
        self._open = True
        self._total = np.zeros(terms.entries, dtype=np.uint32)

    def introduce(self, adverts: Iterable[Advert]) -> tuple[Advert, ...]:
        """Step 1: take public keys, and return all of them, for everybody."""
        roster = tuple(adverts)
        if any(advert.client not in self._terms.points for advert in roster):
            raise PrivacyError("secure aggregation: keys of a client that is not in the round's terms")
        _check_enough(self._terms, {advert.client for advert in roster}, "sent their keys")
        self._keys = {advert.client: advert.masking for advert in roster}
        return roster

    def relay(self, deals: Iterable[Deal]) -> dict[str, dict[str, bytes]]:
        """Step 2: take sealed shares, and return them by receiver (those who dealt) and dealer."""
        by_dealer = {deal.client: deal.sealed for deal in deals}
        _check_enough(self._terms, by_dealer, "dealt their shares")
        if not self._keys.keys() >= by_dealer.keys():
            raise PrivacyError("secure aggregation: shares of a client that has sent no keys")
        self._dealt = tuple(by_dealer)
        return {
            receiver: {dealer: sealed[receiver] for dealer, sealed in by_dealer.items() if dealer != receiver}
            for receiver in by_dealer
        }

    def receive(self, upload: Upload) -> None:
        """Step 3: add a masked vector to the sum; only the sum is kept."""
        if not self._open or upload.client not in self._dealt or upload.client in self._arrived:
            raise PrivacyError(f"secure aggregation: {upload.client} is late, a stranger, or has sent before")
        if upload.numbers.shape != self._total.shape or upload.numbers.dtype != np.uint32:
            raise PrivacyError(f"secure aggregation: {upload.client} sent {upload.numbers.shape}, not the agreed shape")
        self._arrived.append(upload.client)
        self._total += upload.numbers

    def close(self) -> tuple[str, ...]:
        """Take no more vectors, and return whose are in the sum, for everybody."""
        _check_enough(self._terms, self._arrived, "sent their vectors")
        self._open = False
        return tuple(self._arrived)

    def unmask(self, reveals: Iterable[Reveal]) -> Sum:
        """Step 4: take off the masks that did not cancel, and return the sum.

        Raises
        ------
        PrivacyError
            Fewer clients than the threshold answered, or shares that do not fit a public key.
        """
        if self._open:
            raise PrivacyError("secure aggregation: close the round before the sum is unmasked")
        answers = {reveal.client: reveal for reveal in reveals if reveal.client in self._arrived}
        _check_enough(self._terms, answers, "revealed their shares")
        chosen = [answers[client] for client in islice(answers, self._terms.threshold)]
        total = self._total.copy()
        for client in self._arrived:
            add_mask(total, self._secret({reveal.client: reveal.own[client] for reveal in chosen}), -1)
        for client in set(self._dealt).difference(self._arrived):
            secret = self._secret({reveal.client: reveal.pair[client] for reveal in chosen})
            if _public(secret) != self._keys[client]:
                raise PrivacyError(f"secure aggregation: the revealed shares of {client} do not fit its public key")
            for other in self._arrived:
                add_mask(total, _agree(secret, self._keys[other]), -_sign(self._terms, other, client))
        return self._terms.codec.decode(total, len(self._arrived))

    def _secret(self, shares: Mapping[str, int]) -> bytes:
        return (combine({self._terms.points[client]: share for client, share in shares.items()}) % 2**256).to_bytes(32)


def secure_sum(
    terms: Terms,
    clients: Sequence[Client],
    silent: Collection[str] = (),
    lost: Collection[str] = (),
    gone: Collection[str] = (),
) -> Sum:
    """Run one round in this process.

    Parameters
    ----------
    terms, clients
        Each client of the terms once.
    silent, lost, gone
        Names of clients that drop out: before their shares are dealt; after that and before the
        upload; after the upload (these are in the sum).

    Raises
    ------
    PrivacyError
        Fewer clients than the threshold are left at one of the steps; no sum is computed.
    """
    server = Server(terms)
    adverts = server.introduce(client.advertise() for client in clients)
    inboxes = server.relay(client.deal(adverts) for client in clients if client.name not in silent)
    sending = [client for client in clients if client.name in inboxes and client.name not in lost]
    for client in sending:
        server.receive(client.upload(inboxes[client.name]))
    survivors = server.close()
    return server.unmask(client.reveal(survivors) for client in sending if client.name not in gone)


def _check_enough(terms: Terms, clients: Collection[str], did: str) -> None:
    if len(clients) < terms.threshold:
        raise TooFewClientsError(
            f"secure aggregation, round {terms.round}: {len(clients)} of {len(terms.clients)} clients {did}; "
            f"expected {terms.threshold} or more, or the sum cannot be opened"
        )


def _public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def _agree(secret: bytes, public: bytes) -> bytes:
    """Return what two clients have in common: a secret of one and the public key of the other (X25519)."""
    return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))


def _sign(terms: Terms, client: str, other: str) -> int:
    """Return whether the first of two clients adds or subtracts their mask."""
    return 1 if terms.points[client] < terms.points[other] else -1
