"""Files that are whole or absent: written beside their name, synced, renamed."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import safetensors

from fedsp_mpi.files import ownership
from fedsp_mpi.log import one_line


class RecordError(OSError):
    """The run folder could not be written: which file, why, and what is still intact."""

    explains_itself = True


Buffer = bytes | memoryview
# In bytes: past the page cache, disks want addresses, offsets and sizes to be multiples of it.
_ALIGNMENT = 4096
_BUFFER_BYTES = 4 << 20  # of the aligned buffer through which a file is written
# Errors for something that is there: a folder, a file, or a link that leads nowhere.
_IN_THE_WAY = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)


def write(
    path: Path, image: Sequence[Buffer], intact: str, *, sync: bool = True, bypass: bool = False
) -> None:
    """Replace a file; its old content stays until the new one is complete.

    Args:
        path: of the file; its folder is made if it is missing.
        image: the content, part after part.
        intact: what is still there if this fails, for the error message.
        sync: when this returns, the file is on disk; otherwise it survives a kill, but not the loss
            of the machine.
        bypass: write past the kernel's page cache where the file system can: for what is large and
            not read soon.

    Raises:
        RecordError: the file cannot be written.
    """
    part = part_of(path)
    with writing(path, intact, part):
        ownership.make_folder(path.parent)
        handle, is_direct = _open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, bypass)
        try:
            for buffer in _aligned(image) if is_direct else image:
                _write_all(handle, buffer)
            os.ftruncate(handle, sum(map(len, image)))
            if sync:
                os.fsync(handle)
        finally:
            os.close(handle)
        rename(part, path, sync)


def append(path: Path, size: int, content: Buffer, *, intact: str) -> None:
    """Write bytes behind the first `size` bytes of a file, which stay as they are.

    What a failed call has left there is written over by the next one.

    Args:
        path: of the file; it is made if it is missing.
        size: bytes of the file that count.
        content: to add.
        intact: what is still there if this fails, for the error message.

    Raises:
        RecordError: the file cannot be written.
    """
    with writing(path, intact):
        require_regular(path)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, ownership.file_mode(path))
        try:
            os.lseek(handle, size, os.SEEK_SET)
            _write_all(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: Path) -> memoryview:
    """Return a file's bytes in writable memory, read past the page cache where the file system can.

    Raises:
        OSError: the file cannot be read.
    """
    handle, _ = _open(path, os.O_RDONLY, bypass=True)
    try:
        size = os.fstat(handle).st_size
        buffer = _aligned_memory(_rounded_up(size))
        num_read = 0
        while num_read < size:
            count = _retry_cached(os.preadv, handle, [buffer[num_read:]], num_read)
            if count == 0:  # the file has become shorter
                break
            num_read += count
        return buffer[:num_read]
    finally:
        os.close(handle)


def _open(path: Path, flags: int, bypass: bool) -> tuple[int, bool]:
    """Open a file; return its handle and whether it goes past the page cache."""
    require_regular(path)
    if bypass:
        with suppress(OSError):  # not every file system can
            return os.open(path, flags | os.O_DIRECT, ownership.file_mode(path)), True
    return os.open(path, flags, ownership.file_mode(path)), False


def _aligned(image: Sequence[Buffer]) -> Iterator[memoryview]:
    """Yield the same bytes in aligned buffers of aligned sizes, with zeros behind the last byte."""
    buffer = _shared_buffer()
    num_used = 0
    for part in image:
        source = memoryview(part)
        while source:
            count = min(len(source), _BUFFER_BYTES - num_used)
            buffer[num_used : num_used + count] = source[:count]
            num_used += count
            source = source[count:]
            if num_used == _BUFFER_BYTES:
                yield buffer
                num_used = 0
    end = _rounded_up(num_used)
    buffer[num_used:end] = bytes(end - num_used)
    yield buffer[:end]


@cache
def _shared_buffer() -> memoryview:
    """Return one buffer for all writes: new memory costs more than the copy into it."""
    return _aligned_memory(_BUFFER_BYTES)


def _aligned_memory(size: int) -> memoryview:
    """Return `size` bytes that begin at an aligned address.

    They come from the allocator, which reuses memory: pages that are new to a process cost more
    than what is written into them.
    """
    memory = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].data


def _rounded_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _write_all(handle: int, part: Buffer) -> None:
    unwritten = memoryview(part)
    while unwritten:
        count = _retry_cached(os.write, handle, unwritten)
        unwritten = unwritten[count:]


def _retry_cached(call: Callable[..., int], handle: int, *arguments: object) -> int:
    """Read or write; through the page cache after all if the file system wants other alignments."""
    try:
        return call(handle, *arguments)
    except OSError as error:
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
            raise
        fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return call(handle, *arguments)


@contextmanager
def writing(path: Path, intact: str, part: Path | None = None) -> Iterator[None]:
    """Turn a failed write into a RecordError, and remove the half-written file.

    Args:
        path: is named in the error.
        intact: what is still there, for the error message.
        part: the half-written file, if there is one.

    Raises:
        RecordError: the body failed.
    """
    try:
        yield
    # HDF5 raises all three for a file that it cannot write or copy.
    except (OSError, RuntimeError, KeyError) as error:
        if part is not None:
            with suppress(OSError):
                part.unlink()
        raise failure(path, error, intact) from error


@contextmanager
def saving(folder: Path, intact: str) -> Iterator[None]:
    """Turn the error of a library that cannot write a model into a RecordError.

    Args:
        folder: of the model.
        intact: what is still there, for the error message.

    Raises:
        RecordError: the body failed to write.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise failure(folder, error, intact) from error


def failure(path: Path, error: BaseException, intact: str) -> RecordError:
    """Return the error of a failed write, in one line.

    Args:
        path: of the file.
        error: what went wrong.
        intact: what is still there.
    """
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = one_line(error, first_line=True)
    advice = "make room or give permission"
    if isinstance(error, OSError) and error.errno in _IN_THE_WAY:
        advice = "move away what is there"
        obstacle = str(error.filename2 or error.filename or path)
        if obstacle != str(path):
            reason = f"{obstacle}: {reason}"
    return RecordError(
        f"{path}: cannot be written ({reason}); {intact}; {advice}, then go on from there"
    )


def require_regular(path: Path) -> None:
    """Raise OSError if there is something else than a regular file: a pipe blocks who opens it."""
    if path.exists() and not path.is_file():
        kind = errno.EISDIR if path.is_dir() else errno.EEXIST
        reason = os.strerror(kind) if path.is_dir() else "No regular file"
        raise OSError(kind, reason, str(path))


def part_of(path: Path) -> Path:
    """Return where a file is written before it takes its name."""
    return path.with_name(path.name + ".part")


def sync(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(part: Path, path: Path, synced: bool = True) -> None:
    """Give a file its name.

    Args:
        part: the file as it was written.
        path: its name from now on.
        synced: wait until the name is on disk too.
    """
    part.replace(path)
    if synced:
        # Some network file systems cannot sync a folder; the rename itself has happened.
        with suppress(OSError):
            sync(path.parent)
