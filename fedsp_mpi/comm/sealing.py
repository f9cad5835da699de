"""Authenticated encryption of what goes up, end to end: the only importer of `cryptography`.

Keys are agreed by X25519 (RFC 7748), derived by HKDF with SHA-256 (RFC 5869), and used with
ChaCha20-Poly1305 (RFC 8439). A key seals in one direction, from one sender to one receiver, and for
one start of a run. The nonce is the number of the message, which both ends count, so that none
serves twice; a message that is repeated, left out or moved does not have the number that the
receiver expects. The envelope is associated data: it is readable, and cannot be changed.

What Python allows is done to forget keys: private keys never leave the library; derived keys lie in
a bytearray, which is overwritten as soon as the cipher has its copy; the library overwrites its
memory when an object is freed, which `KeyPair.forget` and `close` bring about. The shared secret
between agreement and derivation is a `bytes` object, which nobody can overwrite.
"""

from __future__ import annotations

import hashlib

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .envelope import ENVELOPE_BYTES, SEAL_BYTES, Content, Envelope

CIPHER = "X25519, HKDF-SHA256, ChaCha20-Poly1305"
_KEY_BYTES = 32
_PROOF_BYTES = 16
_NONCE_BYTES = 12
_CONTEXT = b"fedsp_mpi sealed message 1 "


def fingerprint(public: bytes) -> str:
    """Return the first 16 bytes of a public key's SHA-256, as 32 hexadecimal digits."""
    return hashlib.sha256(public).hexdigest()[:32]


class KeyPair:
    """An X25519 key pair of one client or rank, for one start of a run.

    Attributes:
        public: the public key, 32 bytes.
    """

    def __init__(self) -> None:
        self._private: X25519PrivateKey | None = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    def agree(self, peer: bytes, purpose: str, start: bytes, *, is_sender: bool) -> Secrets:
        """Agree with the owner of a public key on what both ends of a channel share.

        Args:
            peer: the other end's public key, 32 bytes.
            purpose: keeps the channels of a pair of keys apart.
            start: 16 random bytes of this start of the run.
            is_sender: whether this end seals.

        Raises:
            ValueError: it is no public key.
        """
        assert self._private is not None, "the key pair is forgotten"
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError as error:
            raise ValueError(f"found no key that can be agreed with ({error})") from None
        ends = self.public + peer if is_sender else peer + self.public
        derived = bytearray(_KEY_BYTES + _PROOF_BYTES)
        info = _CONTEXT + purpose.encode() + ends
        HKDF(SHA256(), len(derived), salt=start, info=info).derive_into(shared, derived)
        return Secrets(derived)

    def forget(self) -> None:
        """Drop the private key, which the library overwrites."""
        self._private = None


class Secrets:
    """What both ends of a channel share.

    Args:
        derived: key and proof; it is overwritten.

    Attributes:
        cipher: seals and opens.
        proof: 16 bytes by which the receiver shows that it has agreed on the same.
    """

    def __init__(self, derived: bytearray) -> None:
        self.proof = bytes(derived[_KEY_BYTES:])
        key = derived[:_KEY_BYTES]
        self.cipher = ChaCha20Poly1305(key)
        for secret in (key, derived):
            secret[:] = bytes(len(secret))


class _Channel:
    """One end of a channel: a key, and the number of the next message.

    Args:
        secrets: of both ends.
        sender: the client's id, or the rank.
        start: 16 random bytes of this start of the run.
    """

    def __init__(self, secrets: Secrets, sender: int, start: bytes) -> None:
        self._cipher: ChaCha20Poly1305 | None = secrets.cipher
        self._sender = sender
        self._start = start
        self._number = 0

    def close(self) -> None:
        """Drop the key, which the library overwrites."""
        self._cipher = None

    def _next(self, content: Content, round: int, size: int) -> tuple[ChaCha20Poly1305, Envelope]:
        """Return the cipher, and the envelope of the next message, which is counted."""
        if self._cipher is None:
            raise ValueError("the channel is closed")
        envelope = Envelope(content, self._sender, round, self._number, size, self._start)
        self._number += 1
        return self._cipher, envelope


class Sender(_Channel):
    """The end of a channel that seals; see `_Channel`."""

    def seal_into(
        self, target: np.ndarray, values: np.ndarray, content: Content, *, round: int = -1
    ) -> None:
        """Seal values into the memory that is sent, without another copy of them.

        Args:
            target: uint8 [num_bytes + SEAL_BYTES].
            values: [num_values] of any type, contiguous.
            content: what they are.
            round: of a result.
        """
        plain = values.view(np.uint8)
        cipher, envelope = self._next(content, round, plain.size)
        raw = envelope.pack()
        target[:ENVELOPE_BYTES] = np.frombuffer(raw, dtype=np.uint8)
        cipher.encrypt_into(_nonce(envelope), plain.data, raw, target[ENVELOPE_BYTES:].data)

    def seal(self, content: bytes, kind: Content, *, round: int = -1) -> bytes:
        """Return a sealed message.

        Args:
            content: the bytes.
            kind: what they are.
            round: of a result.
        """
        target = np.empty(len(content) + SEAL_BYTES, dtype=np.uint8)
        self.seal_into(target, np.frombuffer(content, dtype=np.uint8), kind, round=round)
        return target.tobytes()


class Receiver(_Channel):
    """The end of a channel that opens what was sealed; see `_Channel`.

    Every message counts that arrives in its place, whether it can be opened or not.
    """

    def open_into(
        self, target: np.ndarray, sealed: np.ndarray, content: Content, *, round: int = -1
    ) -> None:
        """Open a message into the memory that it is for.

        Args:
            target: [num_values] of any type, contiguous; 0 if the message is refused.
            sealed: uint8 [num_bytes + SEAL_BYTES].
            content: what is expected.
            round: of a result.

        Raises:
            ValueError: it is not the next message of this sender, or was changed.
        """
        plain = target.view(np.uint8)
        cipher, expected = self._next(content, round, plain.size)
        try:
            raw = sealed[:ENVELOPE_BYTES].tobytes()
            Envelope.unpack(raw).require(expected)
            if sealed.size != plain.size + SEAL_BYTES:
                raise ValueError(f"found {sealed.size} bytes, expected {plain.size + SEAL_BYTES}")
            cipher.decrypt_into(_nonce(expected), sealed[ENVELOPE_BYTES:].data, raw, plain.data)
        except InvalidTag:
            plain[:] = 0  # the library has written what nobody vouches for
            raise ValueError(
                "found bytes that its key did not seal: they were changed, or the key is another"
            ) from None
        except ValueError:
            plain[:] = 0
            raise

    def open(self, sealed: bytes, kind: Content, *, round: int = -1) -> bytes:
        """Return the content of a message, of any length.

        Args:
            sealed: the message.
            kind: what is expected.
            round: of a result.

        Raises:
            ValueError: it is not the next message of this sender, or was changed.
        """
        target = np.empty(max(0, len(sealed) - SEAL_BYTES), dtype=np.uint8)
        self.open_into(target, np.frombuffer(sealed, dtype=np.uint8), kind, round=round)
        return target.tobytes()

    def skip(self) -> None:
        """Count a message that did not arrive as it should."""
        self._number += 1


def _nonce(envelope: Envelope) -> bytes:
    """Return the 12 bytes of a message's number, which no other message on the key has."""
    return envelope.number.to_bytes(_NONCE_BYTES, "little")
