"""The command line, whose ranks keep what they send to each other.

python capture.py FOLDER ARGUMENTS...: each message of rank R goes into a file FOLDER/R-NUMBER.
"""

import sys
from itertools import count
from pathlib import Path

from fedsp_mpi import cli
from fedsp_mpi.comm import launcher_rank, leave
from fedsp_mpi.comm.wire import Wire

folder = Path(sys.argv[1])
numbers = count()


def keep(content: bytes) -> None:
    if content:  # ranks that receive a broadcast send nothing
        (folder / f"{launcher_rank()}-{next(numbers):03d}").write_bytes(content)


def kept(send):
    def send_and_keep(wire, content, *rest):
        keep(content)
        return send(wire, content, *rest)

    return send_and_keep


Wire._send_message = kept(Wire._send_message)
Wire._broadcast_json = kept(Wire._broadcast_json)
leave(cli.main(sys.argv[2:]))
