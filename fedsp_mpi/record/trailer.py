"""The digest at the end of a record's files: it tells damage before HDF5, which can hang on it,
sees a byte.

HDF5 ends where its superblock says, so a trailer behind it disturbs no reader. It comes and goes
with the file's bytes: there is no moment at which a file has another's digest, and a copy of run.h5
alone can be checked like the original.

    <HDF5 file> <JSON> <64-bit digest of the JSON> <its length, 8 bytes, little-endian> <MAGIC>

A folded run.h5 can be large. The bytes of each round's prompts have a digest of their own there,
which is compared when those prompts are asked for; reading the tables does not cost reading the
prompts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import xxhash

from fedsp_mpi.files import untrusted

MAGIC = b"\x89FedSP\r\n"
_ENDING = 8 + 8 + len(MAGIC)  # digest, length, magic
_ROOM = 1 << 20  # bytes that are in memory at once
Extent = tuple[int, int]  # offset and size, in bytes


@dataclass(frozen=True)
class Trailer:
    """What a file's bytes were when it was written.

    Attributes:
        size: of the HDF5 file in front of the trailer, in bytes.
        digest: of its bytes outside of all extents.
        extents: where the prompts of a round lie, by the round's name; none where they are files of
            their own.
        digests: of the bytes in each round's extents.
    """

    size: int
    digest: str
    extents: Mapping[str, Sequence[Extent]] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    def require(self, file: BinaryIO) -> None:
        """Raise ValueError if the bytes outside of the extents are not what was written."""
        rest = _between(
            [extent for extents in self.extents.values() for extent in extents], self.size
        )
        if _digest(file, rest) != self.digest:
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
    """The trailer of an HDF5 file that is in memory and has no extents."""
    return _packed(len(image), xxhash.xxh3_128_hexdigest(image), {}, {})


def of_file(file: BinaryIO, extents: Mapping[str, Sequence[Extent]]) -> bytes:
    """The trailer of an HDF5 file.

    Args:
        file: open for reading, without a trailer.
        extents: where the prompts of each round lie in it.
    """
    size = os.fstat(file.fileno()).st_size
    rest = _between([extent for every in extents.values() for extent in every], size)
    digests = {name: _digest(file, every) for name, every in extents.items()}
    return _packed(size, _digest(file, rest), extents, digests)


def read(file: BinaryIO) -> Trailer | None:
    """The trailer of an open file; None for a file of a version that wrote none.

    Raises ValueError if the trailer itself is damaged.
    """
    size = os.fstat(file.fileno()).st_size
    if size < _ENDING:
        return None  # nor is it an HDF5 file
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
        return _unpacked(untrusted.parse_json(text), size - _ENDING - length)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a digest that no run writes ({error!r})") from None


def _end_of_hdf5(file: BinaryIO) -> int:
    """Where an HDF5 file ends, as its superblock says; a large number if that is none that h5py
    writes.
    """
    file.seek(0)
    head = file.read(48)
    places = {0: 40, 2: 28, 3: 28}  # by the version of the superblock; its addresses have 8 bytes
    place = places.get(head[8]) if head[:8] == b"\x89HDF\r\n\x1a\n" else None
    return 1 << 64 if place is None else int.from_bytes(head[place : place + 8], "little")


def _packed(
    size: int, digest: str, extents: Mapping[str, Sequence[Extent]], digests: Mapping[str, str]
) -> bytes:
    content = {"size": size, "digest": digest, "extents": extents, "digests": digests}
    text = json.dumps(content, separators=(",", ":")).encode()
    return text + xxhash.xxh3_64_digest(text) + len(text).to_bytes(8, "little") + MAGIC


def _unpacked(content: Any, size: int) -> Trailer:
    if content["size"] != size:
        raise ValueError(f"{size} bytes before its digest where {content['size']} were written")
    extents = {
        name: [(start, length) for start, length in every]
        for name, every in content["extents"].items()
    }
    return Trailer(size, str(content["digest"]), extents, dict(content["digests"]))


def _between(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
    """The rest of a file. Raises ValueError if extents overlap, or lie beyond its end."""
    place = 0
    for start, length in sorted(extents):
        if start < place or length < 0 or start + length > size:
            raise ValueError("a digest of bytes that are not in the file")
        yield place, start - place
        place = start + length
    yield place, size - place


def _digest(file: BinaryIO, extents: Iterable[Extent]) -> str:
    digest = xxhash.xxh3_128()
    for start, length in extents:
        file.seek(start)
        while length:
            piece = file.read(min(length, _ROOM))
            if not piece:
                raise ValueError("fewer bytes than were written")
            digest.update(piece)
            length -= len(piece)
    return digest.hexdigest()
