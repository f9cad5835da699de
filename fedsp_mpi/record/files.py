"""Files that are whole or not there: written beside, synced, renamed; and the words for a write that failed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from fedsp_mpi.record import rows


class RecordError(OSError):
    """The run folder could not be written: which file, why, and what is still there."""


Buffer = bytes | memoryview


def write(path: Path, image: Sequence[Buffer], left: str, sync: bool = True, spare: Path | None = None) -> None:
    """Put the parts of `image` at `path`: its old content stays until the new one is wholly there.

    Args:
        image: the content, part after part.
        left: for the error: what is kept all the same.
        spare: a file that nobody needs any more; it is written over, which costs less than to have a new one made.
        sync: when this returns, the file is on disk; otherwise it survives a kill, but not the loss of the machine.

    Raises RecordError.
    """
    part = part_of(path)
    with writing(path, left, part):
        path.parent.mkdir(exist_ok=True)
        if spare is not None:
            spare.replace(part)
        with part.open("wb" if spare is None else "r+b", buffering=0) as file:
            for each in image:
                _write_all(file, each)
            file.truncate()
            if sync:
                os.fsync(file.fileno())
        rename(part, path, sync)


def _write_all(file: FileIO, part: Buffer) -> None:
    rest = memoryview(part)
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def writing(path: Path, left: str, part: Path | None = None) -> Iterator[None]:
    """Turn a failed write into RecordError, without its half-written file."""
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:  # HDF5 has all three for a file that it cannot write or copy
        if part is not None:
            with suppress(OSError):
                part.unlink()
        raise failure(path, error, left) from error


def failure(path: Path, error: BaseException, left: str) -> RecordError:
    """The error of a write that failed, in one line."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else rows.first_line(error)
    return RecordError(
        f"{path}: cannot be written ({reason}); {left}; make room or give permission, then go on from there"
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
        with suppress(OSError):  # some network file systems cannot sync a folder; the rename itself has happened
            sync(path.parent)
