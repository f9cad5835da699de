"""A user's script under mpirun: a mistake, two runs, and another mistake.

Usage: notebook.py FOLDER SETTINGS, a JSON object of values by key.
"""

from __future__ import annotations

import json
import sys

import fedsp_mpi


def main(folder: str, settings: str) -> None:
    values = {**json.loads(settings), "run.folder": folder}
    try:
        fedsp_mpi.run(set={**values, "federation.round": 1})
    except fedsp_mpi.ConfigError as error:
        print("heard:", error, flush=True)
    first = fedsp_mpi.run(set=values, name="first")
    second = fedsp_mpi.run(set=values, name="second")
    print("returned:", first is not None, second is not None, flush=True)
    try:
        fedsp_mpi.run(set=values, name="first")
    except fedsp_mpi.ConfigError as error:
        print("heard:", error, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
