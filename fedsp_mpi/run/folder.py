"""The folder of a run: which one it is, whether this job may write to it, and what is in it."""

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
from fedsp_mpi.run.resuming import clients_keep_state, more_rounds_advice, require_rounds

_ROUNDS = "federation.rounds"

if TYPE_CHECKING:
    from fedsp_mpi.record.lock import RunLock


class RunFolder:
    """One run's folder, which one job at a time may write to.

    Args:
        config: of the run.
        name: of the configuration, for a run that has none.

    Attributes:
        path: the folder; `acquire` makes it if it is absent.
        is_resumed: whether it holds a run that this job resumes; known after `acquire`.
        gets_rounds: whether that run goes on with another number of rounds than it was begun with.
    """

    def __init__(self, config: Config, name: str) -> None:
        self._config = config
        self.path = _path(config, name)
        self.is_resumed = False
        self.gets_rounds = False
        self._lock: RunLock | None = None

    def acquire(self, inputs: Mapping[str, str | None]) -> None:
        """Lock the folder, and find out whether there is a run to resume.

        Args:
            inputs: the paths that the run reads, by their keys.

        Raises:
            ValueError: the folder is not that of a run, or holds an input or another run; or there
                is no run to resume.
            RecordError: it cannot be written.
            comm.Refused: the run is complete, with status 0.
        """
        from fedsp_mpi.record.lock import RunLock
        from fedsp_mpi.record.writer import require_free

        settings = self._config.run
        # The name may be that of the configuration's file, which nothing has checked.
        ownership.require_readable_path("run.name", self.path.name)
        ownership.require_plain_name("run.name", self.path.name)
        ownership.require_apart(self.path, inputs)
        self._lock = RunLock.take(self.path, settings.permissions == "private")
        self.is_resumed = settings.resume != "never" and (self.path / "run.h5").exists()
        if settings.resume == "must" and not self.is_resumed:
            raise ValueError(
                f"run.resume: found no run in {self.path}, expected one to go on from; name it "
                "with --name, or take --resume auto to begin it where there is none"
            )
        if self.is_resumed:
            self._require_resumable()
        elif settings.if_exists == "refuse" and settings.resume != "auto":
            require_free(self.path)

    def clear(self) -> None:
        """Remove what an earlier run, or one that was killed before it began, has written here.

        Raises:
            RecordError: it cannot be removed.
        """
        from fedsp_mpi.record import atomic

        with atomic.writing(self.path, "no run was started"):
            ownership.clear(self.path)
            if self._config.run.permissions == "private":
                ownership.make_folder(self.path, private=True)

    def release(self) -> None:
        """Unlock the folder after a refusal.

        Where there was nothing before, nothing is left behind, so that the next try is not refused
        for it.
        """
        if self._lock is None:
            return
        names = [path.name for path in self.path.iterdir()]
        self._lock.release(delete=names == [ownership.LOCK])
        ownership.remove_if_empty(self.path)

    def _require_resumable(self) -> None:
        """Raise unless the run in the folder can be resumed under this configuration."""
        from fedsp_mpi.record import Checkpoints, newest_environment, read, resume_command

        run = read(self.path)
        changes = changed_keys(run.config, asdict(self._config))
        other_changes = [change for change in changes if not change.startswith(f"{_ROUNDS}:")]
        self.gets_rounds = changes != other_changes
        if run.status == "complete" and not self.gets_rounds:
            if not self._config.checkpoint.keep_client_states:
                # A job that was killed at its very end has not come to this.
                Checkpoints(self.path).remove_clients()
            raise comm.Refused(
                f"{self.path}: this run is complete, there is nothing to go on with; "
                f"{more_rounds_advice(self.path, self._config)}",
                0,
            )
        if other_changes:
            environment = newest_environment(run.environment, run.sections)
            raise ValueError(
                f"{self.path}: found another configuration than the run was begun with "
                f"({'; '.join(changes)}), expected the same; go on with "
                f"{resume_command(self.path, environment)}, or choose another run.name"
            )
        if self.gets_rounds:
            before = run.config["federation"]["rounds"]
            num_done = run.committed_rounds
            require_rounds(self.path, self._config, before=before, num_done=num_done)
            if run.status == "complete":
                self._require_last_checkpoint(num_done)

    def _require_last_checkpoint(self, num_done: int) -> None:
        """Raise ValueError unless a complete run has a checkpoint to get more rounds from."""
        from fedsp_mpi.record import Checkpoints

        checkpoint, problems = Checkpoints(self.path).newest()
        if checkpoint is None:
            reason = f" ({problems[0]})" if problems else ""
            raise ValueError(
                f"{self.path}: found a complete run of {num_done} rounds and no checkpoint to go "
                f"on from{reason}, expected one (checkpoint.every); begin another run with more "
                "rounds under another run.name"
            )
        if clients_keep_state(self._config) and not checkpoint.clients:
            raise ValueError(
                f"{self.path}: found a complete run of {num_done} rounds whose clients' states are "
                "gone, expected them (checkpoint.keep_client_states=true keeps them); begin "
                "another run with more rounds under another run.name"
            )


def _path(config: Config, name: str) -> Path:
    """Return the folder that `run.name` stands for."""
    folder = Path(config.run.folder).expanduser()
    if config.run.name != "auto":
        return folder / config.run.name
    if config.run.resume != "never":
        newest = _newest_unfinished(folder, name)
        if newest is not None:
            return newest
    stamped = folder / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    if os.path.lexists(stamped):
        return stamped.with_name(f"{stamped.name}-{os.getpid()}")
    return stamped


def _newest_unfinished(folder: Path, name: str) -> Path | None:
    """Find the newest run of a configuration that did not come to its end."""
    from fedsp_mpi.record import read

    for path in sorted(folder.glob(f"{glob.escape(name)}-[0-9]*"), reverse=True):
        with suppress(ValueError):
            if read(path).status != "complete":
                return path
    return None
