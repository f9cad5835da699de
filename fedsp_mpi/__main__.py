"""`python -m fedsp_mpi`, and the command `fedsp-mpi`."""

from fedsp_mpi.cli import main
from fedsp_mpi.comm import leave


def start() -> None:
    """Run the command line, and end the process."""
    leave(main())


if __name__ == "__main__":
    start()
