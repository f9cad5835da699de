"""The 48 bytes in front of a sealed message, which travel in the clear and cannot be changed."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from fedsp_mpi.config.federation import CompressionConfig

from .compression import between_blocks

TAG_BYTES = 16
_MAGIC = b"FSPS"
_LAYOUT_VERSION = 1
# Magic, layout version, content, sender, round, number of the message, bytes of its content, start
# of the run. Little-endian without padding.
_LAYOUT = struct.Struct("<4sHHiiQQ16s")
ENVELOPE_BYTES = _LAYOUT.size
SEAL_BYTES = ENVELOPE_BYTES + TAG_BYTES  # that sealing adds to a message
assert ENVELOPE_BYTES == 48


class Content(IntEnum):
    """What a sealed message holds."""

    JSON = 1  # a header and its mapping, of a rank
    RESULT = 2  # a header, and the rest of a failure's text, of a client
    VALUES = 3  # a chunk of an update, or the values of a request, of a client
    CALL = 4  # the header of a request, of a client
    CLOSE = 5  # the word that a rank makes no more requests in a round
    PROOF = 6  # nothing: whoever sealed it has the key
    ANSWER = 7  # a mapping, of rank 0 for another rank


class Envelope(NamedTuple):
    """What the receiver of a sealed message knows of it beforehand: its associated data.

    Attributes:
        content: what the message holds.
        sender: the client's id; the rank, of contents that a rank sends.
        round: of a result; -1 elsewhere.
        number: of the sender's messages on the same key, from 0.
        size: bytes of the content.
        start: 16 random bytes of the server, drawn at each start of a run.
    """

    content: Content
    sender: int
    round: int
    number: int
    size: int
    start: bytes

    def pack(self) -> bytes:
        """Return the 48 bytes."""
        return _LAYOUT.pack(_MAGIC, _LAYOUT_VERSION, *self)

    @classmethod
    def unpack(cls, raw: bytes) -> Envelope:
        """Read an envelope, which nobody has vouched for yet.

        Raises:
            ValueError: the bytes are none.
        """
        if len(raw) < ENVELOPE_BYTES:
            raise ValueError(
                f"found {len(raw)} bytes, expected a sealed message of at least {SEAL_BYTES}"
            )
        magic, version, content, *fields = _LAYOUT.unpack(raw[:ENVELOPE_BYTES])
        if (magic, version) != (_MAGIC, _LAYOUT_VERSION) or content not in list(Content):
            raise ValueError("found a message that is not sealed, expected a sealed one")
        return cls(Content(content), *fields)

    def require(self, expected: Envelope) -> None:
        """Raise ValueError, saying what differs, unless this is the expected envelope."""
        if self.start != expected.start:
            raise ValueError("found a message of another start of the run, expected one of this")
        if self.number != expected.number:
            raise ValueError(
                f"found message {self.number}, expected {expected.number}: one was repeated, left "
                "out or moved"
            )
        for name in ("content", "sender", "round", "size"):
            actual = getattr(self, name)
            if actual != getattr(expected, name):
                raise ValueError(
                    f"found {name} {actual!s} on the envelope, expected {getattr(expected, name)!s}"
                )


def num_chunks(num_values: int, chunk: int) -> int:
    """Return the number of chunks of at most `chunk` values in which a vector travels."""
    return -(-num_values // chunk)


def update_seal_bytes(num_values: int, chunk_bytes: int, compression: CompressionConfig) -> int:
    """Return the bytes that sealing adds to a client's update: to its header and to each chunk.

    Args:
        num_values: of the update.
        chunk_bytes: of a chunk of fp32 values.
        compression: of rounds.
    """
    chunk = between_blocks(max(1, chunk_bytes // 4), compression)
    return SEAL_BYTES * (1 + num_chunks(num_values, chunk))
