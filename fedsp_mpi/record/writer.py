"""Writes the record of a run, on rank 0, so that a SIGKILL at any moment leaves it intact.

Nothing on disk is ever changed in place. The small tables are kept here as a frozen view; a commit
makes the next view, builds the whole run.h5 from it in memory, writes that to run.h5.part, syncs,
and renames it over run.h5. Each round's prompts are a file of their own, written once in the same
way before run.h5 links to it. So a reader sees the state before or after a commit, and a failed
write changes neither the disk nor the view.

Once run.h5 is large, a commit writes only what is new, behind what it has written before
(additions.py), until the run ends and run.h5 is written once more.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from fedsp_mpi.config import config_text_with_rounds
from fedsp_mpi.files import ownership
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject
from fedsp_mpi.log import one_line
from fedsp_mpi.record import additions, atomic, hdf5, tables, trailer
from fedsp_mpi.record.additions import Addition, Additions
from fedsp_mpi.record.atomic import RecordError
from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.record.tables import ClientRow, ResultRow, RoundRow, SiloRow, TierRow, WireRow

# In bytes. A run.h5 up to this size is written as a whole with every commit.
_MAX_REWRITTEN = 128 << 10
# Prompts of all rounds up to this size move into run.h5 when a run is complete.
_MAX_FOLDED = 16 << 20
_UNTUNED = "zero-shot"  # the method of the model's results before the run
_GROWING = ("rounds", "clients", "silos", "tiers")  # tables to which every round adds
FINAL_STATUSES = ("complete", "stopped", "failed")


class RunRecord:
    """The folder of a run: `run.h5`, `config.yaml`, and `rounds/` while the run goes on.

    Made by `create` or `open`. Every method that writes raises RecordError on a full disk, a folder
    without permission and the like, and leaves the last committed state as it was.

    Attributes:
        folder: of the run.
        run: what is on disk.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder = folder
        self.run = run
        self._finished = False
        self._additions: Additions | None = None  # where run.h5 is large
        self._growing = {name: tables.GrowingTable() for name in _GROWING}

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        config: JsonMapping,
        config_text: str,
        environment: JsonMapping,
        if_exists: str = "refuse",
    ) -> RunRecord:
        """Make a run folder with config.yaml and a run.h5 without rounds.

        Args:
            folder: to make.
            config: the resolved configuration as plain data.
            config_text: the same as YAML.
            environment: host, ranks, versions, commit: anything that JSON can hold.
            if_exists: "refuse", or "replace": delete what an earlier run of that name wrote; other
                files stay.

        Raises:
            ValueError: the folder holds a run already, or something else.
            RecordError: it cannot be written.
        """
        assert if_exists in ("refuse", "replace"), if_exists
        folder = Path(folder)
        run = Run(
            file=folder / "run.h5",
            name=folder.resolve().name,
            config=hdf5.to_plain(dict(config), "config"),
            config_text=config_text,
            environment=hdf5.to_plain(dict(environment), "environment"),
            created=_now(),
        )
        _claim(folder, config_text, if_exists)
        record = cls(folder, run)
        try:
            record._save(run)
        except RecordError:
            # Give the name back, so that the next try is not refused.
            with suppress(OSError):
                (folder / "config.yaml").unlink()
            raise
        return record

    @classmethod
    def open(cls, folder: str | Path) -> RunRecord:
        """Open an existing run to resume it; its status becomes "running".

        Raises:
            ValueError: it cannot be read.
            RecordError: it cannot be written.
        """
        folder = Path(folder)
        run = hdf5.read(folder)
        record = cls(folder, run)
        if hdf5.is_folded(run.file):
            for round in run.prompt_rounds:
                path = folder / hdf5.round_file(round)
                record._write(path, hdf5.unfolded_image(run.file, round))
        record._save(replace(run, status="running", reason=""))
        record._remove_additions()
        record._sweep()
        return record

    def describe(self, **sections: JsonMapping) -> None:
        """Add to what the record says about the run: `describe(models={...}, data={...})`.

        A section that exists keeps its other keys.

        Raises:
            ValueError: JSON cannot hold a value.
        """
        merged = dict(self.run.sections)
        for name, section in sections.items():
            merged[name] = {**merged.get(name, {}), **hdf5.to_plain(dict(section), name)}
        self._save(replace(self.run, sections=merged))

    def commit_round(
        self,
        row: RoundRow,
        clients: Iterable[ClientRow] = (),
        prompts: Mapping[str, np.ndarray] | None = None,
        *,
        silos: Iterable[SiloRow] = (),
        tiers: Iterable[TierRow] = (),
        wire: Iterable[WireRow] | None = None,
    ) -> None:
        """Write one round with everything that belongs to it; on return the round is on disk.

        Args:
            row: its `round` must follow the last committed one.
            clients: a row for each client.
            prompts: arrays [*shape] of any numeric dtype by name; None keeps none for this round.
            silos: a row for each silo that has scored the round.
            tiers: scores of personal, expert and general prompts; with the first round also those
                before it.
            wire: the wire's manifest so far; None leaves the last one.

        Raises:
            ValueError: the round does not follow the last committed one.
        """
        run = self.run
        clients = list(clients)
        if row.round != run.committed_rounds + 1:
            raise ValueError(
                f"{run.file}: found round {row.round}, expected {run.committed_rounds + 1}; "
                "cut the record to the round that the run goes on from"
            )
        assert all(client.round == row.round for client in clients), "client rows of another round"
        prompt_rounds = run.prompt_rounds
        if prompts is not None:
            self._write(self.folder / hdf5.round_file(row.round), hdf5.prompts_image(prompts))
            prompt_rounds = (*prompt_rounds, row.round)
        new_rows = {
            "rounds": tables.table(RoundRow, [row]),
            "clients": tables.table(ClientRow, clients),
            "silos": tables.table(SiloRow, silos),
            "tiers": tables.table(TierRow, tiers),
        }
        extended: JsonObject = {
            name: self._growing[name].extended(getattr(run, name), rows)
            for name, rows in new_rows.items()
            if len(rows)
        }
        self._save(
            replace(
                run,
                **extended,
                wire=run.wire if wire is None else tables.table(WireRow, wire),
                prompt_rounds=prompt_rounds,
                committed_rounds=row.round,
            ),
            new_rows,
        )

    def write_wire(self, manifest: Iterable[WireRow]) -> None:
        """Replace the wire's manifest."""
        self._save(replace(self.run, wire=tables.table(WireRow, manifest)))

    def write_results(self, results: Iterable[ResultRow]) -> None:
        """Add result rows; a row of the same method and split replaces the earlier one."""
        new = tables.table(ResultRow, results)
        replaced = {(row["method"], row["split"]) for row in new}
        stays = [(row["method"], row["split"]) not in replaced for row in self.run.results]
        self._save(replace(self.run, results=tables.append(self.run.results[stays], new)))

    def cut(self, after_round: int) -> None:
        """Remove the rounds above `after_round`, with their clients, prompts and results.

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
                silos=run.silos[run.silos["round"] <= after_round],
                # What was scored before the first round is scored again with it.
                tiers=run.tiers[(run.tiers["round"] <= after_round) & (after_round > 0)],
                results=run.results[run.results["round"] <= after_round],
                prompt_rounds=tuple(round for round in run.prompt_rounds if round <= after_round),
                committed_rounds=after_round,
            )
        )
        self._sweep()

    def set_rounds(self, rounds: int) -> None:
        """Change how many rounds the run has; scores of what it tuned are removed.

        Another round may be the best one of more rounds. The model as it was keeps its score, and
        so do guesses.
        """
        run = self.run
        is_kept = (run.results["method"] == _UNTUNED) | (run.results["split"] == tables.LABELS)
        # config.yaml first: a kill in between leaves a record that is changed once more.
        text = config_text_with_rounds(run.config_text, rounds)
        self._write_text(self.folder / "config.yaml", text)
        federation = {**run.config["federation"], "rounds": rounds}
        self._save(
            replace(
                run,
                config={**run.config, "federation": federation},
                config_text=text,
                results=run.results[is_kept],
            )
        )

    def finish(self, status: str = "complete", reason: str = "") -> None:
        """Write how the run ended; nothing can be written afterwards.

        A complete run becomes one self-contained run.h5. A stopped or failed one keeps its
        `rounds/`, since it is likely to be resumed.

        Args:
            status: one of FINAL_STATUSES.
            reason: why it ended so, in one line.
        """
        assert status in FINAL_STATUSES, status
        self._save(replace(self.run, status=status, reason=reason))
        self._finished = True
        if status == "complete" and self._folds():
            self._fold()
        elif self._additions is not None:
            self._write(self.run.file, hdf5.run_image(self.run))
        self._remove_additions()

    def _folds(self) -> bool:
        """Return whether the prompts of all rounds are few enough to be written once more."""
        files = [self.folder / hdf5.round_file(round) for round in self.run.prompt_rounds]
        with atomic.writing(self.run.file, self._intact):
            return 0 < sum(file.stat().st_size for file in files) <= _MAX_FOLDED

    def _fold(self) -> None:
        """Move the prompts of all rounds into run.h5."""
        part = atomic.part_of(self.run.file)
        with atomic.writing(self.run.file, self._intact, part):
            part.write_bytes(hdf5.run_image(self.run))
            ownership.apply_folder_mode(part)
            try:
                hdf5.fold_into(part, self.folder, self.run.prompt_rounds)
            except ValueError as error:
                # A round's file was damaged since; the others can be read where they are.
                raise OSError(one_line(error, first_line=True)) from error
            atomic.sync(part)
            atomic.rename(part, self.run.file)
        with atomic.writing(self.folder / "rounds", self._intact):
            for path in ownership.run_files_in(self.folder / "rounds", "rounds"):
                path.unlink()
            ownership.remove_if_empty(self.folder / "rounds")

    def _save(self, run: Run, new_rows: Mapping[str, np.ndarray] | None = None) -> None:
        """Put `run` on disk; only then is it what the record holds.

        Args:
            run: the next state.
            new_rows: what tables of it have more than the last state's, [rows] by name; another
                table that is not the last state's is a new one.
        """
        if self._finished:
            raise ValueError(
                f"{run.file}: found a write after finish(), expected none; open the run again"
            )
        run = replace(run, updated=_now())
        if self._additions is not None and run.config is self.run.config:
            self._additions.append(self._changes(run, new_rows or {}), self._intact)
        else:
            image = hdf5.run_image(run)
            self._write(run.file, image)
            is_large = len(image) > _MAX_REWRITTEN
            self._additions = Additions(self.folder, trailer.digest(image)) if is_large else None
        self.run = run

    def _changes(self, run: Run, new_rows: Mapping[str, np.ndarray]) -> Addition:
        """Return what a state has that the last one does not; see `_save`."""
        fields = {
            name: getattr(run, name)
            for name in hdf5.ADDED
            if getattr(run, name) != getattr(self.run, name)
        }
        before = self.run.prompt_rounds
        after = run.prompt_rounds
        if before != after:
            num_kept = len(before) if after[: len(before)] == before else 0
            fields[hdf5.PROMPT_ROUNDS] = [before[-1] + 1 if num_kept else 0, *after[num_kept:]]
        replaced = {
            name: getattr(run, name)
            for name in tables.TABLES
            if name not in new_rows and getattr(run, name) is not getattr(self.run, name)
        }
        return Addition(
            fields, {name: rows for name, rows in new_rows.items() if len(rows)}, replaced
        )

    def _remove_additions(self) -> None:
        """Remove what run.h5, which has just been written, holds itself."""
        with atomic.writing(self.folder / additions.NAME, self._intact):
            additions.remove(self.folder)

    def _write(self, path: Path, image: bytes) -> None:
        atomic.write(path, [image, trailer.of_image(image)], self._intact)

    def _write_text(self, path: Path, text: str) -> None:
        atomic.write(path, [text.encode()], self._intact)

    @property
    def _intact(self) -> str:
        return f"the record keeps its {self.run.committed_rounds} rounds"

    def _sweep(self) -> None:
        """Delete round files that run.h5 does not refer to, and what a killed write left."""
        referenced = {self.folder / hdf5.round_file(round) for round in self.run.prompt_rounds}
        folder = self.folder / "rounds"
        with atomic.writing(folder, self._intact):
            for path in ownership.run_files_in(folder, "rounds"):
                if path not in referenced:
                    path.unlink()
            (self.folder / "run.h5.part").unlink(missing_ok=True)


def _claim(folder: Path, config_text: str, if_exists: str) -> None:
    """Make the folder and its config.yaml, exclusively: of two processes one is refused."""
    if if_exists == "replace":
        with _creating(folder):
            ownership.clear(folder)
        for name in ("run.h5", "config.yaml"):
            if os.path.lexists(folder / name):
                raise ValueError(
                    f"{folder / name}: found something that no run wrote, expected a file of the "
                    "run; move it away"
                )
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
    for name in ("run.h5", "config.yaml"):
        if (folder / name).exists():
            raise _taken(folder, name)


def _taken(folder: Path, evidence: str) -> ValueError:
    return ValueError(
        f"{folder}: found a run ({evidence}), expected a new folder; set run.name to another name, "
        f"go on with that run by `run --resume {folder}`, lose it by --replace, or delete it"
    )


@contextmanager
def _creating(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise atomic.failure(folder, error, "no run was started") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
