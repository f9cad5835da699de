"""Whether a folder can hold runs: written to by every rank, seen by all, with locks and atomic
renames.
"""

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
    """The server's side: a folder of its own below the run folder, which leaves nothing behind.

    Raises RecordError if the folder cannot be made or written.
    """

    def __init__(self, runs: Path) -> None:
        self.folder = runs.expanduser().absolute() / f".check-{socket.gethostname()}-{os.getpid()}"
        self._made = [
            path for path in self.folder.parents if not path.exists()
        ]  # the innermost first
        with atomic.writing(self.folder, "nothing was begun"):
            self.folder.mkdir(parents=True)
            self._lock = self._begin()

    def _begin(self) -> IO[str]:
        path, part = self.folder / "lock", self.folder / "lock.part"
        path.write_text("before", encoding="utf-8")
        part.write_text(str(self.folder), encoding="utf-8")
        part.replace(path)
        lock = path.open("a", encoding="utf-8")
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock

    @property
    def free(self) -> int:
        """Bytes of room, as the file system says; it may not know of a quota."""
        return shutil.disk_usage(self.folder).free

    def heard_from(self, rank: int) -> bool:
        """Whether the file that a rank wrote with `look` is seen here."""
        return _reads(self.folder / str(rank), str(rank))

    def remove(self) -> None:
        """Take away what the ranks wrote, and the folders that were not there before."""
        self._lock.close()
        for path in self.folder.glob("*"):
            if path.name.isdecimal() or path.name.startswith("lock"):
                with suppress(OSError):
                    path.unlink()
        ownership.remove_if_empty(self.folder)
        with suppress(OSError):  # others may have put something there
            for path in self._made:
                path.rmdir()


def look(folder: Path, rank: int) -> dict[str, str]:
    """A rank's side: read the server's file, try its lock, write a file.

    Returns what went wrong under "reading", "locking" and "writing"; nothing if all is well.
    """
    if not _reads(folder / "lock", str(folder)):
        return {"reading": f"does not see {folder.parent} as the server does"}
    wrong = {}
    try:
        (folder / str(rank)).write_text(str(rank), encoding="utf-8")
    except OSError as error:
        wrong["writing"] = f"cannot write into {folder.parent} ({error.strerror})"
    if trouble := _lock_trouble(folder / "lock"):
        wrong["locking"] = trouble
    return wrong


def _lock_trouble(path: Path) -> str:
    try:
        with path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return (
            "" if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else f"flock: {error.strerror}"
        )
    return "a lock that the server holds is not seen"


def _reads(path: Path, text: str) -> bool:
    """Whether a file holds this text, now or within the patience that a network file system needs."""
    end = time.monotonic() + _PATIENCE
    while True:
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == text:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
