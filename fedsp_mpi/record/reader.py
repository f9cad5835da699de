"""HDF5 files that others may have made or damaged: the one way in which the package opens and reads
them.

A file is opened once; its digest is compared (trailer.py) before HDF5 parses a byte. Then only what
a record can hold is read: nothing behind links, but for those to rounds/NNNN.h5 beside the file; no
external storage and no virtual data sets, which name other files; no types but numbers and text; no
more bytes than are stored. Nothing is allocated for a size that a file merely claims.

Everything here raises ValueError with the words that follow "found"; what HDF5 itself raises goes
through.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from h5py import h5d, h5t, h5z

from fedsp_mpi.files import untrusted
from fedsp_mpi.record import trailer
from fedsp_mpi.record.trailer import Extent, Trailer

_MOST_BYTES = 4 << 30  # of the prompts of one round, in memory
_MOST_CHUNK = 64 << 20  # bytes of one chunk in memory; h5py chooses 1 MiB at most
_MOST_NAMES = 100_000  # in all groups below one
_DEEPEST = 16  # groups in groups: a tensor's name has a part for each
_PACKING = (h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE, h5z.FILTER_FLETCHER32)
_ROUND = re.compile(r"[0-9]{4,9}")
_NUMBERS = (h5t.INTEGER, h5t.FLOAT, h5t.ENUM)  # the last one is h5py's bool


@dataclass(frozen=True)
class Opened:
    """An open file: `h5` to read from, and what its bytes were checked against; None for files of
    earlier versions.
    """

    path: Path
    file: BinaryIO
    h5: h5py.File
    trailer: Trailer | None


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Open a file whose digest is right, or that has none.

    Raises OSError, ValueError if it is no regular file or its bytes are not what was written.
    """
    with untrusted.open_plain(path) as file:
        end = trailer.read(file)
        if end is not None:
            end.require(file)
        file.seek(0)
        with h5py.File(file, "r") as h5:
            if h5.userblock_size:
                raise ValueError("a file with a user block, which no run writes")
            yield Opened(path, file, h5, end)


def attribute(h5: h5py.File, name: str) -> Any:
    """A text or a whole number among the attributes of the root; None if it is missing.

    Raises ValueError if it is of another type.
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
    """The names in a group. Raises ValueError if they are too many."""
    if len(group) > _MOST_NAMES:
        raise ValueError(f"{len(group)} names in {group.name}, which no run writes")
    return list(group)


def child(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """What a group holds under a name.

    Raises KeyError if there is none, ValueError for a link to somewhere else.
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
    """A group in a group. Raises KeyError, ValueError."""
    item = child(group, name)
    if not isinstance(item, h5py.Group):
        raise ValueError(f"data at {name}, which is a group in the record of a run")
    return item


def texts(opened: Opened, path: str, wanted: Iterable[str] | None = None) -> dict[str, str]:
    """Texts that are stored as data sets in a group; all that there are, or those that are wanted.

    Raises KeyError, ValueError; also if all together are longer than the file, because several are
    one in it.
    """
    group: h5py.Group = opened.h5 if path == "/" else subgroup(opened.h5, path)
    read: dict[str, str] = {}
    left = opened.file.seek(0, 2)
    for name in names(group) if wanted is None else wanted:
        data = _dataset(group, name)
        if data.shape != () or h5py.check_string_dtype(data.dtype) is None:
            raise ValueError(
                f"data of {data.dtype} {data.shape} at {name}, which is a text in the "
                "record of a run"
            )
        _require_stored(data)
        read[name] = data.asstr()[()]
        left -= len(read[name])
        if left < 0:
            raise ValueError(f"more text in {path} than the file has bytes")
    return read


def table(opened: Opened, name: str) -> np.ndarray:
    """A table [rows] of numbers and texts. Raises KeyError, ValueError."""
    data = _dataset(opened.h5, name)
    if data.ndim != 1 or not data.dtype.names:
        raise ValueError(
            f"data of {data.dtype} {data.shape} at {name}, which is a table in the record of a run"
        )
    places = _text_columns(data)
    _require_stored(data)
    _require_texts(opened, data, places)
    return data[()]


def linked_round(opened: Opened, name: str) -> Path | None:
    """The file that holds a round's prompts; None where they lie in the opened file itself.

    Raises KeyError if there are none, ValueError for a link to any file but the round's own beside
    the opened one.
    """
    group = subgroup(opened.h5, "prompts")
    if not group.id.links.exists(name.encode()):
        raise KeyError(f"no prompts of round {name}")
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.ExternalLink):
        return None
    if (link.filename, link.path) != (f"rounds/{name}.h5", "/prompt"):
        raise ValueError(
            f"a link to {untrusted.printable(link.filename)!r}, which is no file of round {name}"
        )
    return opened.path.parent / link.filename


def round_numbers(opened: Opened) -> list[int]:
    """The rounds whose prompts a record names, in ascending order. Raises KeyError, ValueError."""
    found = names(subgroup(opened.h5, "prompts"))
    if strange := next((name for name in found if not _ROUND.fullmatch(name)), None):
        raise ValueError(f"prompts of round {untrusted.printable(strange)!r}, which is no number")
    return sorted(map(int, found))


def tensors(group: h5py.Group) -> dict[str, np.ndarray]:
    """The tensors below a group, by name, in the order in which they were written.

    Raises KeyError, ValueError.
    """
    data = dict(_datasets(group, ""))
    for name, each in data.items():
        if each.dtype.kind not in "fiu":
            raise ValueError(
                f"data of {each.dtype} at {name}, which is a tensor in the record of a run"
            )
    if (size := sum(map(_size, data.values()))) > _MOST_BYTES:
        raise ValueError(f"prompts of {size} bytes, more than any run writes")
    for each in data.values():
        _require_unpacked(each)
    order = sorted((int(each.attrs["position"]), name) for name, each in data.items())
    return {name: np.asarray(data[name][()]) for _, name in order}


def extents(group: h5py.Group) -> list[Extent]:
    """Where the tensors below a group lie in the file, adjacent pieces joined."""
    pieces = [piece for _, data in _datasets(group, "") for piece in _pieces(data)]
    joined: list[Extent] = []
    for start, size in sorted(pieces):
        if joined and sum(joined[-1]) == start:
            joined[-1] = joined[-1][0], joined[-1][1] + size
        else:
            joined.append((start, size))
    return joined


def _pieces(data: h5py.Dataset) -> list[Extent]:
    """Where a data set lies in the file: a piece for each chunk."""
    if data.chunks:
        every = map(data.id.get_chunk_info, range(data.id.get_num_chunks()))
        return [(chunk.byte_offset, chunk.size) for chunk in every if chunk.byte_offset is not None]
    start = data.id.get_offset()
    return [] if start is None else [(start, data.id.get_storage_size())]


def _datasets(group: h5py.Group, prefix: str) -> Iterator[tuple[str, h5py.Dataset]]:
    """The data sets below a group by their names from there.

    Raises ValueError if they are too many, or too deep.
    """
    left, num = [(group, prefix)], 0
    while left:
        group, prefix = left.pop()
        for name in names(group):
            item, num = child(group, name), num + 1
            path = f"{prefix}{name}"
            if num > _MOST_NAMES or path.count("/") > _DEEPEST:
                raise ValueError("groups in groups without end")
            if isinstance(item, h5py.Group):
                left.append((item, f"{path}/"))
            else:
                yield path, _own_data(item, path)


def _dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    item = child(group, name)
    if not isinstance(item, h5py.Dataset):
        raise ValueError(f"a group at {name}, which is data in the record of a run")
    return _own_data(item, name)


def _own_data(data: h5py.Dataset, name: str) -> h5py.Dataset:
    """A data set whose values lie in this file."""
    if data.external:
        raise ValueError(
            f"data at {name} that lie in another file "
            f"({untrusted.printable(str(data.external[0][0]))!r})"
        )
    if data.id.get_create_plist().get_layout() not in (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED):
        raise ValueError(f"virtual data at {name}, which may lie in other files")
    if data.shape is None:
        raise ValueError(f"nothing at {name}")
    return data


def _size(data: h5py.Dataset) -> int:
    """Bytes that a data set takes in memory, as it claims."""
    return math.prod(data.shape) * data.dtype.itemsize


def _require_stored(data: h5py.Dataset) -> None:
    """Raise ValueError unless all bytes that a data set claims are in the file, one by one."""
    if data.id.get_create_plist().get_nfilters():
        raise ValueError(f"compressed data at {data.name}, which no run writes")
    size, stored = data.size * data.id.get_type().get_size(), data.id.get_storage_size()
    if size > stored:
        raise ValueError(f"{size} bytes claimed at {data.name} where {stored} are stored")


def _text_columns(data: h5py.Dataset) -> list[int]:
    """Where the texts of a table begin in each row, in bytes, as it lies in the file.

    Raises ValueError if a column holds neither numbers nor texts.
    """
    kind, places = data.id.get_type(), list[int]()
    for column in range(kind.get_nmembers()):
        member = kind.get_member_type(column)
        if isinstance(member, h5t.TypeStringID) and member.is_variable_str():
            # HDF5 says how it lies in memory, where a text is an address of 8 bytes; in the file it
            # takes 16.
            places.append(kind.get_member_offset(column) + 8 * len(places))
        elif member.get_class() not in _NUMBERS:
            raise ValueError(f"a column in {data.name} that holds neither numbers nor texts")
    return places


def _require_texts(opened: Opened, data: h5py.Dataset, places: list[int]) -> None:
    """Raise ValueError if a table claims more text than there is.

    Many cells may point to one text; a run writes each text by itself, so that all together they
    fit into the file.
    """
    width, claimed = data.id.get_type().get_size() + 8 * len(places), 0
    for start, num in _stored_rows(data, width) if places else ():
        opened.file.seek(start)
        rows = np.frombuffer(opened.file.read(num * width), np.uint8).reshape(-1, width)
        for place in places:  # a text is its length, in 4 bytes, and where it lies, in 12
            claimed += int(
                np.ascontiguousarray(rows[:, place : place + 4]).view("<u4").sum(dtype=np.uint64)
            )
    if claimed > (size := opened.file.seek(0, 2)):
        raise ValueError(f"{claimed} bytes of text claimed at {data.name} in a file of {size}")


def _stored_rows(data: h5py.Dataset, width: int) -> Iterator[tuple[int, int]]:
    """Where a table's rows begin in the file, and how many lie there: a pair for each chunk.

    Raises ValueError if a row has not `width` bytes there.
    """
    rows = data.chunks[0] if data.chunks else len(data)
    for place, (start, size) in enumerate(_pieces(data)):
        if size != rows * width:
            raise ValueError(f"rows of another length than {width} bytes at {data.name}")
        first = data.id.get_chunk_info(place).chunk_offset[0] if data.chunks else 0
        yield start, min(rows, len(data) - first)


def _require_unpacked(data: h5py.Dataset) -> None:
    """Raise ValueError unless a tensor's chunks are all there, and none unpacks to more than a
    chunk.
    """
    properties = data.id.get_create_plist()
    filters = [properties.get_filter(place)[0] for place in range(properties.get_nfilters())]
    if not filters:
        return _require_stored(data)
    if len(set(filters)) < len(filters) or not set(filters) <= set(_PACKING):
        raise ValueError(f"data at {data.name} that are packed as no run does it")
    size = math.prod(data.chunks) * data.dtype.itemsize
    num = math.prod(-(-length // step) for length, step in zip(data.shape, data.chunks))
    if size > _MOST_CHUNK or num != data.id.get_num_chunks():
        raise ValueError(
            f"{data.id.get_num_chunks()} of {num} chunks of {size} bytes at {data.name}"
        )
    deflate = 1 << filters.index(h5z.FILTER_DEFLATE) if h5z.FILTER_DEFLATE in filters else 0
    for place in range(num):
        chunk = data.id.get_chunk_info(place)
        if chunk.size > size + size // 100 + 1024:
            raise ValueError(
                f"a chunk of {chunk.size} bytes at {data.name} where {size} are enough"
            )
        if deflate and not chunk.filter_mask & deflate:
            _, packed = data.id.read_direct_chunk(chunk.chunk_offset)
            if len(_unpacked(packed, size + 1)) != size:
                raise ValueError(f"a chunk at {data.name} that does not unpack to {size} bytes")
    return None


def _unpacked(packed: bytes, most: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, most)
    except zlib.error as error:
        raise ValueError(f"damaged data ({error})") from None
