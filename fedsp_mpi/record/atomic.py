"""Files that are whole or not there: written beside, synced, renamed; and the words for a write
that failed.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fedsp_mpi.files import ownership
from fedsp_mpi.record import tables


class RecordError(OSError):
    """The run folder could not be written: which file, why, and what is still there."""


Buffer = bytes | memoryview
# bytes: what disks want addresses, offsets and sizes to be multiples of, past the page cache
_ALIGNED = 4096
_ROOM = 4 << 20  # bytes that are on their way there at once


def write(
    path: Path, image: Sequence[Buffer], left: str, sync: bool = True, bypass: bool = False
) -> None:
    """Put the parts of `image` at `path`: its old content stays until the new one is wholly there.

    Args:
        image: the content, part after part.
        left: for the error: what is kept all the same.
        sync: when this returns, the file is on disk; otherwise it survives a kill, but not the loss
            of the machine.
        bypass: go past the kernel's page cache where the file system lets us: for what is large and
            not read soon.

    Raises RecordError.
    """
    part = part_of(path)
    with writing(path, left, part):
        ownership.make_folder(path.parent)
        handle, is_direct = _open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, bypass)
        try:
            for each in _aligned(image) if is_direct else image:
                _write_all(handle, each)
            os.ftruncate(handle, sum(map(len, image)))
            if sync:
                os.fsync(handle)
        finally:
            os.close(handle)
        rename(part, path, sync)


def read(path: Path) -> memoryview:
    """A file's bytes, in memory that may be written to; past the page cache like what `bypass`
    wrote.
    """
    handle, _ = _open(path, os.O_RDONLY, bypass=True)
    try:
        size = os.fstat(handle).st_size
        room, done = _memory(_rounded_up(size)), 0
        while done < size and (count := _past_cache(handle, os.preadv, [room[done:]], done)):
            done += count
        return room[:done]
    finally:
        os.close(handle)


def _open(path: Path, flags: int, bypass: bool) -> tuple[int, bool]:
    """A file's handle, and whether it goes past the page cache; not every file system can."""
    if bypass:
        with suppress(OSError):
            return os.open(path, flags | os.O_DIRECT, ownership.file_mode(path)), True
    return os.open(path, flags, ownership.file_mode(path)), False


def _aligned(image: Sequence[Buffer]) -> Iterator[memoryview]:
    """The same bytes in pieces that lie, begin and end where a disk wants it, with zeros behind the
    last.
    """
    room, used = _room(), 0
    for part in image:
        rest = memoryview(part)
        while rest:
            count = min(len(rest), _ROOM - used)
            room[used : used + count] = rest[:count]
            used, rest = used + count, rest[count:]
            if used == _ROOM:
                yield room
                used = 0
    end = _rounded_up(used)
    room[used:end] = bytes(end - used)
    yield room[:end]


@cache
def _room() -> memoryview:
    """Kept, because new memory costs more than the copy into it."""
    return _memory(_ROOM)


def _memory(size: int) -> memoryview:
    """Aligned memory, from the allocator: pages that are new to a process cost more than what is
    put in.
    """
    room = np.empty(size + _ALIGNED, dtype=np.uint8)
    start = -room.ctypes.data % _ALIGNED
    return room[start : start + size].data


def _rounded_up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _write_all(handle: int, part: Buffer) -> None:
    rest = memoryview(part)
    while rest:
        rest = rest[_past_cache(handle, os.write, rest) :]


def _past_cache(handle: int, call: Callable[..., int], *arguments: Any) -> int:
    """Call with a handle; through the page cache after all, if the file system wants another
    alignment.
    """
    try:
        return call(handle, *arguments)
    except OSError as error:
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
            raise
        fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return call(handle, *arguments)


@contextmanager
def writing(path: Path, left: str, part: Path | None = None) -> Iterator[None]:
    """Turn a failed write into RecordError, without its half-written file."""
    try:
        yield
    except (
        OSError,
        RuntimeError,
        KeyError,
    ) as error:  # HDF5 has all three for a file that it cannot write or copy
        if part is not None:
            with suppress(OSError):
                part.unlink()
        raise failure(path, error, left) from error


def failure(path: Path, error: BaseException, left: str) -> RecordError:
    """The error of a write that failed, in one line."""
    reason = (
        error.strerror
        if isinstance(error, OSError) and error.strerror
        else tables.first_line(error)
    )
    return RecordError(
        f"{path}: cannot be written ({reason}); {left}; make room or give permission, "
        "then go on from there"
    )


def part_of(path: Path) -> Path:
    """Where a file grows before it takes its name."""
    return path.with_name(path.name + ".part")


def sync(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(part: Path, path: Path, synced: bool = True) -> None:
    """Give a file its name, in the folder's data on disk too."""
    part.replace(path)
    if synced:
        with suppress(
            OSError
        ):  # some network file systems cannot sync a folder; the rename itself has happened
            sync(path.parent)
