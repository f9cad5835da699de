"""One run folder, one job: a lock that the kernel takes back when its owner dies, and a note of who that is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

from fedsp_mpi.record import files

NAME = "lock"


class RunLock:
    """Held from `take` to the end of the process, or to `release`.

    The lock is `flock`; where the file system has none (some mounts of Lustre and NFS), the note in the file decides: a
    process of this host that is gone, or an earlier start of the same Slurm job, has left it behind.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    @classmethod
    def take(cls, folder: Path) -> RunLock:
        """Take the folder, which is made if it is not there.

        Raises:
            ValueError: another job writes to it; names its host, process and Slurm job.
            RecordError: the folder cannot be written.
        """
        path = folder / NAME
        with files.writing(path, "no run was touched"):
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        file.seek(0)
        owner = _read(file.read())
        if not _locked(file, owner):
            file.close()
            raise ValueError(
                f"{folder}: found a run that {_name(owner)} is writing, expected to be alone; wait for that job, stop "
                f"it, or choose another run.name (if it is gone for sure, delete {path})"
            )
        with files.writing(path, "no run was touched"):
            file.truncate(0)
            file.write(json.dumps(_me()))
            file.flush()
        return cls(file)

    def release(self, delete: bool = False) -> None:
        """Give the folder back; with `delete` as if it had never been taken."""
        if delete:
            Path(self._file.name).unlink(missing_ok=True)
        self._file.close()


def _locked(file: IO[str], owner: dict[str, Any]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        return not owner or _is_gone(owner)  # no locks here
    return True


def _is_gone(owner: dict[str, Any]) -> bool:
    if owner.get("job") is not None and owner["job"] == _me()["job"]:
        return True
    return owner.get("host") == socket.gethostname() and not Path(f"/proc/{owner.get('pid')}").exists()


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}


def _read(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    job = f", Slurm job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on host {owner.get('host')}{job}"
