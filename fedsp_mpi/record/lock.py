"""One run folder, one job: a lock that the kernel takes back when its owner dies, and a note of who
that is.

The file is also the mark by which a folder is known as that of a run (ownership.py): it stays when
the run has ended.
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
from typing import IO, Any

from fedsp_mpi.files import ownership
from fedsp_mpi.record import atomic

NAME = ownership.LOCK
_TRIES, _PAUSE = (
    10,
    0.05,
)  # a reader that looks whether somebody holds the lock has it for microseconds
_HELD = (errno.EWOULDBLOCK, errno.EACCES)


class RunLock:
    """Held from `take` to the end of the process, or to `release`.

    The lock is `flock`; where the file system has none (some mounts of Lustre and NFS), the note in
    the file decides: a process of this host that is gone, or an earlier start of the same Slurm
    job, has left it behind.
    """

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file, self._path = file, path

    @classmethod
    def take(cls, folder: Path, private: bool = False) -> RunLock:
        """Take the folder, which is made if it is not there.

        Args:
            folder: of the run.
            private: a folder that is new, or empty, is for its owner alone.

        Raises:
            ValueError: the folder is not that of a run; or another job writes to it: names its
            host, process and job.
            RecordError: the folder cannot be written.
        """
        ownership.require_ours(folder)
        path = folder / NAME
        with atomic.writing(path, "no run was touched"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            is_new = not folder.exists() or not any(folder.iterdir())
            if is_new:
                ownership.make_folder(folder, private)
        file, owner = _opened(path)
        with atomic.writing(path, "no run was touched"):
            listed = is_new or bool(owner.get(ownership.LISTED))
            # In one write over the old note: a kill leaves the old or the new one, never an empty
            # file.
            note = json.dumps(_me() | {ownership.LISTED: listed})
            os.pwrite(file.fileno(), note.encode().ljust(os.fstat(file.fileno()).st_size), 0)
        return cls(file, path)

    def release(self, delete: bool = False) -> None:
        """Give the folder back; with `delete` as if it had never been taken."""
        if delete:
            self._path.unlink(missing_ok=True)
        self._file.close()


def is_abandoned(folder: Path) -> bool:
    """Whether a run's folder has a lock that nobody holds. False where that cannot be known."""
    path = folder / NAME
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            owner = _read(file.read())
            if not ownership.is_note(owner):
                return False
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return error.errno not in _HELD and _is_gone(owner)
            return True
    except OSError:
        return False


def _opened(path: Path) -> tuple[IO[str], dict[str, Any]]:
    """The lock's file, which is locked and still the one of that name, and the note of who had it
    before.

    Raises ValueError if another job holds it, RecordError if it cannot be opened.
    """
    for attempt in range(_TRIES):
        with atomic.writing(path, "no run was touched"):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, ownership.file_mode(path))
            file = os.fdopen(handle, "r+", encoding="utf-8", errors="replace")
        owner = _read(file.read())
        is_locked = _locked(file, owner)
        if is_locked and _is_at(file, path):
            return file, owner
        file.close()
        if attempt < _TRIES - 1:
            time.sleep(0 if is_locked else _PAUSE)
    raise ValueError(
        f"{path.parent}: found a run that {_name(owner)} is writing, expected to be "
        "alone; wait for that job, stop it, "
        "or choose another run.name"
    )


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is the one of that name, and not one that was deleted or replaced
    meanwhile.
    """
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _locked(file: IO[str], owner: dict[str, Any]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        return not owner or _is_gone(owner)  # no locks here
    return True


def _is_gone(owner: dict[str, Any]) -> bool:
    if owner.get("job") is not None and owner["job"] == _me()["job"]:
        return True
    return (
        owner.get("host") == socket.gethostname() and not Path(f"/proc/{owner.get('pid')}").exists()
    )


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}


def _read(text: str) -> dict[str, Any]:
    try:
        note = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    job = f", Slurm job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on host {owner.get('host')}{job}"
