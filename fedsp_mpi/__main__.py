"""`python -m fedsp_mpi`, and the command `fedsp-mpi`."""

import gc

from fedsp_mpi.cli import main
from fedsp_mpi.comm import leave

# Loading torch and transformers makes a million objects that stay. To look for cycles among them
# after every 700, as Python does, takes a sixth of a start.
_OBJECTS_BETWEEN_COLLECTIONS = 20_000


def start() -> None:
    """Run the command line, and end the process."""
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    leave(main(ends_process=True))


if __name__ == "__main__":
    start()
