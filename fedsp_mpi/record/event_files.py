"""TensorBoard's event files beside the record: the only importer of tensorboardX."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedsp_mpi.config.parsing import ConfigError

if TYPE_CHECKING:
    from fedsp_mpi.record.hdf5 import Run

FOLDER = "tensorboard"
_LIBRARY = "tensorboardX"


def require_library() -> None:
    """Raise ConfigError if event files are asked for, and nothing here can write them."""
    if find_spec(_LIBRARY) is None:
        raise ConfigError(
            f"record.tensorboard: found no {_LIBRARY} here, expected it on rank 0's host; install "
            "it with pip install 'fedsp_mpi[tensorboard]', or set record.tensorboard=false"
        )


class EventFiles:
    """Writes rounds and results as scalars; a step is a round.

    What an earlier stretch of the run has written is replaced by what its record holds, so that no
    round is there twice.

    Args:
        folder: of the run.
        run: the record so far.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        from tensorboardX import SummaryWriter

        event_folder = folder / FOLDER
        for file in event_folder.glob("events.out.tfevents.*"):
            file.unlink()
        self._writer = SummaryWriter(str(event_folder))
        for row in run.rounds:
            self._write(run, row)
        self._writer.flush()

    def write_round(self, run: Run) -> None:
        """Write the record's last round."""
        self._write(run, run.rounds[-1])
        self._writer.flush()

    def finish(self, run: Run) -> None:
        """Write the results, at the step of the last round, and close the file."""
        step = int(run.rounds["round"].max()) if len(run.rounds) else 0
        for row in run.results:
            name = f"results/{row['method']}/{row['split']}"
            for measure in ("acc", "exact_match"):
                self._scalar(f"{name}/{measure}", row[measure], step)
        self._writer.close()

    def _write(self, run: Run, row: np.void) -> None:
        """Write one round, its clients and its silos."""
        step = int(row["round"])
        for name in row.dtype.names or ():
            if name != "round":
                self._scalar(f"round/{name}", row[name], step)
        for kind, key, rows in (("client", "client", run.clients), ("silo", "silo", run.silos)):
            for row_of_one in rows[rows["round"] == step]:
                for name in row_of_one.dtype.names or ():
                    if "loss" in name or name == "acc":
                        self._scalar(f"{kind}_{row_of_one[key]}/{name}", row_of_one[name], step)

    def _scalar(self, name: str, value: float, step: int) -> None:
        """Write a number unless it is none."""
        if np.isfinite(value):
            self._writer.add_scalar(name.replace(" ", "_"), float(value), step)
