"""The command line on simulated hosts of two ranks each: python turns.py FOLDER ARGUMENTS...

Every rank writes to FOLDER/<rank> when its reading of the data began and ended.
"""

import platform
import sys
import time
from functools import cached_property
from pathlib import Path

from fedsp_mpi import cli
from fedsp_mpi.comm import launcher_rank, leave

RANK = launcher_rank() or 0


def note_reading(folder: Path) -> None:
    """Write down when the data is read, and make that take a while."""
    from fedsp_mpi.run.build import ExperimentInputs

    read = ExperimentInputs.splits.func

    def noted(self):
        begin = time.time()
        splits = read(self)
        time.sleep(0.3)
        (folder / str(RANK)).write_text(f"{begin} {time.time()}")
        return splits

    ExperimentInputs.splits = cached_property(noted)
    ExperimentInputs.splits.__set_name__(ExperimentInputs, "splits")


if __name__ == "__main__":
    platform.node = lambda: f"host{RANK // 2}"
    note_reading(Path(sys.argv[1]))
    leave(cli.main(sys.argv[2:]))
