"""The record of a run, written by one process (rank 0), that a SIGKILL at any moment leaves whole.

Nothing on disk is ever changed in place. The small tables are kept here as a frozen view; a commit
makes the next view, builds the whole run.h5 from it in memory, writes that to run.h5.part, syncs,
and renames it over run.h5. Each round's prompts are a file of their own, written once in the same
way before run.h5 links to it. So a reader sees the state before a commit or after it, and a failed
write changes neither the disk nor the view.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fedsp_mpi.files import ownership
from fedsp_mpi.record import atomic, hdf5, tables, trailer
from fedsp_mpi.record.atomic import RecordError
from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.record.tables import ClientRow, ResultRow, RoundRow, WireRow

FINAL = ("complete", "stopped", "failed")


class RunRecord:
    """One run's folder: `run.h5`, `config.yaml`, and `rounds/` while the run goes on.

    Make one with `create` or `open`. `run` is what is on disk. Every method that writes raises
    RecordError on a full disk, a folder without permission and the like, and leaves the last
    committed state as it was.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder, self.run = folder, run
        self._finished = False

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        config: Mapping[str, Any],
        config_text: str,
        environment: Mapping[str, Any],
        if_exists: str = "refuse",
    ) -> RunRecord:
        """Make the folder with config.yaml and a run.h5 without rounds.

        Args:
            config: the resolved configuration as plain data; `config_text` is the same as YAML.
            environment: host, ranks, versions, commit: anything that JSON can hold.
            if_exists: "refuse", or "replace": delete what an earlier run of that name wrote. Other
                files are left.

        Raises:
            ValueError: the folder holds a run already, or is not that of a run.
            RecordError: it cannot be written.
        """
        assert if_exists in ("refuse", "replace"), if_exists
        folder = Path(folder)
        run = Run(
            file=folder / "run.h5",
            name=folder.resolve().name,
            config=hdf5.plain(dict(config), "config"),
            config_text=config_text,
            environment=hdf5.plain(dict(environment), "environment"),
            created=_now(),
        )
        _claim(folder, config_text, if_exists)
        record = cls(folder, run)
        try:
            record._save(run)
        except RecordError:  # give the name back, so that the next try is not refused
            with suppress(OSError):
                (folder / "config.yaml").unlink()
            raise
        return record

    @classmethod
    def open(cls, folder: str | Path) -> RunRecord:
        """Open an existing run to go on with it; its status becomes "running".

        Raises ValueError if it cannot be read, RecordError if it cannot be written.
        """
        folder = Path(folder)
        run = hdf5.read(folder)
        record = cls(folder, run)
        if hdf5.is_folded(run.file):
            for round in run.prompt_rounds:
                path = folder / hdf5.round_file(round)
                record._write(path, hdf5.unfolded_image(run.file, round))
        record._save(replace(run, status="running", reason=""))
        record._sweep()
        return record

    def describe(self, **sections: Mapping[str, Any]) -> None:
        """Add to what the record says about the run: `describe(models={...}, data={...})`.

        A section that is there already keeps its other keys. Raises ValueError if JSON cannot hold
        a value.
        """
        merged = dict(self.run.sections)
        for name, section in sections.items():
            merged[name] = {**merged.get(name, {}), **hdf5.plain(dict(section), name)}
        self._save(replace(self.run, sections=merged))

    def commit_round(
        self,
        row: RoundRow,
        clients: Iterable[ClientRow] = (),
        prompts: Mapping[str, np.ndarray] | None = None,
        wire: Iterable[WireRow] | None = None,
    ) -> None:
        """Write one round with all that belongs to it; when this returns, the round is on disk.

        Args:
            row: its `round` must follow the last committed one.
            clients: one row a client.
            prompts: name -> array of any numeric type and shape; None keeps none for this round.
            wire: the wire's manifest up to now; None leaves the last one.
        """
        run, clients = self.run, list(clients)
        if row.round != run.committed_rounds + 1:
            raise ValueError(
                f"{run.file}: found round {row.round}, expected {run.committed_rounds + 1}; "
                "cut the record to the round that the run goes on from"
            )
        assert all(client.round == row.round for client in clients), "client rows of another round"
        if prompts is not None:
            self._write(self.folder / hdf5.round_file(row.round), hdf5.prompts_image(prompts))
        self._save(
            replace(
                run,
                rounds=tables.append(run.rounds, tables.table(RoundRow, [row])),
                clients=tables.append(run.clients, tables.table(ClientRow, clients)),
                wire=run.wire if wire is None else tables.table(WireRow, wire),
                prompt_rounds=run.prompt_rounds
                if prompts is None
                else (*run.prompt_rounds, row.round),
                committed_rounds=row.round,
            )
        )

    def write_wire(self, manifest: Iterable[WireRow]) -> None:
        """Replace the wire's manifest."""
        self._save(replace(self.run, wire=tables.table(WireRow, manifest)))

    def write_results(self, results: Iterable[ResultRow]) -> None:
        """Add result rows; one of the same method and split takes the place of the earlier one."""
        table = tables.table(ResultRow, results)
        new = {(row["method"], row["split"]) for row in table}
        kept = [(row["method"], row["split"]) not in new for row in self.run.results]
        self._save(replace(self.run, results=tables.append(self.run.results[kept], table)))

    def cut(self, after_round: int) -> None:
        """Remove every round above `after_round`, with its clients, its prompts, and the results
        scored on it.

        The wire's manifest stays as it is: what it counts has travelled.
        """
        run = self.run
        if after_round >= run.committed_rounds:
            return
        assert after_round >= 0, after_round
        self._save(
            replace(
                run,
                rounds=run.rounds[run.rounds["round"] <= after_round],
                clients=run.clients[run.clients["round"] <= after_round],
                results=run.results[run.results["round"] <= after_round],
                prompt_rounds=tuple(round for round in run.prompt_rounds if round <= after_round),
                committed_rounds=after_round,
            )
        )
        self._sweep()

    def finish(self, status: str = "complete", reason: str = "") -> None:
        """Write how the run ended; nothing can be written after it.

        A complete run becomes one self-contained run.h5. One that was stopped or failed keeps its
        `rounds/`, since it is likely to be resumed.
        """
        assert status in FINAL, status
        self._save(replace(self.run, status=status, reason=reason))
        self._finished = True
        if status == "complete" and self.run.prompt_rounds:
            self._fold()

    def _fold(self) -> None:
        part = atomic.part_of(self.run.file)
        with atomic.writing(self.run.file, self._kept, part):
            part.write_bytes(hdf5.run_image(self.run))
            ownership.give_rights(part)
            try:
                hdf5.fold_into(part, self.folder, self.run.prompt_rounds)
            # a round's file that was damaged since; the others can be read where they are
            except ValueError as error:
                raise OSError(tables.first_line(error)) from error
            atomic.sync(part)
            atomic.rename(part, self.run.file)
        with atomic.writing(self.folder / "rounds", self._kept):
            for path in ownership.written_in(self.folder / "rounds", "rounds"):
                path.unlink()
            ownership.remove_if_empty(self.folder / "rounds")

    def _save(self, run: Run) -> None:
        """Put `run` on disk; only then is it what the record holds."""
        if self._finished:
            raise ValueError(
                f"{run.file}: found a write after finish(), expected none; open the run again"
            )
        run = replace(run, updated=_now())
        self._write(run.file, hdf5.run_image(run))
        self.run = run

    def _write(self, path: Path, image: bytes) -> None:
        atomic.write(path, [image, trailer.of_image(image)], self._kept)

    @property
    def _kept(self) -> str:
        return f"the record keeps its {self.run.committed_rounds} rounds"

    def _sweep(self) -> None:
        """Delete round files that run.h5 does not know, and what a killed write left."""
        known = {self.folder / hdf5.round_file(round) for round in self.run.prompt_rounds}
        folder = self.folder / "rounds"
        with atomic.writing(folder, self._kept):
            for path in ownership.written_in(folder, "rounds"):
                if path not in known:
                    path.unlink()
            (self.folder / "run.h5.part").unlink(missing_ok=True)


def _claim(folder: Path, config_text: str, if_exists: str) -> None:
    """Take the folder for this run.

    config.yaml is made exclusively, so that of two processes one is refused.
    """
    if if_exists == "replace":
        with _creating(folder):
            ownership.clear(folder)
    require_free(folder)
    try:
        with _creating(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            ownership.make_folder(folder)
            ownership.write_new(folder / "config.yaml", config_text)
    except RecordError as error:
        if not isinstance(error.__cause__, FileExistsError):
            raise
        raise _taken(folder, "config.yaml" if folder.is_dir() else "a file of that name") from None


def require_free(folder: Path) -> None:
    """Raise ValueError if a folder holds a run."""
    if found := next(
        (name for name in ("run.h5", "config.yaml") if (folder / name).exists()), None
    ):
        raise _taken(folder, found)


def _taken(folder: Path, found: str) -> ValueError:
    return ValueError(
        f"{folder}: found a run ({found}), expected a new folder; set run.name to "
        "another name, run.resume=must to go "
        "on with that run, run.if_exists=replace to lose it, or delete it"
    )


@contextmanager
def _creating(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise atomic.failure(folder, error, "no run was started") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
