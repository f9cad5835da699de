"""Reads HDF5 files that others may have made or damaged: the package's only way to open one.

A file is opened once; its digest is compared (trailer.py) before HDF5 parses a byte. Then only what
a record can hold is read: nothing behind links, but for those to rounds/NNNN.h5 beside the file; no
external storage and no virtual data sets, which name other files; no types but numbers and text; no
more bytes than are stored. Nothing is allocated for a size that a file merely claims.

Everything here raises ValueError with the words that follow "found" in a message; errors of HDF5
itself pass through.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
from h5py import h5d, h5t, h5z

from fedsp_mpi.files import untrusted
from fedsp_mpi.record import trailer
from fedsp_mpi.record.trailer import Extent, Trailer

_MAX_PROMPT_BYTES = 4 << 30  # of one round, in memory
_MAX_CHUNK_BYTES = 64 << 20  # of one chunk in memory; h5py chooses 1 MiB at most
_MAX_NAMES = 100_000  # in all groups below one
_MAX_DEPTH = 16  # groups in groups: a tensor's name has a part for each
_FILTERS = {h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE, h5z.FILTER_FLETCHER32}
_LAYOUTS = (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED)
_NUMBERS = (h5t.INTEGER, h5t.FLOAT, h5t.ENUM)  # the last one is h5py's bool
_ROUND = re.compile(r"[0-9]{4,9}")


@dataclass(frozen=True)
class OpenFile:
    """An open HDF5 file whose digest was right, or that has none.

    Attributes:
        path: of the file.
        raw: its bytes.
        h5: its content.
        trailer: what the bytes were checked against; None for files of earlier versions.
    """

    path: Path
    raw: BinaryIO
    h5: h5py.File
    trailer: Trailer | None


@contextmanager
def open_file(path: Path) -> Iterator[OpenFile]:
    """Open an HDF5 file after comparing its digest.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file, or its bytes are not what was written.
    """
    with untrusted.open_regular_file(path) as raw:
        end = trailer.read(raw)
        if end is not None:
            end.require(raw)
        raw.seek(0)
        with h5py.File(raw, "r") as h5:
            if h5.userblock_size:
                raise ValueError("a file with a user block, which no run writes")
            yield OpenFile(path, raw, h5, end)


# -- names and texts -------------------------------------------------------------------------------


def attribute(h5: h5py.File, name: str) -> str | int | None:
    """Return an attribute of the root, a text or a whole number; None if it is missing.

    Raises:
        ValueError: it is of another type.
    """
    if name not in h5.attrs:
        return None
    identifier = h5.attrs.get_id(name)
    if identifier.shape == () and identifier.dtype.kind in "iu":
        return int(h5.attrs[name])
    if identifier.shape != () or h5py.check_string_dtype(identifier.dtype) is None:
        raise ValueError(f"attribute {name} that is neither a text nor a whole number")
    return str(h5.attrs[name])


def names(group: h5py.Group) -> list[str]:
    """Return the names in a group. Raises ValueError if they are too many."""
    if len(group) > _MAX_NAMES:
        raise ValueError(f"{len(group)} names in {group.name}, which no run writes")
    return list(group)


def child(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """Return what a group holds under a name.

    Raises:
        KeyError: it holds nothing there.
        ValueError: it is a link to somewhere else.
    """
    if not group.id.links.exists(name.encode("utf-8", "surrogateescape")):
        raise KeyError(f"no {name} in {group.name}")
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"a link to somewhere else at {name}")
    item = group[name]
    if not isinstance(item, (h5py.Group, h5py.Dataset)):
        raise ValueError(f"neither data nor a group at {name}")
    return item


def subgroup(group: h5py.Group, name: str) -> h5py.Group:
    """Return a group in a group. Raises KeyError or ValueError."""
    item = child(group, name)
    if not isinstance(item, h5py.Group):
        raise ValueError(f"data at {name}, which is a group in the record of a run")
    return item


def texts(file: OpenFile, path: str, only: Iterable[str] | None = None) -> dict[str, str]:
    """Return the texts that are stored as data sets in a group.

    Args:
        file: to read from.
        path: of the group.
        only: their names; None: all that the group holds.

    Raises:
        KeyError: one is missing.
        ValueError: one is no text; or together they are longer than the file, because several are
            stored as one.
    """
    group: h5py.Group = file.h5 if path == "/" else subgroup(file.h5, path)
    content: dict[str, str] = {}
    num_characters = 0
    num_bytes = file.raw.seek(0, 2)
    for name in names(group) if only is None else only:
        data = _dataset(group, name)
        if data.shape != () or h5py.check_string_dtype(data.dtype) is None:
            raise ValueError(
                f"data of {data.dtype} {data.shape} at {name}, which is a text in the "
                "record of a run"
            )
        _require_stored(data)
        content[name] = data.asstr()[()]
        num_characters += len(content[name])
        if num_characters > num_bytes:
            raise ValueError(f"more text in {path} than the file has bytes")
    return content


# -- tables ----------------------------------------------------------------------------------------


def table(file: OpenFile, name: str) -> np.ndarray:
    """Return a table of numbers and texts, a structured array [rows].

    Raises:
        KeyError: it is missing.
        ValueError: it is no such table, or claims more than the file has.
    """
    data = _dataset(file.h5, name)
    if data.ndim != 1 or not data.dtype.names:
        raise ValueError(
            f"data of {data.dtype} {data.shape} at {name}, which is a table in the record of a run"
        )
    offsets = _text_offsets(data)
    _require_stored(data)
    _require_texts(file, data, offsets)
    return data[()]


def _text_offsets(data: h5py.Dataset) -> list[int]:
    """Return the bytes at which texts begin in each row of a table, as it lies in the file.

    Raises ValueError if a column holds neither numbers nor texts.
    """
    row_type = data.id.get_type()
    offsets: list[int] = []
    for column in range(row_type.get_nmembers()):
        member = row_type.get_member_type(column)
        if isinstance(member, h5t.TypeStringID) and member.is_variable_str():
            # HDF5 gives the offset in memory, where a text is an address of 8 bytes; in the file a
            # text takes 16.
            offsets.append(row_type.get_member_offset(column) + 8 * len(offsets))
        elif member.get_class() not in _NUMBERS:
            raise ValueError(f"a column in {data.name} that holds neither numbers nor texts")
    return offsets


def _require_texts(file: OpenFile, data: h5py.Dataset, offsets: list[int]) -> None:
    """Raise ValueError if a table claims more text than there is.

    Many cells may point to one text; a run writes each text by itself, so that all together they
    fit into the file.
    """
    if not offsets:
        return
    row_bytes = data.id.get_type().get_size() + 8 * len(offsets)
    num_claimed = 0
    for start, num_rows in _stored_rows(data, row_bytes):
        file.raw.seek(start)
        rows = np.frombuffer(file.raw.read(num_rows * row_bytes), np.uint8).reshape(-1, row_bytes)
        for offset in offsets:
            # A text is its length, in 4 bytes, and where it lies, in 12.
            lengths = np.ascontiguousarray(rows[:, offset : offset + 4]).view("<u4")
            num_claimed += int(lengths.sum(dtype=np.uint64))
    size = file.raw.seek(0, 2)
    if num_claimed > size:
        raise ValueError(f"{num_claimed} bytes of text claimed at {data.name} in a file of {size}")


def _stored_rows(data: h5py.Dataset, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield, for each chunk of a table, where its rows begin in the file and how many lie there.

    Raises ValueError if a row has not `row_bytes` bytes there.
    """
    rows_per_chunk = data.chunks[0] if data.chunks else len(data)
    for chunk, (start, size) in enumerate(_data_extents(data)):
        if size != rows_per_chunk * row_bytes:
            raise ValueError(f"rows of another length than {row_bytes} bytes at {data.name}")
        first = data.id.get_chunk_info(chunk).chunk_offset[0] if data.chunks else 0
        yield start, min(rows_per_chunk, len(data) - first)


# -- prompts ---------------------------------------------------------------------------------------


def linked_round(file: OpenFile, name: str) -> Path | None:
    """Return the file that holds a round's prompts; None where they lie in the opened file itself.

    Raises:
        KeyError: there are none.
        ValueError: the link leads to any file but the round's own beside the opened one.
    """
    group = subgroup(file.h5, "prompts")
    if not group.id.links.exists(name.encode()):
        raise KeyError(f"no prompts of round {name}")
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.ExternalLink):
        return None
    if (link.filename, link.path) != (f"rounds/{name}.h5", "/prompt"):
        raise ValueError(
            f"a link to {untrusted.printable(link.filename)!r}, which is no file of round {name}"
        )
    return file.path.parent / link.filename


def round_numbers(file: OpenFile) -> list[int]:
    """Return the rounds whose prompts a record names, in ascending order.

    Raises:
        KeyError: the record has no prompts.
        ValueError: a name is no number.
    """
    numbers = []
    for name in names(subgroup(file.h5, "prompts")):
        if not _ROUND.fullmatch(name):
            raise ValueError(f"prompts of round {untrusted.printable(name)!r}, which is no number")
        numbers.append(int(name))
    return sorted(numbers)


def tensors(group: h5py.Group) -> dict[str, np.ndarray]:
    """Return the tensors [*shape] below a group by name, in the order they were written.

    Raises:
        KeyError: one has no place in the order.
        ValueError: one is no tensor, or not as a run writes it.
    """
    datasets = dict(_datasets(group))
    for name, data in datasets.items():
        if data.dtype.kind not in "fiu":
            raise ValueError(
                f"data of {data.dtype} at {name}, which is a tensor in the record of a run"
            )
    size = sum(_claimed_bytes(data) for data in datasets.values())
    if size > _MAX_PROMPT_BYTES:
        raise ValueError(f"prompts of {size} bytes, more than any run writes")
    for data in datasets.values():
        _require_unpacked(data)
    order = sorted((int(data.attrs["position"]), name) for name, data in datasets.items())
    return {name: np.asarray(datasets[name][()]) for _, name in order}


def extents(group: h5py.Group) -> list[Extent]:
    """Return where the tensors below a group lie in the file, adjacent extents joined."""
    pieces = [extent for _, data in _datasets(group) for extent in _data_extents(data)]
    joined: list[Extent] = []
    for start, size in sorted(pieces):
        if joined and sum(joined[-1]) == start:
            joined[-1] = joined[-1][0], joined[-1][1] + size
        else:
            joined.append((start, size))
    return joined


# -- data sets -------------------------------------------------------------------------------------


def _data_extents(data: h5py.Dataset) -> list[Extent]:
    """Return where a data set lies in the file, an extent for each chunk."""
    if data.chunks:
        chunks = [data.id.get_chunk_info(index) for index in range(data.id.get_num_chunks())]
        return [
            (chunk.byte_offset, chunk.size) for chunk in chunks if chunk.byte_offset is not None
        ]
    start = data.id.get_offset()
    return [] if start is None else [(start, data.id.get_storage_size())]


def _datasets(root: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield the data sets below a group with their names from there.

    Raises ValueError if they are too many, or nested too deeply.
    """
    groups = [(root, "")]
    num_names = 0
    while groups:
        group, prefix = groups.pop()
        for name in names(group):
            item = child(group, name)
            path = f"{prefix}{name}"
            num_names += 1
            if num_names > _MAX_NAMES or path.count("/") > _MAX_DEPTH:
                raise ValueError("groups in groups without end")
            if isinstance(item, h5py.Group):
                groups.append((item, f"{path}/"))
            else:
                yield path, _require_in_file(item, path)


def _dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    item = child(group, name)
    if not isinstance(item, h5py.Dataset):
        raise ValueError(f"a group at {name}, which is data in the record of a run")
    return _require_in_file(item, name)


def _require_in_file(data: h5py.Dataset, name: str) -> h5py.Dataset:
    """Return a data set; raise ValueError unless its values lie in this file."""
    if data.external:
        raise ValueError(
            f"data at {name} that lie in another file "
            f"({untrusted.printable(str(data.external[0][0]))!r})"
        )
    if data.id.get_create_plist().get_layout() not in _LAYOUTS:
        raise ValueError(f"virtual data at {name}, which may lie in other files")
    if data.shape is None:
        raise ValueError(f"nothing at {name}")
    return data


def _claimed_bytes(data: h5py.Dataset) -> int:
    """Return how many bytes a data set claims to take in memory."""
    return math.prod(data.shape) * data.dtype.itemsize


def _require_stored(data: h5py.Dataset) -> None:
    """Raise ValueError unless all bytes that a data set claims are in the file, one by one."""
    if data.id.get_create_plist().get_nfilters():
        raise ValueError(f"compressed data at {data.name}, which no run writes")
    size = data.size * data.id.get_type().get_size()
    stored = data.id.get_storage_size()
    if size > stored:
        raise ValueError(f"{size} bytes claimed at {data.name} where {stored} are stored")


def _require_unpacked(data: h5py.Dataset) -> None:
    """Raise ValueError unless a tensor's chunks are all there and unpack to a chunk each."""
    properties = data.id.get_create_plist()
    filters = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
    if not filters:
        _require_stored(data)
        return
    if len(set(filters)) < len(filters) or not set(filters) <= _FILTERS:
        raise ValueError(f"data at {data.name} that are packed as no run does it")
    chunk_bytes = math.prod(data.chunks) * data.dtype.itemsize
    num_chunks = math.prod(-(-length // step) for length, step in zip(data.shape, data.chunks))
    if chunk_bytes > _MAX_CHUNK_BYTES or num_chunks != data.id.get_num_chunks():
        raise ValueError(
            f"{data.id.get_num_chunks()} of {num_chunks} chunks of {chunk_bytes} bytes at "
            f"{data.name}"
        )
    # A chunk's mask has the bits of the filters that were skipped when it was written.
    deflate = 1 << filters.index(h5z.FILTER_DEFLATE) if h5z.FILTER_DEFLATE in filters else 0
    for index in range(num_chunks):
        chunk = data.id.get_chunk_info(index)
        if chunk.size > chunk_bytes + chunk_bytes // 100 + 1024:
            raise ValueError(
                f"a chunk of {chunk.size} bytes at {data.name} where {chunk_bytes} are enough"
            )
        if deflate and not chunk.filter_mask & deflate:
            _, packed = data.id.read_direct_chunk(chunk.chunk_offset)
            if len(_unpacked(packed, chunk_bytes + 1)) != chunk_bytes:
                raise ValueError(
                    f"a chunk at {data.name} that does not unpack to {chunk_bytes} bytes"
                )


def _unpacked(packed: bytes, max_bytes: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, max_bytes)
    except zlib.error as error:
        raise ValueError(f"damaged data ({error})") from None
