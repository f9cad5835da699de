"""Several command lines one after the other in one job, for the price of one start.

Usage: several.py JOBS, a JSON file with a list of [ARGUMENTS, FILE or null]; what the first rank
prints goes to FILE.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from fedsp_mpi import cli
from fedsp_mpi.comm import launcher_rank
from fedsp_mpi.tensors import seal


def main(file: str) -> int:
    for arguments, printed in json.loads(Path(file).read_text()):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = cli.main(arguments)
        if printed and not launcher_rank():
            Path(printed).write_text(out.getvalue())
        if status:
            return status
        seal.clear()  # the next run has a global model of its own
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
