"""One job for one run folder: a lock that the kernel takes back when its owner dies.

The lock's file holds a note of its owner. It is also the mark by which a folder is known as that of
a run (ownership.py): it stays when the run has ended.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from fedsp_mpi.files import ownership, untrusted
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.record import atomic

NAME = ownership.LOCK
# A reader that looks whether the lock is held has it itself for microseconds: hence several tries.
_NUM_TRIES = 10
_PAUSE = 0.05  # seconds between two tries
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_UNTOUCHED = "no run was touched"


class RunLock:
    """The lock of a run folder, from `take` until `release` or the end of the process.

    The lock is `flock`. Where the file system has none (some mounts of Lustre and NFS), the note in
    the file decides: an owner that is a process of this host and gone, or an earlier start of the
    same Slurm job, has left it behind.
    """

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file = file
        self._path = path

    @classmethod
    def take(cls, folder: Path, private: bool = False) -> RunLock:
        """Lock a folder, which is made if it is missing.

        Args:
            folder: of the run.
            private: make a new or empty folder accessible to its owner only.

        Raises:
            ValueError: the folder is not that of a run, or another job writes to it; the error
                names its host, process and job.
            RecordError: the folder cannot be written.
        """
        ownership.require_ours(folder)
        path = folder / NAME
        with atomic.writing(path, _UNTOUCHED):
            folder.parent.mkdir(parents=True, exist_ok=True)
            is_new = not folder.exists() or not any(folder.iterdir())
            if is_new:
                ownership.make_folder(folder, private)
        file, owner = _opened(path)
        with atomic.writing(path, _UNTOUCHED):
            is_listed = is_new or bool(owner.get(ownership.LISTS_MODELS))
            note = json.dumps(_this_process() | {ownership.LISTS_MODELS: is_listed}).encode()
            # In one write over the old note: a kill leaves the old or the new one, never an empty
            # file.
            old_size = os.fstat(file.fileno()).st_size
            os.pwrite(file.fileno(), note.ljust(old_size), 0)
        return cls(file, path)

    def release(self, delete: bool = False) -> None:
        """Unlock the folder; with `delete`, remove the lock's file too."""
        if delete:
            self._path.unlink(missing_ok=True)
        self._file.close()


def is_abandoned(folder: Path) -> bool:
    """Return whether a run folder has a lock that nobody holds; False where that is unknown."""
    path = folder / NAME
    try:
        with untrusted.open_regular_file(path) as file:
            owner = _parse_note(file.read())
            if not ownership.is_lock_note(owner):
                return False
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return error.errno not in _HELD and _is_gone(owner)
            return True
    except (OSError, ValueError):
        return False


def _opened(path: Path) -> tuple[IO[str], JsonObject]:
    """Open and lock the lock's file; return it and the note of its last owner.

    Raises ValueError if another job holds it, RecordError if it cannot be opened.
    """
    for attempt in range(_NUM_TRIES):
        with atomic.writing(path, _UNTOUCHED):
            atomic.require_regular(path)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, ownership.file_mode(path))
            file = os.fdopen(handle, "r+", encoding="utf-8", errors="replace")
        owner = _parse_note(file.read())
        is_locked = _try_lock(file, owner)
        if is_locked and _has_name(file, path):
            return file, owner
        file.close()
        if attempt < _NUM_TRIES - 1:
            time.sleep(0 if is_locked else _PAUSE)
    raise ValueError(
        f"{path.parent}: found a run that {_describe(owner)} is writing, expected to be "
        "alone; wait for that job, stop it, or choose another run.name"
    )


def _has_name(file: IO[str], path: Path) -> bool:
    """Return whether an open file still has its name, and was not deleted or replaced meanwhile."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _try_lock(file: IO[str], owner: JsonObject) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        return not owner or _is_gone(owner)  # the file system has no locks
    return True


def _is_gone(owner: JsonObject) -> bool:
    """Return whether the owner is known to have ended."""
    if owner.get("job") is not None and owner["job"] == _this_process()["job"]:
        return True
    is_on_this_host = owner.get("host") == socket.gethostname()
    return is_on_this_host and not Path(f"/proc/{owner.get('pid')}").exists()


def _this_process() -> JsonObject:
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}


def _parse_note(text: str | bytes) -> JsonObject:
    try:
        note = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def _describe(owner: JsonObject) -> str:
    if not owner:
        return "another process"
    job = f", Slurm job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on host {owner.get('host')}{job}"
