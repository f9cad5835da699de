"""The command line, with every opening written down: python opens.py LOG FOLDER FAULTS ARGUMENTS...

LOG/RANK.jsonl gets the path of each file below FOLDER that the rank RANK opens, by Python or by a
library. FAULTS, such as "1:client_005", let a rank read a file that is another's.
"""

import json
import os
import sys
from pathlib import Path

from fedsp_mpi import cli
from fedsp_mpi.comm import launcher_rank

log, folder, faults = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
rank = launcher_rank() or 0
out = os.open(log / f"{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def watch(event: str, arguments: tuple[object, ...]) -> None:
    """Write down a path that is opened."""
    if event != "open" or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    path = str(Path(os.fsdecode(arguments[0])).absolute())
    if path.startswith(f"{folder}/"):
        os.write(out, f"{json.dumps(path)}\n".encode())


sys.addaudithook(watch)
for fault in filter(None, faults.split(",")):
    who, name = fault.split(":")
    if int(who) == rank:
        next(Path(folder, name).iterdir()).read_bytes()
sys.exit(cli.main(sys.argv[4:]))
