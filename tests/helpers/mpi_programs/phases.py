"""The command line; the first rank says which phases it entered, in their order."""

import sys
from contextlib import contextmanager

from fedsp_mpi import cli
from fedsp_mpi.comm import guard, launcher_rank, leave

entered: list[str] = []
original = guard.phase


@contextmanager
def phase(name, **where):
    entered.append(f"{name} {where.get('round', '')}".strip())
    with original(name, **where):
        yield


guard.phase = phase
status = cli.main(sys.argv[1:])
if launcher_rank() == 0:
    print("phases:", ", ".join(entered))
leave(status)
