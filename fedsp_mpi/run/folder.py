"""The folder of a run: which one it is, whether this job may write to it, and what there is to go
on with.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedsp_mpi import comm
from fedsp_mpi.config import Config, changed_keys
from fedsp_mpi.files import ownership

if TYPE_CHECKING:
    from fedsp_mpi.record.lock import RunLock


class RunFolder:
    """One run's folder, from the moment that this job takes it.

    Args:
        config: the run's.
        name: the configuration's name, for a run that has none.

    Attributes:
        path: the folder; `take` makes it if it is absent.
        goes_on: whether it holds a run that this job goes on with; known after `take`.
    """

    def __init__(self, config: Config, name: str) -> None:
        self._config = config
        self.path = _path(config, name)
        self.goes_on = False
        self._lock: RunLock | None = None

    def take(self, inputs: Mapping[str, str | None]) -> None:
        """Be the only job that writes to the folder, and find out whether there is a run to go on
        with.

        Args:
            inputs: the paths that the run reads, by their keys.

        Raises:
            ValueError: the folder is not that of a run, holds an input or another run; or there is
            none to go on with.
            RecordError: it cannot be written.
            comm.Refused: the run is complete, with status 0.
        """
        from fedsp_mpi.record.lock import RunLock
        from fedsp_mpi.record.writer import require_free

        settings = self._config.run
        for require in (ownership.require_readable_path, ownership.require_plain_name):
            require("run.name", self.path.name)  # which may be that of the configuration's file
        ownership.require_apart(self.path, inputs)
        self._lock = RunLock.take(self.path, settings.permissions == "private")
        self.goes_on = settings.resume != "never" and (self.path / "run.h5").exists()
        if settings.resume == "must" and not self.goes_on:
            raise ValueError(
                f"run.resume: found no run in {self.path}, expected one to go on from; name it "
                "with --name, or take "
                "--resume auto to begin it where there is none"
            )
        if self.goes_on:
            self._require_unfinished()
        elif settings.if_exists == "refuse" and settings.resume != "auto":
            require_free(self.path)

    def clear(self) -> None:
        """Remove what an earlier run, or one that was killed before it began, has written here.

        Raises RecordError.
        """
        from fedsp_mpi.record import atomic

        with atomic.writing(self.path, "no run was started"):
            ownership.clear(self.path)
            if self._config.run.permissions == "private":
                ownership.make_folder(self.path, private=True)

    def give_back(self) -> None:
        """After a refusal: leave nothing behind where there was nothing, so that the next try is
        not refused for it.
        """
        if self._lock is not None:
            self._lock.release(
                delete=[path.name for path in self.path.iterdir()] == [ownership.LOCK]
            )
            ownership.remove_if_empty(self.path)

    def _require_unfinished(self) -> None:
        from fedsp_mpi.record import Checkpoints, read, resume_command

        run = read(self.path)
        if run.status == "complete":
            if not self._config.checkpoint.keep_client_states:
                Checkpoints(
                    self.path
                ).remove_clients()  # a job that was killed at its very end has not come to it
            raise comm.Refused(
                f"{self.path}: this run is complete, there is nothing to go on with", 0
            )
        if changed := changed_keys(run.config, asdict(self._config)):
            raise ValueError(
                f"{self.path}: found another configuration than the run was begun with "
                f"({'; '.join(changed)}), "
                f"expected the same; go on with {resume_command(self.path, run.config)}, or "
                "choose another run.name"
            )


def _path(config: Config, name: str) -> Path:
    folder = Path(config.run.folder).expanduser()
    if config.run.name != "auto":
        return folder / config.run.name
    if config.run.resume != "never" and (newest := _unfinished(folder, name)):
        return newest
    stamped = folder / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    return stamped if not stamped.exists() else stamped.with_name(f"{stamped.name}-{os.getpid()}")


def _unfinished(folder: Path, name: str) -> Path | None:
    """The newest run of a configuration that did not come to its end."""
    from fedsp_mpi.record import read

    for found in sorted(folder.glob(f"{glob.escape(name)}-[0-9]*"), reverse=True):
        with suppress(ValueError):
            if read(found).status != "complete":
                return found
    return None
