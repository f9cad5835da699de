"""Test whether a folder can hold runs: all ranks can write and see it; it has locks and renames."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from fedsp_mpi.files import ownership
from fedsp_mpi.record import atomic

_PATIENCE = 3.0  # seconds until a network file system must show what another host wrote


class Probe:
    """The server's side of the test: a temporary folder below the folder of runs.

    Raises:
        RecordError: the folder cannot be made or written.
    """

    def __init__(self, runs: Path) -> None:
        self.folder = runs.expanduser().absolute() / f".check-{socket.gethostname()}-{os.getpid()}"
        # The innermost first.
        self._new_parents = [path for path in self.folder.parents if not path.exists()]
        with atomic.writing(self.folder, "nothing was begun"):
            self.folder.mkdir(parents=True)
            self._lock = self._begin()

    def _begin(self) -> IO[str]:
        """Write a file, replace it by a rename, and lock it, as a run does."""
        path = self.folder / "lock"
        part = self.folder / "lock.part"
        path.write_text("before", encoding="utf-8")
        part.write_text(str(self.folder), encoding="utf-8")
        part.replace(path)
        lock = path.open("a", encoding="utf-8")
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock

    @property
    def free(self) -> int:
        """Free space in bytes, as the file system says; it may not know of a quota."""
        return shutil.disk_usage(self.folder).free

    def heard_from(self, rank: int) -> bool:
        """Return whether the file that a rank wrote in `look` is visible here."""
        return _becomes_readable(self.folder / str(rank), str(rank))

    def remove(self) -> None:
        """Remove what the ranks wrote, and the folders that were not there before."""
        self._lock.close()
        for path in self.folder.glob("*"):
            if path.name.isdecimal() or path.name.startswith("lock"):
                with suppress(OSError):
                    path.unlink()
        ownership.remove_if_empty(self.folder)
        with suppress(OSError):  # others may have put something there
            for path in self._new_parents:
                path.rmdir()


def look(folder: Path, rank: int) -> dict[str, str]:
    """Take a rank's part in the test: read the server's file, try its lock, write a file.

    Returns:
        What went wrong under "reading", "locking" and "writing"; empty if nothing did.
    """
    if not _becomes_readable(folder / "lock", str(folder)):
        return {"reading": f"does not see {folder.parent} as the server does"}
    problems = {}
    try:
        (folder / str(rank)).write_text(str(rank), encoding="utf-8")
    except OSError as error:
        problems["writing"] = f"cannot write into {folder.parent} ({error.strerror})"
    lock_trouble = _lock_trouble(folder / "lock")
    if lock_trouble:
        problems["locking"] = lock_trouble
    return problems


def _lock_trouble(path: Path) -> str:
    """Return what is wrong with locks in this folder; empty if the server's lock is respected."""
    try:
        with path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return ""
        return f"flock: {error.strerror}"
    return "a lock that the server holds is not seen"


def _becomes_readable(path: Path, text: str) -> bool:
    """Return whether a file holds this text within the time that a network file system may need."""
    end = time.monotonic() + _PATIENCE
    while True:
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == text:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
