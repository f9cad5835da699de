"""Several runs one after the other in one job, for the price of one start.

Usage: several.py FOLDER FILE...: each configuration's run is named after its file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedsp_mpi import cli


def main(folder: str, files: list[str]) -> int:
    for file in files:
        settings = ["--set", f"run.folder={folder}", "--name", Path(file).stem]
        status = cli.main(["run", file, *settings])
        if status:
            return status
        from fedsp_mpi.tensors import seal

        seal.clear()  # the next run has a global model of its own
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
