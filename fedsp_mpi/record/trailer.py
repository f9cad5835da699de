"""The digest at the end of a record's files: it shows damage before HDF5, which can hang on it,
sees a byte.

HDF5 ends where its superblock says, so a trailer behind it disturbs no reader. It comes and goes
with the file's bytes: there is no moment at which a file has another's digest, and a copy of run.h5
alone can be checked like the original.

    <HDF5 file> <JSON> <64-bit digest of the JSON> <its length, 8 bytes, little-endian> <MAGIC>

A run.h5 that holds the prompts of all rounds can be large. The bytes of each round's prompts
therefore have a digest of their own, which is compared when those prompts are asked for; reading
the tables does not cost reading the prompts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import xxhash

from fedsp_mpi.files import untrusted

MAGIC = b"\x89FedSP\r\n"
_ENDING = 8 + 8 + len(MAGIC)  # bytes: digest, length, magic
_CHUNK = 1 << 20  # bytes that are in memory at once
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
# Version of the superblock -> where it says at which byte the file ends (8 bytes).
_END_ADDRESS = {0: 40, 2: 28, 3: 28}
Extent = tuple[int, int]  # offset and size, in bytes


@dataclass(frozen=True)
class Trailer:
    """What a file's bytes were when it was written.

    Attributes:
        size: of the HDF5 file in front of the trailer, in bytes.
        digest: of its bytes outside of all extents.
        extents: where the prompts of a round lie, by the round's name; empty where they are files
            of their own.
        digests: of the bytes in each round's extents.
    """

    size: int
    digest: str
    extents: Mapping[str, Sequence[Extent]] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    def require(self, file: BinaryIO) -> None:
        """Raise ValueError if the bytes outside of the extents are not what was written."""
        outside = _outside(_joined(self.extents), self.size)
        if _digest(file, outside) != self.digest:
            raise ValueError("bytes that are not what was written (their digest differs)")

    def require_round(self, file: BinaryIO, name: str) -> None:
        """Raise ValueError if the bytes of a round's prompts are not what was written."""
        if name not in self.digests:
            raise ValueError(f"no digest of round {name}")
        if _digest(file, self.extents[name]) != self.digests[name]:
            raise ValueError(
                f"prompts of round {name} that are not what was written (their digest differs)"
            )


def of_image(image: bytes) -> bytes:
    """Return the trailer of an HDF5 file that is in memory and has no extents."""
    trailer = Trailer(len(image), digest(image))
    return _to_bytes(trailer)


def digest(image: bytes) -> str:
    """Return the 128-bit digest of an HDF5 file that is in memory and has no extents."""
    return xxhash.xxh3_128_hexdigest(image)


def of_file(file: BinaryIO, extents: Mapping[str, Sequence[Extent]]) -> bytes:
    """Return the trailer of an HDF5 file.

    Args:
        file: open for reading, without a trailer.
        extents: where the prompts of each round lie in it.
    """
    size = os.fstat(file.fileno()).st_size
    digest = _digest(file, _outside(_joined(extents), size))
    digests = {name: _digest(file, of_round) for name, of_round in extents.items()}
    return _to_bytes(Trailer(size, digest, extents, digests))


def read(file: BinaryIO) -> Trailer | None:
    """Return the trailer of an open file; None for a file of a version that wrote none.

    Raises:
        ValueError: the trailer itself is damaged.
    """
    size = os.fstat(file.fileno()).st_size
    if size < _ENDING:
        return None  # and no HDF5 file either
    file.seek(size - _ENDING)
    ending = file.read(_ENDING)
    if ending[16:] != MAGIC:
        if size > _end_of_hdf5(file):
            raise ValueError("an end that is cut off, or was changed")
        return None
    length = int.from_bytes(ending[8:16], "little")
    if length > size - _ENDING:
        raise ValueError("a digest that is damaged")
    file.seek(size - _ENDING - length)
    text = file.read(length)
    if xxhash.xxh3_64_digest(text) != ending[:8]:
        raise ValueError("a digest that is damaged")
    try:
        return _from_json(untrusted.parse_json(text), size - _ENDING - length)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a digest that no run writes ({error!r})") from None


def _end_of_hdf5(file: BinaryIO) -> int:
    """Return where an HDF5 file ends, as its superblock says.

    A large number where the superblock is none that h5py writes.
    """
    file.seek(0)
    head = file.read(48)
    place = _END_ADDRESS.get(head[8]) if head[:8] == _HDF5_MAGIC else None
    if place is None:
        return 1 << 64
    return int.from_bytes(head[place : place + 8], "little")


def _to_bytes(trailer: Trailer) -> bytes:
    content = {
        "size": trailer.size,
        "digest": trailer.digest,
        "extents": trailer.extents,
        "digests": trailer.digests,
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    return text + xxhash.xxh3_64_digest(text) + len(text).to_bytes(8, "little") + MAGIC


def _from_json(content: untrusted.JsonObject, size: int) -> Trailer:
    """Build a trailer from its JSON; `size` is that of the HDF5 file in front of it."""
    if content["size"] != size:
        raise ValueError(f"{size} bytes before its digest where {content['size']} were written")
    extents = {
        name: [(start, length) for start, length in of_round]
        for name, of_round in content["extents"].items()
    }
    return Trailer(size, str(content["digest"]), extents, dict(content["digests"]))


def _joined(extents: Mapping[str, Sequence[Extent]]) -> list[Extent]:
    return [extent for of_round in extents.values() for extent in of_round]


def _outside(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
    """Yield the extents of everything else in a file of `size` bytes.

    Raises ValueError if extents overlap, or lie beyond the file's end.
    """
    end = 0
    for start, length in sorted(extents):
        if start < end or length < 0 or start + length > size:
            raise ValueError("a digest of bytes that are not in the file")
        yield end, start - end
        end = start + length
    yield end, size - end


def _digest(file: BinaryIO, extents: Iterable[Extent]) -> str:
    """Return the 128-bit digest of some bytes of a file."""
    digest = xxhash.xxh3_128()
    for start, length in extents:
        file.seek(start)
        unread = length
        while unread:
            chunk = file.read(min(unread, _CHUNK))
            if not chunk:
                raise ValueError("fewer bytes than were written")
            digest.update(chunk)
            unread -= len(chunk)
    return digest.hexdigest()
